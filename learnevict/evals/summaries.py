"""Rows of tables: what one method reached on one family at one budget."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from learnevict.errors import DataError, UsageError
from learnevict.evals import metrics
from learnevict.evals.budgets import is_share
from learnevict.evals.methods import FULL, GOLDEN, RANDOM
from learnevict.evals.perplexity import Perplexity
from learnevict.evals.plan import Cell, EvaluatedModel, Plan
from learnevict.evals.sample_log import Key, SampleLog
from learnevict.files import special, write

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
MARK = b'"kv_bytes_peak": '
"""What every file of rows has near its beginning."""


def make_row(log: SampleLog, cell: Cell, plan: Plan, subject: EvaluatedModel) -> Row:
    """Returns the summary of a cell.

    Returns:
        KEYS and ORACLE_KEYS, then where the row comes from.
    """
    row: Row = dict.fromkeys(KEYS)
    row |= {
        "method": cell.evaluated_method.name,
        "family": cell.family,
        "budget": cell.budget,
        "samples": plan.num_samples,
    }
    for fill in (_teacher, _free):
        row |= fill(log, cell, plan)
    row |= _oracle(log, cell, plan)
    if cell.impossible is not None:
        row["impossible"] = cell.impossible
    return row | {
        **_origin(cell, subject.name),
        "split": plan.split,
        "length": plan.length,
        "seed": plan.seed,
        "tries": plan.tries,
        "device": subject.model.device.type,
        "rules": vars(plan.rules),
        "options": cell.options,
    }


def text_row(cell: Cell, model: str, found: Perplexity, full: Perplexity) -> Row:
    """Returns a row of `eval --task perplexity`: the family is the text; ratios are to the full cache."""
    row: Row = dict.fromkeys(KEYS)
    row |= {"method": cell.evaluated_method.name, "family": cell.family, "budget": cell.budget, "samples": 1}
    row |= {"kv_bytes_peak": found.peak, "kv_bytes_end": found.end, "kv_bytes_full": found.full}
    row |= {"loss_ratio": found.loss / full.loss, **_origin(cell, model)}
    return row | dict(zip(TEXT_KEYS, (found.value, found.value / full.value, found.num_tokens), strict=True))


def _origin(cell: Cell, model: str) -> Row:
    """Returns where a row comes from; `gates` is the hash of the trained part, null where there is none, as in the log."""
    return {
        "budget_share": cell.asked if is_share(cell.asked) else None,
        "kind": cell.evaluated_method.kind,
        "gates_of": None if cell.evaluated_method.gates is None else cell.evaluated_method.method,
        "gates": cell.identity.get("gates"),
        "model": model,
    }


def _teacher(log: SampleLog, cell: Cell, plan: Plan) -> Row:
    key, seeds = cell.key("teacher"), plan.seeds
    right, seen = log.column(key, seeds, "right"), log.column(key, seeds, "seen")
    loss = log.column(key, seeds, "loss")
    if right is None or seen is None or loss is None:
        return {}
    accuracy = metrics.step_accuracy(right, seen)
    reference = log.column(Key(FULL, cell.family, FULL, "teacher"), seeds, "loss")
    ratio = metrics.ratio(loss, reference).value if reference else None
    return {
        "step_accuracy": accuracy.value,
        "ci_low": accuracy.low,
        "ci_high": accuracy.high,
        "loss_ratio": ratio,
        **_bytes(log, key, seeds),
    }


def _oracle(log: SampleLog, cell: Cell, plan: Plan) -> Row:
    """Returns how close to the oracle, see ORACLE_KEYS."""
    key, seeds = cell.key("teacher"), plan.seeds

    def ratio(above: str, below: str) -> float | None:
        top, bottom = log.column(key, seeds, above), log.column(key, seeds, below)
        return sum(top) / sum(bottom) if top and bottom and sum(bottom) else None

    least = log.column(key, seeds, "attention_least")
    losses = [log.column(replace(key, method=name), seeds, "loss") for name in (key.method, RANDOM, GOLDEN)]
    method, chance, best = (None if one is None else sum(one) for one in losses)
    closed = None
    if cell.budget is not None and method is not None and chance is not None and best is not None and chance != best:
        closed = (chance - method) / (chance - best)
    found = (
        closed, ratio("wanted_kept", "wanted"), ratio("cost", "least_cost"), ratio("attention_kept", "queries"),
        min(least) if least else None,
    )  # fmt: skip
    return dict(zip(ORACLE_KEYS, found, strict=True))


def _free(log: SampleLog, cell: Cell, plan: Plan) -> Row:
    key, seeds = cell.key("free"), plan.seeds
    exact, tokens = log.column(key, seeds, "exact"), log.column(key, seeds, "tokens")
    seconds, agreed = log.column(key, seeds, "seconds"), log.column(key, seeds, "agreed")
    if exact is None or tokens is None or seconds is None:
        return {}
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
    return {
        "kv_bytes_peak": round(max(entry["peak"] for entry in found)),
        "kv_bytes_end": round(sum(entry["end"] for entry in found) / len(found)),
        "kv_bytes_full": round(sum(entry["full"] for entry in found) / len(found)),
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the file by these rows, one JSON object a line.

    Raises:
        DataError: it cannot be written.
    """
    write(path, "".join(json.dumps(_finite(row)) + "\n" for row in rows), MARK)


