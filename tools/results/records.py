"""Finished comparisons read back: rows and the per-sample numbers behind them, for paired figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from learnevict.evals import metrics
from learnevict.evals.methods import FULL, GOLDEN
from learnevict.evals.metrics import Estimate, RecoveryCell, recovery
from learnevict.evals.plan import Key
from learnevict.evals.records import Row, read_rows, write_rows
from learnevict.evals.sample_log import START, SampleLog, log_path
from learnevict.files import Lines, write
from tools.results.pairs import Pairs, paired_test

Share = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Records:
    """Rows of one table, and a log per family.

    Attributes:
        seeds: of the samples, by family.
        configurations: model, tasks and rules that the logs were written under.
    """

    rows: list[Row] = field(default_factory=list)
    logs: dict[str, SampleLog] = field(default_factory=dict)
    seeds: dict[str, range] = field(default_factory=dict)
    configurations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def families(self) -> list[str]:
        """Returns the families in order of appearance."""
        return list(dict.fromkeys(row["family"] for row in self.rows))

    @property
    def budgets(self) -> list[str]:
        """Returns budgets as asked for ("1/4"), the largest first; in order of appearance if they are no numbers of slots."""
        found: dict[str, Any] = {}
        for row in self.rows:
            if row["budget"] is not None:
                found.setdefault(row.get("budget_share") or str(row["budget"]), row["budget"])
        if all(isinstance(slots, int) for slots in found.values()):
            return sorted(found, key=lambda asked: -found[asked])
        return list(found)

    def methods(self, kind: str | None = None) -> list[str]:
        """Returns the methods in order of appearance, of one kind or all."""
        return list(dict.fromkeys(row["method"] for row in self.rows if kind in (None, row.get("kind"))))

    def row(self, method: str, family: str, budget: str | None) -> Row | None:
        """Returns the row of a cell; budget None: the full cache."""
        for row in self.rows:
            asked = None if row["budget"] is None else row.get("budget_share") or str(row["budget"])
            if (row["method"], row["family"], asked) == (method, family, budget):
                return row
        return None

    def counts(
        self, method: str, family: str, budget: str | None, name: str = "right", mode: str = "teacher"
    ) -> list[float] | None:
        """Returns per-sample numbers of a cell; None where not run. Budget None: the full cache."""
        if family not in self.logs:
            return None
        return self.logs[family].column(Key(method, family, budget or FULL, mode), self.seeds[family], name)

    def shares(self, method: str, family: str, budget: str | None, mode: str) -> Share | None:
        """Returns what was right and of how many, by sample: answer-mask tokens ("teacher") or whole answers ("free")."""
        if mode == "free":
            exact = self.counts(method, family, budget, "exact", mode)
            return None if exact is None else (exact, [1.0] * len(exact))
        right, seen = (self.counts(method, family, budget, name) for name in ("right", "seen"))
        return None if right is None or seen is None else (right, seen)

    def mean(self, method: str, budget: str | None, mode: str) -> Estimate | None:
        """Returns mean over all families; None unless all were run."""
        found = [self.shares(method, family, budget, mode) for family in self.families]
        whole = [part for part in found if part is not None]
        if not found or len(whole) < len(found):
            return None
        return metrics.mean_of_shares([exact for exact, _ in whole]) if mode == "free" else metrics.mean_share(whole)

    def test(
        self, method: str, other: str, families: Sequence[str], budget: str, mode: str, *, pooled: bool = False
    ) -> tuple[Estimate, float] | None:
        """Returns how much better a method is than another on the same samples, with p; None where one was not run.

        `pooled`: see pairs.paired_test.
        """
        found: list[Pairs] = []
        for family in families:
            one, two = (self.shares(name, family, budget, mode) for name in (method, other))
            if one is None or two is None:
                return None
            found.append((one[0], two[0], one[1]))
        return paired_test(found, pooled=pooled) if found else None

    def cell(self, method: str, best: str, family: str, budget: str) -> RecoveryCell | None:
        """Returns a method between `best` and golden; None where one of them was not run."""
        parts = [self.counts(one, family, budget) for one in (method, best, GOLDEN)]
        seen = self.counts(GOLDEN, family, budget, "seen")
        if seen is None or any(part is None for part in parts):
            return None
        return RecoveryCell(*(part for part in parts if part is not None), seen=seen)

    @property
    def batch(self) -> int:
        """Returns the largest number of samples that were answered together."""
        free = [log.entries[key] for log in self.logs.values() for key in log.entries if key.mode == "free"]
        return max((int(entry["batch"]) for cell in free for entry in cell.values()), default=0)

    @property
    def gates(self) -> dict[str, set[str]]:
        """Returns hashes of the gates behind each method's numbers: one each, unless some are stale."""
        found: dict[str, set[str]] = {}
        for log in self.logs.values():
            for key, identity in log.identity.items():
                if identity and "gates" in identity:
                    found.setdefault(key.method, set()).add(identity["gates"])
        return found

    def recovery(self, method: str, best: dict[str, str], budget: str) -> Estimate:
        """Returns recovery pooled over the families of `best`, which names the method it is measured from in each."""
        found = [self.cell(method, base, family, budget) for family, base in best.items()]
        return recovery([cell for cell in found if cell is not None])

    def left_out(self, method: str, best: dict[str, str], budget: str) -> dict[str, str]:
        """Returns families of `best` that the pooled recovery leaves out, each with the reason."""
        found = {family: self.cell(method, base, family, budget) for family, base in best.items()}
        reasons = {family: "not run" if one is None else f"gap {one.gap:.3f}" for family, one in found.items()}
        return {family: reasons[family] for family, one in found.items() if one is None or not one.scored}

    def difference(self, method: str, other: str, family: str, budget: str) -> Estimate | None:
        """Returns step accuracy of a method minus another's, on the same samples."""
        one, two = self.counts(method, family, budget), self.counts(other, family, budget)
        seen = self.counts(method, family, budget, "seen")
        if one is None or two is None or seen is None:
            return None
        return metrics.paired_difference(one, two, seen)


