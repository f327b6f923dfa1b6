"""Rows of an evaluation as a card shows them: tables for people, a model index for the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from learnevict.config import Budget
from learnevict.errors import BudgetError, DataError, UsageError
from learnevict.hub.run_record import last_part
from learnevict.infer.model.catalogue import HUB_ID
from learnevict.untrusted import one_line

NONE = "–"
Row = Mapping[str, Any]
TEXTS = ("family", "model", "split", "length")
"""What the same texts, read by the same model, have in common; the full cache is the same under any budget and settings."""
CELL = (*TEXTS, "budget", "rules")
MEASURE = "`learnevict eval --ckpt GATES --out ROWS` measures them"

# Metric of the Hub: (name of a row's value, its interval, what to call it).
METRICS = {
    "accuracy": ("step_accuracy", ("ci_low", "ci_high"), "step accuracy"),
    "exact_match": ("exact_match", ("exact_low", "exact_high"), "exact match"),
    "perplexity": ("perplexity", (), "perplexity"),
}

HEADER = (
    "family", "budget", "step accuracy", "exact match", "full cache", "best heuristic measured", "golden eviction",
    "peak bytes, of full",
)  # fmt: skip
FIGURES = (
    "step_accuracy", "ci_low", "ci_high", "exact_match", "exact_low", "exact_high", "perplexity",
    "perplexity_ratio", "num_tokens", "samples", "kv_bytes_peak", "kv_bytes_full",
)  # fmt: skip


def check_row(row: Row, figures: Sequence[str], where: str) -> None:
    """Refuses a row whose budget is none, or whose names are no texts and figures no numbers; `where` ends "a row ...".

    Raises:
        DataError: naming what is wrong.
    """
    try:
        Budget.parse(1 if row["budget"] is None else row["budget"])  # slots, 25% or 64MiB
    except BudgetError as error:
        raise DataError(f"a row {where}: {error}") from error
    kinds = {"method": str, "family": str, "budget_share": str | None, "rules": Mapping | None}
    for name, kind in kinds.items():
        if not isinstance(row.get(name), kind):
            what = "holds no settings" if name == "rules" else "is no text"
            raise DataError(f"{name} of a row {where} {what}: {row.get(name)!r}")
    odd = [name for name in figures if not isinstance(row.get(name), (int, float, type(None)))]
    if odd:
        raise DataError(f"{odd[0]} of a row {where} is no number: {row[odd[0]]!r}")


def join(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns one row per measured cell, whose step accuracy and exact match come from different runs; DataError: no rows."""
    cells: dict[str, dict[str, Any]] = {}
    for row in rows:
        if not {"method", "family", "budget"} <= set(row):
            raise DataError(
                "a row of an evaluation needs method, family and budget; `learnevict eval --out` writes such rows"
            )
        check_row(row, FIGURES, f"of {row['method']}")
        names = ("method", "gates", "budget_share", *CELL)
        cell = cells.setdefault(json.dumps([row.get(name) for name in names], sort_keys=True), dict(row))
        cell.update({name: value for name, value in row.items() if cell.get(name) is None})
    return list(cells.values())


def of_gates(rows: Sequence[Row], method: str, gates: str) -> list[Row]:
    """Returns the rows that were measured with gates of this `weight_hash`, for several gates may share a method.

    Raises:
        UsageError: there are rows but none of these gates, or some do not say of which gates they are.
    """
    silent = [row for row in rows if method in (row["method"], row.get("gates_of")) and not row.get("gates")]
    if silent:
        raise UsageError(
            f"rows of {silent[0]['method']} do not say which {method} gates they are of, as those of older versions; {MEASURE} "
            "again"
        )
    found = [row for row in rows if row.get("gates") == gates]
    if rows and not found:
        others = {f"{row['method']} {str(row.get('gates') or '')[:8]}".rstrip() for row in rows}
        raise UsageError(
            f"the rows are of {', '.join(sorted(others))}, none of these gates ({method} {gates[:8]}); {MEASURE}"
        )
    return found


def results(mine: Sequence[Row]) -> list[EvalResult]:
    """Returns the model index: every metric of every cell."""
    found: list[EvalResult] = []
    for row in mine:
        for kind, (name, bounds, title) in METRICS.items():
            if row.get(name) is None:
                continue
            details: dict[str, Any] = {"budget": row["budget"], "samples": row.get("samples")}
            details |= {
                "budget_share": one_line(row["budget_share"]) if row.get("budget_share") else None,
                **{bound: row.get(bound) for bound in bounds},
            }
            texts = family(row)
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type="text" if kind == "perplexity" else "learnevict-testbed",
                    dataset_name=texts if kind == "perplexity" else f"learnevict testbed, {texts}",
                    dataset_config=one_line(Path(str(row["family"])).name),
                    dataset_split=one_line(row["split"]) if row.get("split") else None,
                    metric_type=kind,
                    metric_name=f"{title} at {budget(row)}",
                    metric_value=round(float(row[name]), 6),
                    metric_args={key: value for key, value in details.items() if value is not None},
                )
            )
    return found