def read_earlier(path: Path | None, *, resume: bool) -> list[Row]:
    """Returns rows of an earlier run that a run is going to keep; [] where nothing is yet.

    Raises:
        UsageError: the file holds something, and the run is not to go on with it.
        DataError: it holds something else than rows.
    """
    try:
        if path is None or special(path) or not path.exists() or (path.is_file() and not path.stat().st_size):
            return []
    except OSError as error:
        raise DataError(f"cannot write {str(path)!r}: {error.strerror}; choose another --out") from error
    if not resume:
        raise UsageError(
            f"{path} holds something already; choose another --out, or go on with a run of the testbed (--resume)"
        )
    try:
        return read_rows(path)
    except DataError as error:
        raise DataError(f"{error}; choose another --out") from error


def joined(earlier: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Returns rows of both; a newer one takes the place of the first older one of its cell, and no other is lost."""
    fresh = {place(row): row for row in rows}
    kept = [fresh.pop(place(row), row) for row in earlier]
    return [*kept, *fresh.values()]


def place(row: Row) -> tuple[Any, ...]:
    """Returns the cell of a row: family, method, budget in slots and as a share."""
    return tuple(row.get(name) for name in ("family", "method", "budget", "budget_share"))


def place_of(cell: Cell) -> tuple[Any, ...]:
    """Returns the same of a cell that is to be run."""
    return cell.family, cell.evaluated_method.name, cell.budget, cell.asked if is_share(cell.asked) else None


def forget_rows(path: Path, name: str) -> int:
    """Drops the rows of one method, and of its settings tried in tuning, from a file; how many there were.

    Raises:
        DataError: the file cannot be read or written, or holds something else.
    """
    if not path.exists() or not path.stat().st_size:
        return 0
    rows = read_rows(path)
    kept = [row for row in rows if row["method"].split(" ")[0] != name]
    write_rows(path, kept)
    return len(rows) - len(kept)


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
    except (ValueError, TypeError) as error:
        raise DataError(f"{str(path)!r} is neither JSON lines nor a report: {error}") from error
    except RecursionError as error:
        raise DataError(f"{str(path)!r} is neither JSON lines nor a report: brackets are nested too deeply") from error
    if not isinstance(rows, list) or not rows or not all(map(_is_row, rows)):
        raise DataError(f"{str(path)!r} holds no rows of an evaluation; each needs the keys {', '.join(KEYS)}")
    for row in rows:
        odd = [name for name in NUMBERS if not isinstance(row.get(name), (int, float, type(None)))]
        if odd:
            raise DataError(f"{odd[0]} of a row in {str(path)!r} is no number: {row[odd[0]]!r}")
    return rows


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and {"method", "family", "budget"} <= set(row)


def _finite(row: Mapping[str, Any]) -> Row:
    """Returns the row with null for NaN and infinity, which are no JSON."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
