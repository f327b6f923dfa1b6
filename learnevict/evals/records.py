"""Rows summed from a per-sample log: what each method reached on each task at each budget.

Reports, cards and docs/results.md are made of files of rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from learnevict.errors import DataError
from learnevict.evals import metrics
from learnevict.evals.methods import FULL, GOLDEN, RANDOM
from learnevict.evals.plan import Cell, EvaluatedModel, Key, Plan
from learnevict.evals.sample_log import SampleLog
from learnevict.evals.tasks import SHARED_MODES
from learnevict.files import write
from learnevict.hub.card_tables import check_row

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

NATS_KEYS = ("nats", "added_nats", "added_low", "added_high")
"""What rows measured along reference texts have besides: loss per token, and how much more it is than that of the full cache
on the same samples, with its interval; null without the full cache's."""

SCORE_KEYS = ("score", "score_low", "score_high")
"""What rows of graded tasks have besides: the mean score of free answers, which may be shares of a right one."""

TEXT_KEYS = ("perplexity", "perplexity_ratio", "num_tokens")
"""What rows of `eval --task perplexity` have besides."""
NUMBERS = (*KEYS[3:], *ORACLE_KEYS, *NATS_KEYS, *SCORE_KEYS, *TEXT_KEYS, "exact_low", "exact_high")
TOGETHER = {
    "step_accuracy": ("ci_low", "ci_high"), "exact_low": ("exact_high",), "score_low": ("score_high",),
    "perplexity": ("perplexity_ratio",),
    "top_recall": ("attention_kept",),
}  # fmt: skip
"""Figures that reports show together: a row that has the first has the others."""

Row = dict[str, Any]
MARK = b'"kv_bytes_peak": '
"""What every file of rows has near its beginning."""


def make_row(log: SampleLog, cell: Cell, plan: Plan, subject: EvaluatedModel) -> Row:
    """Returns the figures of a cell: KEYS and ORACLE_KEYS, then where the row comes from."""
    row = start_row(cell, plan.num_samples)
    for figures in (_teacher(log, cell, plan), _free(log, cell, plan), _oracle(log, cell, plan), _own(log, cell, plan)):
        row |= figures
    if cell.impossible is not None:
        row["impossible"] = cell.impossible
    return row | {
        **source(cell, subject.name),
        **{name: value for name, value in plan.tasks[0].origin.items() if name != "tasks"},
        "seed": plan.seed,
        "tries": plan.tries,
        "device": subject.model.device.type,
        "rules": plan.settings.recorded,
        "allocation": cell.evaluated_method.rules(plan.settings).allocated,
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
    found = log.columns(key, seeds, "right", "seen", "loss", "spoken")
    if found is None:
        return {}
    right, seen, loss, spoken = found
    accuracy = metrics.step_accuracy(right, seen)
    full = log.column(Key(FULL, cell.family, FULL, "teacher"), seeds, "loss")
    return {
        "step_accuracy": accuracy.value,
        "ci_low": accuracy.low,
        "ci_high": accuracy.high,
        "loss_ratio": metrics.ratio(loss, full).value if full else None,
        **dict(zip(NATS_KEYS, _nats(loss, full, spoken), strict=True)),
        **_bytes(log, key, seeds),
    }


def _nats(loss: list[float], full: list[float] | None, spoken: list[float]) -> tuple[float | None, ...]:
    """Returns NATS_KEYS."""
    own = metrics.ratio(loss, spoken).value
    if full is None:
        return own, None, None, None
    added = metrics.ratio([mine - least for mine, least in zip(loss, full, strict=True)], spoken)
    return own, added.value, added.low, added.high


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
    if (scores := log.column(key, seeds, "score")) is not None:
        score = metrics.share(scores)
        row |= dict(zip(SCORE_KEYS, (score.value, score.low, score.high), strict=True))
    if agreed is not None:
        row |= {"agreement": sum(agreed) / len(agreed), "agreed_fully": sum(a == 1 for a in agreed) / len(agreed)}
    return row


def _own(log: SampleLog, cell: Cell, plan: Plan) -> Row:
    """Returns the share of right answers in each of the task's own modes; that of its first mode is `exact_match`."""
    row: Row = {}
    seeds = plan.seeds
    for mode in [mode for mode in cell.modes if mode not in SHARED_MODES]:
        if (exact := log.column(cell.key(mode), seeds, "exact")) is None:
            continue
        share = metrics.share(exact)
        row |= {f"exact_{mode}": share.value, f"{mode}_low": share.low, f"{mode}_high": share.high}
        if "exact_match" not in row:
            tokens = log.column(cell.key(mode), seeds, "tokens")
            row |= {"exact_match": share.value, "exact_low": share.low, "exact_high": share.high}
            row |= {"tokens_generated": metrics.mean(tokens or []).value, **_bytes(log, cell.key(mode), seeds)}
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
        DataError: no such file, not JSON, no rows, texts where figures should be, or a figure without those shown with it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read rows from {str(path)!r}: {error}") from error
    rows: Any = []
    try:
        whole = json.loads(text) if text.lstrip().startswith("{") and "\n{" not in text.strip() else None
        rows = (
            whole["rows"]
            if whole and "rows" in whole
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{str(path)!r} is neither JSON lines nor a report: {error}") from error
    known = {"method", "family", "budget"}
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and known <= set(row) for row in rows):
        raise DataError(f"{str(path)!r} holds no rows of an evaluation; each needs the keys {', '.join(KEYS)}")
    for number, row in enumerate(rows, 1):
        check_row(row, NUMBERS, f"in {str(path)!r}")
        _check_whole(row, f"row {number} of {str(path)!r} ({row['method']})")
    return rows


def _check_whole(row: Row, which: str) -> None:
    for name, others in TOGETHER.items():
        if row.get(name) is not None and (lost := [other for other in others if row.get(other) is None]):
            raise DataError(
                f"{which} has {name} but no {lost[0]}; add it, or write the rows anew with `learnevict eval`"
            )