def tables(mine: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """Returns Markdown tables of the gates' cells, with what other methods reached in the same cells."""
    tasks = [row for row in mine if row.get("perplexity") is None]
    texts = [row for row in mine if row.get("perplexity") is not None]
    made = [task_table(tasks, rows)] if tasks else []
    return made + ([text_table(texts)] if texts else [])


def task_table(mine: Sequence[Row], rows: Sequence[Row]) -> str:
    """Returns a table of accuracy by family and budget."""
    lines = [
        f"{terms(mine)} Square brackets: 95 % interval by bootstrap over samples (Wilson's for exact match). Step accuracy is "
        "on given texts, exact match on answers that the model wrote itself. The best heuristic is that of these very samples, "
        "which favours it.",
        "",
        f"| {' | '.join(HEADER)} |",
        "|" + "---|" * len(HEADER),
    ]
    for row in mine:
        others = [other for other in rows if _same(other, row, CELL)]
        heuristics = [other for other in others if other.get("kind") == "heuristic" and _score(other) is not None]
        best = max(heuristics, key=lambda other: _score(other) or 0.0, default=None)
        full = next((other for other in rows if other["method"] == "full" and _same(other, row, TEXTS)), None)
        golden = next((other for other in others if other["method"] == "golden"), None)
        cells = [
            family(row), budget(row), value(row, "accuracy"), value(row, "exact_match"), _shown(full),
            NONE if best is None else f"{one_line(best['method'])} {_shown(best)}", _shown(golden), _bytes(row),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def text_table(mine: Sequence[Row]) -> str:
    """Returns a table of perplexity."""
    lines = ["| text | tokens | budget | perplexity | ratio to the full cache |", "|---|---|---|---|---|"]
    for row in mine:
        ratio = row.get("perplexity_ratio")
        cells = [family(row), str(row.get("num_tokens") or NONE), budget(row), f"{row['perplexity']:.3f}"]
        lines.append(f"| {' | '.join(cells)} | {NONE if ratio is None else f'{ratio:.3f}'} |")
    return "\n".join(lines)


def terms(rows: Sequence[Row]) -> str:
    """Returns the settings of the cells, and where they differ every variant."""
    models = sorted({one_line(Path(str(row["model"])).name) for row in rows if row.get("model")})
    samples = sorted({int(row["samples"]) for row in rows if row.get("samples")})
    splits = sorted(
        {one_line(f"{row.get('split')} split, {row.get('length')} length") for row in rows if row.get("split")}
    )
    settings = sorted({_settings(row["rules"]) for row in rows if row.get("rules")})
    parts = ["Measured" + (f" on {' and '.join(models)}" if models else "")]
    parts += [" and ".join(splits)] if splits else []
    parts += [f"{' or '.join(map(str, samples))} samples a cell"] if samples else []
    return "; ".join([", ".join(parts), *settings]) + "."


def family(row: Row) -> str:
    """Returns a row's family or text for people, with the length of its texts where that is not the usual one."""
    unusual = row.get("length") not in (None, "normal")
    return one_line(Path(str(row["family"])).name) + (f", {one_line(row['length'])}" if unusual else "")


def budget(row: Row) -> str:
    """Returns a row's budget for people."""
    if row["budget"] is None:
        return "full cache"
    share = f" ({row['budget_share']} of the length)" if row.get("budget_share") else ""
    return one_line(f"{row['budget']}{' slots' * (not isinstance(row['budget'], str))}{share}")


def value(row: Row, kind: str) -> str:
    """Returns a metric with its interval."""
    name, bounds, _ = METRICS[kind]
    if row.get(name) is None:
        return NONE
    ends = [row.get(bound) for bound in bounds]
    interval = "" if None in ends else f" [{ends[0]:.3f}, {ends[1]:.3f}]"
    return f"{row[name]:.3f}{interval}"


def _same(other: Row, row: Row, names: Sequence[str]) -> bool:
    return all(other.get(name) == row.get(name) for name in names)


def _score(row: Row) -> float | None:
    return row.get("step_accuracy") if row.get("step_accuracy") is not None else row.get("exact_match")


def _shown(row: Row | None) -> str:
    score = None if row is None else _score(row)
    return NONE if score is None else f"{score:.3f}"


def _bytes(row: Row) -> str:
    peak, full = row.get("kv_bytes_peak"), row.get("kv_bytes_full")
    return f"{peak:,} of {full:,}" if peak and full else NONE


def _settings(settings: Mapping[str, Any]) -> str:
    names = {"slack": "an eviction every {} tokens", "sinks": "{} sinks", "recent": "the last {} tokens kept"}
    said = [text.format(one_line(settings[name])) for name, text in names.items() if settings.get(name) is not None]
    return ", ".join([*said, "prompt protected" if settings.get("prompt") else "prompt not protected"])


def shown(value: object) -> str:
    """Returns a value on one line of a table; of a path only its last part, since the rest is the machine's."""
    text = one_line(value)
    return last_part(text) if re.search(r"[/\\]", text) and not HUB_ID.fullmatch(text) else text
