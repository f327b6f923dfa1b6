"""One per-sample log of a run, and the rows that are summed from it: what each method reached on each task at each budget.

A finished batch is one line, appended at once, so that a killed run loses one batch at most. Reports, cards and
docs/results.md are made of files of rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from learnevict.errors import DataError, UsageError
from learnevict.evals import metrics
from learnevict.evals.methods import FULL, GOLDEN, RANDOM
from learnevict.evals.plan import Cell, EvaluatedModel, Key, Plan
from learnevict.files import Lines, write, writing

KEYS = (
    "method", "family", "budget", "exact_match", "step_accuracy", "ci_low", "ci_high", "loss_ratio", "kv_bytes_peak",
    "kv_bytes_end", "kv_bytes_full", "tokens_generated", "tokens_per_second", "samples",
)  # fmt: skip
"""The keys that every row has, here and in demo reports; null where not run. Others may follow.

`budget` is in slots per layer and kv head, null with the full cache; `ci_low` and `ci_high` are of `step_accuracy`;
`loss_ratio` is to the full cache on the same samples; bytes and tokens are per sample, the peak the largest;
`tokens_per_second` is of one pass in batches, beside whatever else the machine did: no benchmark.
"""

ORACLE_KEYS = ("oracle_gap_closed", "top_recall", "regret", "attention_kept", "attention_kept_min")
"""What rows of the testbed have besides; null where not asked for, or not defined.