def read_results(files: Sequence[Path]) -> Records:
    """Returns rows of several files, one or more families each, and their sample logs where those are kept.

    Raises:
        DataError: a file is no result of an evaluation.
    """
    results = Records()
    for path in files:
        rows = read_rows(path)
        results.rows.extend(rows)
        if log_path(path).exists():
            log = SampleLog(log_path(path), None, resume=True)
            results.configurations.append(log.configuration)
            for row in rows:
                results.logs[row["family"]] = log
                results.seeds[row["family"]] = range(row.get("seed", 0), row.get("seed", 0) + row["samples"])
    return results


def of_run(rows: list[Row], log: SampleLog) -> Records:
    """Returns the records of a run that has just ended."""
    results = Records(rows)
    for row in rows:
        results.logs[row["family"]] = log
        results.seeds[row["family"]] = range(row["seed"], row["seed"] + row["samples"])
    return results


def forget(out: Path, name: str) -> tuple[int, int]:
    """Drops a method, and its settings tried in tuning ("NAME window=8"), from a file of rows and from the log behind it.

    Each file is written anew beside the old one and takes its place at once.

    Returns:
        How many rows and how many batches are gone.

    Raises:
        DataError: a file cannot be read or written, or holds something else.
    """
    rows = read_rows(out) if out.exists() and out.stat().st_size else []
    if rows:
        write_rows(out, [row for row in rows if not _is_of(row, name)])
    lines = Lines(log_path(out), START).rows
    if lines:
        kept = "".join(json.dumps(line) + "\n" for line in lines if not _is_of(line, name))
        write(log_path(out), kept, START)
    return sum(_is_of(row, name) for row in rows), sum(_is_of(line, name) for line in lines)


def _is_of(line: dict[str, Any], name: str) -> bool:
    return line.get("method", "").split(" ")[0] == name