`oracle_gap_closed` is the recovered loss, from random eviction (0) to golden (1), in the same cell; the recovery of
docs/results.md is of step accuracy, from the best training-free method. For the others see learnevict.oracle.metrics.
"""

TEXT_KEYS = ("perplexity", "perplexity_ratio", "num_tokens")
"""What rows of `eval --task perplexity` have besides."""
NUMBERS = (*KEYS[2:], *ORACLE_KEYS, *TEXT_KEYS, "exact_low", "exact_high")

Row = dict[str, Any]
START = b'{"configuration": '
"""How a log begins."""
MARK = b'"kv_bytes_peak": '
"""What every file of rows has near its beginning."""


class SampleLog:
    """Per-sample numbers by cell and seed, in memory and in a JSONL file.

    The first line of the file is the configuration; each further line holds a batch: lists run over its seeds, a single
    number holds for each of them. In memory every seed also knows how many shared its batch, as "batch".

    Args:
        path: the file; None keeps everything in memory.
        configuration: everything that would make old numbers wrong if it changed; None: whatever the file says.
        resume: go on with a file that is there.

    Raises:
        UsageError: the file is there and `resume` is not set, or it belongs to another configuration.
        DataError: the file cannot be read or written.
    """

    def __init__(self, path: Path | None, configuration: Mapping[str, Any] | None, *, resume: bool = False) -> None:
        self.path = path
        self.entries: dict[Key, dict[int, dict[str, float]]] = {}
        self.identity: dict[Key, Any] = {}
        self.configuration: dict[str, Any] = json.loads(json.dumps(configuration or {}))
        if path is None:
            return
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = Lines(path, START)
        if not self.lines.rows:
            self.lines.append({"configuration": self.configuration})
        elif not resume:
            raise UsageError(f"{path} holds an earlier run; go on with it (--resume) or choose another --out")
        else:
            self._take_all(path, None if configuration is None else self.configuration)

    def missing(
        self, key: Key, seeds: Sequence[int], identity: Mapping[str, Any], columns: Sequence[str] = ()
    ) -> list[int]:
        """Returns seeds of a cell that still have to be run, for the first time or for the sake of a column that they lack.

        Raises:
            UsageError: the cell was begun with other hyperparameters or gates.
        """
        now = json.loads(json.dumps(identity))
        known = self.identity.setdefault(key, now)
        if known != now:
            raise UsageError(
                f"{self.path} holds {key.method} on {key.family} at {key.budget} with {known}, but now it is {now}; "
                "write to another --out"
            )
        done = self.entries.get(key, {})
        return [seed for seed in seeds if seed not in done or any(name not in done[seed] for name in columns)]

    def add(self, key: Key, seeds: Sequence[int], values: Mapping[str, Any]) -> None:
        """Adds a finished batch."""
        line = {**vars(key), "identity": self.identity.get(key), "seeds": list(seeds), **values}
        self._take(line)
        if self.path is not None:
            self.lines.append(line)

    def column(self, key: Key, seeds: Sequence[int], name: str) -> list[float] | None:
        """Returns one number per seed; None unless every seed has it."""
        found = self.entries.get(key, {})
        if any(name not in found.get(seed, {}) for seed in seeds):
            return None
        return [found[seed][name] for seed in seeds]

    def columns(self, key: Key, seeds: Sequence[int], *names: str) -> list[list[float]] | None:
        """Returns several columns; None unless all are there."""
        found = [self.column(key, seeds, name) for name in names]
        whole = [one for one in found if one is not None]
        return whole if len(whole) == len(found) else None

    def _take(self, line: Mapping[str, Any]) -> None:
        values = dict(line)
        key = Key(*(values.pop(name) for name in Key.__annotations__))
        self.identity[key] = values.pop("identity")
        seeds = values.pop("seeds")
        cell = self.entries.setdefault(key, {})
        for index, seed in enumerate(seeds):
            mine = {name: value[index] if isinstance(value, list) else value for name, value in values.items()}
            cell[seed] = {**mine, "batch": len(seeds)}

    def _take_all(self, path: Path, wanted: dict[str, Any] | None) -> None:
        """Reads what the file holds, if it is of this configuration."""
        try:
            first, *rows = self.lines.rows
            found = self.configuration = dict(first["configuration"])
            wanted = found if wanted is None else wanted
            differ = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            for row in [] if differ else rows:
                self._take(row)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"{str(path)!r} is no record of an evaluation; write to another --out") from error
        if differ:
            changes = ", ".join(f"{name} {found.get(name)!r} (now {wanted.get(name)!r})" for name in differ)
            raise UsageError(f"{path} belongs to another configuration: {changes}; write to another --out")


def log_path(out: Path) -> Path:
    """Returns where the per-sample numbers behind a file of rows are kept."""
    return out.with_name(f"{out.stem}.samples.jsonl")


def make_row(log: SampleLog, cell: Cell, plan: Plan, subject: EvaluatedModel) -> Row:
    """Returns the figures of a cell: KEYS and ORACLE_KEYS, then where the row comes from."""
    row = start_row(cell, plan.num_samples)
    for figures in (_teacher(log, cell, plan), _free(log, cell, plan), _oracle(log, cell, plan)):
        row |= figures
    if cell.impossible is not None:
        row["impossible"] = cell.impossible
    return row | {
        **source(cell, subject.name),
        **{name: value for name, value in plan.tasks[0].origin.items() if name != "tasks"},
        "seed": plan.seed,
        "tries": plan.tries,
        "device": subject.model.device.type,
        "rules": vars(plan.settings),
        "options": cell.options,
    }


def start_row(cell: Cell, num_samples: int) -> Row:
    """Returns a row without figures."""
    place = {"method": cell.evaluated_method.name, "family": cell.family, "budget": cell.budget}
    return {**dict.fromkeys(KEYS), **place, "samples": num_samples}


def source(cell: Cell, model: str) -> Row:
    """Returns where a row comes from; `gates` is the hash of the trained part, null where there is none, as in the log."""
    return {
        "budget_share": cell.share,
        "kind": cell.evaluated_method.kind,
        "gates_of": None if cell.evaluated_method.gates is None else cell.evaluated_method.method,
        "gates": cell.identity.get("gates"),
        "model": model,
    }


def _teacher(log: SampleLog, cell: Cell, plan: Plan) -> Row:
    key, seeds = cell.key("teacher"), plan.seeds
    found = log.columns(key, seeds, "right", "seen", "loss")
    if found is None:
        return {}
    right, seen, loss = found
    accuracy = metrics.step_accuracy(right, seen)
    full = log.column(Key(FULL, cell.family, FULL, "teacher"), seeds, "loss")
    return {
        "step_accuracy": accuracy.value,
        "ci_low": accuracy.low,
        "ci_high": accuracy.high,
        "loss_ratio": metrics.ratio(loss, full).value if full else None,
        **_bytes(log, key, seeds),
    }


def _oracle(log: SampleLog, cell: Cell, plan: Plan) -> Row:
    """Returns how near the oracle a cell comes, see ORACLE_KEYS."""
    key, seeds = cell.key("teacher"), plan.seeds

    def ratio(above: str, below: str) -> float | None:
        sums = [sum(one) for one in log.columns(key, seeds, above, below) or ()]
        return sums[0] / sums[1] if sums and sums[1] else None

    closed, least = None, log.column(key, seeds, "attention_least")
    losses = [log.column(replace(key, method=name), seeds, "loss") for name in (key.method, RANDOM, GOLDEN)]
    sums = [sum(one) for one in losses if one is not None]
    if cell.budget is not None and len(sums) == 3 and sums[1] != sums[2]:
        closed = (sums[1] - sums[0]) / (sums[1] - sums[2])
    kept = (ratio("wanted_kept", "wanted"), ratio("cost", "least_cost"), ratio("attention_kept", "queries"))
    return dict(zip(ORACLE_KEYS, (closed, *kept, min(least) if least else None), strict=True))


def _free(log: SampleLog, cell: Cell, plan: Plan) -> Row:
    key, seeds = cell.key("free"), plan.seeds
    found, agreed = log.columns(key, seeds, "exact", "tokens", "seconds"), log.column(key, seeds, "agreed")
    if found is None:
        return {}
    exact, tokens, seconds = found
    match = metrics.share(exact)
    late = sum(tokens) - plan.tries * len(tokens)  # the seconds begin after each answer's first token
    row = {
        "exact_match": match.value,
        "exact_low": match.low,
        "exact_high": match.high,
        "tokens_generated": metrics.mean(tokens).value,
        "tokens_per_second": late / sum(seconds) if sum(seconds) else None,
        **_bytes(log, key, seeds),
    }
    if agreed is not None:
        row |= {"agreement": sum(agreed) / len(agreed), "agreed_fully": sum(a == 1 for a in agreed) / len(agreed)}
    return row


def _bytes(log: SampleLog, key: Key, seeds: Sequence[int]) -> Row:
    """Returns bytes per sample, over the samples where they were measured; the peak is the largest."""
    found = [log.entries[key][seed] for seed in seeds if "peak" in log.entries[key][seed]]
    if not found:
        return {}
    ends, fulls = (sum(entry[name] for entry in found) / len(found) for name in ("end", "full"))
    peak = max(entry["peak"] for entry in found)
    return {"kv_bytes_peak": round(peak), "kv_bytes_end": round(ends), "kv_bytes_full": round(fulls)}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the file by these rows, one JSON object a line; NaN and infinity, which are no JSON, become null.

    Raises:
        DataError: it cannot be written.
    """
    odd = (float("inf"), float("-inf"))
    finite = [{name: None if value != value or value in odd else value for name, value in row.items()} for row in rows]
    write(path, "".join(json.dumps(row) + "\n" for row in finite), MARK)


def read_rows(path: Path) -> list[Row]:
    """Returns rows of a JSONL file, or of a report {"rows": [...]}.

    Raises:
        DataError: no such file, not JSON, no rows, or texts where figures should be.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read rows from {str(path)!r}: {error}") from error
    rows: Any = []
    try:
        whole = json.loads(text) if text.lstrip().startswith("{") and "\n{" not in text.strip() else None
        rows = whole["rows"] if whole and "rows" in whole else [json.loads(line) for line in text.splitlines() if line]
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{str(path)!r} is neither JSON lines nor a report: {error}") from error
    known = {"method", "family", "budget"}
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and known <= set(row) for row in rows):
        raise DataError(f"{str(path)!r} holds no rows of an evaluation; each needs the keys {', '.join(KEYS)}")
    for row in rows:
        odd = [name for name in NUMBERS if not isinstance(row.get(name), (int, float, type(None)))]
        if odd:
            raise DataError(f"{odd[0]} of a row in {str(path)!r} is no number: {row[odd[0]]!r}")
    return rows
