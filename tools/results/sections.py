"""What docs/results.md says of one comparison: an overview over all families, and each family behind a fold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from learnevict import methods, testbed
from learnevict.evals import tuning
from learnevict.evals.metrics import SMALLEST_GAP, Estimate
from learnevict.evals.records import Records
from learnevict.evals.report import (
    ORACLE,
    grid,
    in_order,
    provenance,
    show_accuracy,
    show_exact,
    show_oracle,
    table,
)
from learnevict.evals.summaries import Row
from learnevict.testbed.vocabulary import VALUES

START = "-sl"
"""What the name of supervised gates ends in, beside the refined ones."""
LEXICAL = "lexical"
Best = Callable[[str, str], str | None]


def overview(results: Records, mode: str) -> list[str]:
    """Mean over families, methods down and budgets across; who is missing."""
    lines: list[list[str]] = []
    for method in results.methods():
        if any(row["budget"] is None for row in results.rows if row["method"] == method):
            found = [results.mean(method, None, mode)] * len(results.budgets)
        else:
            found = [results.mean(method, budget, mode) for budget in results.budgets]
        if any(one is not None for one in found):
            lines.append([method, *("–" if one is None else str(one) for one in found)])
    if not lines or not results.budgets:
        return []
    over = f"mean over {len(results.families)} families ({', '.join(results.families)})"
    if mode == "free":
        said = (
            f"Exact match of the final answer, {over}; 95 % Wilson intervals, for as many answers as all have together."
        )
    else:
        said = f"Step accuracy, {over}; 95 % bootstrap intervals. One of no width says that no sample had an error, not that "
        said += "none could have."
    return [said, table(["method", *results.budgets], lines), *notes(results)]


def notes(results: Records) -> list[str]:
    """Who could not take part, and why."""
    there = {row.get("gates_of") or row["method"] for row in results.rows}
    if len(results.methods()) < len(methods.METHODS) // 2:  # a table of some methods only
        return []
    absent = [name for name in methods.METHODS if methods.load(name).PAPER.kind == "learned" and name not in there]
    cells: dict[str, list[str]] = {}
    for row in results.rows:
        if row.get("impossible"):
            cells.setdefault(row["method"], []).append(f"{row['family']} {row['budget_share'] or row['budget']}")
    said = [f"No gates, so not here: {', '.join(absent)}."] if absent else []
    for method, where in cells.items():
        said.append(
            f"{method} cannot be held to {', '.join(where)}: guards and fresh block leave one of its layers no slot."
        )
    return said


def folded(title: str, parts: Sequence[str]) -> str:
    """Parts that open on a click."""
    body = "\n\n".join(part for part in parts if part)
    return f"<details>\n<summary>{title}</summary>\n\n{body}\n\n</details>"


def family_parts(results: Records, family: str, mode: str, best: Best | None) -> list[str]:
    """All numbers of one family."""
    rows = [row for row in results.rows if row["family"] == family]
    parts = [provenance(rows)]
    if mode == "free":
        parts += ["Exact match, 95 % Wilson interval (mean tokens generated).", grid(rows, show_exact)]
        return [*parts, _about_speed(rows, results.batch), grid(rows, _speed)]
    parts += ["Step accuracy, 95 % bootstrap interval over samples.", grid(rows, show_accuracy)]
    parts += ["Loss over that with the full cache / KiB of keys and values per sample at the peak.", grid(rows, _cost)]
    if any(show_oracle(row) for row in rows):
        parts += [ORACLE, grid(rows, show_oracle)]
    if best is not None and any(row["method"] == "golden" for row in rows):
        lines = [
            [method, *(_from(results, method, best(family, budget), family, budget) for budget in results.budgets)]
            for method in rivals(results)
        ]
        parts += ["Gap closed, and from which heuristic.", table(["method", *results.budgets], lines)]
    return parts


def _about_speed(rows: Sequence[Row], batch: int) -> str:
    """What tokens per second are worth; rows that name no device come from a CPU."""
    devices = " and ".join(dict.fromkeys(row.get("device", "cpu").upper() for row in rows))
    together = f"batches of at most {batch} samples" if batch else "batches"
    return (
        "Tokens per second / KiB of keys and values per sample at the peak. Tokens per second are of a single pass in "
        f"{together} on a shared {devices}, beside whatever else ran there: no benchmark, and no ground to compare methods on. "
        "Medians of interleaved runs are under [Speed and memory](#speed-and-memory)."
    )


def _speed(row: Row) -> str:
    if row.get("tokens_per_second") is None:
        return _impossible(row)
    return f"{row['tokens_per_second']:.0f} / {_kib(row)}"


def _cost(row: Row) -> str:
    if row.get("loss_ratio") is None:
        return _impossible(row)
    return f"{row['loss_ratio']:.3g} / {_kib(row)}"


def _kib(row: Row) -> str:
    return "–" if row.get("kv_bytes_peak") is None else f"{row['kv_bytes_peak'] / 1024:.0f}"


def _impossible(row: Row) -> str:
    return "not possible" if row.get("impossible") else ""


def _from(results: Records, method: str, base: str | None, family: str, budget: str) -> str:
    if base is None:
        return "not tuned"
    closed = results.gap_closed(method, {family: base}, budget)
    return f"{show(closed)} from {base}"


def rivals(results: Records) -> list[str]:
    """Learned methods, but for the baseline they have to beat."""
    return [name for name in results.methods("learned") if name != LEXICAL]


# --- gap closed ---


def gap_tables(results: Records, tuned: tuning.Tuned | None) -> list[str]:
    """How much of the way to golden learned methods go, pooled over families, from the best heuristic and from lexical."""
    parts = ["### Gap closed"]
    if tuned is None:
        parts.append("Not shown: heuristics have not been tuned (recipes/evaluate.py --stage tune).")
    else:
        parts.append(
            "(method - best) / (golden - best) in step accuracy (not the loss gap closed from random that `learnevict eval` "
            "and evaluations during training show); best is the training-free method that was best on "
            f"validation seeds, random among them. Cells whose gap is below {SMALLEST_GAP} are not scored. Pooled: the sum of "
            "the scored families' differences over the sum of their gaps, so a family counts as much as its gap is wide; "
            "how many of the five it holds stands behind it, and below the table which are left out."
        )
        parts += pooled_table(results, tuned.known_best)
    if LEXICAL in results.methods():
        parts += ["The same from lexical:", *pooled_table(results, lambda family, budget: LEXICAL)]
        parts += ["Step accuracy above lexical, paired, mean over families:", _difference_table(results)]
    return parts


def pooled_table(results: Records, best: Best) -> list[str]:
    """Learned methods down, budgets across; then which families each budget leaves out."""
    lines: list[list[str]] = []
    left: dict[str, list[str]] = {}
    for method in rivals(results):
        cells: list[str] = []
        for budget in results.budgets:
            shown, missing = pooled(results, method, best, budget)
            cells.append(shown)
            if missing:
                left.setdefault(f"{budget}: {missing}", []).append(method)
        lines.append([method, *cells])
    parts = [table(["method", *results.budgets], lines)]
    everybody = len(rivals(results))
    if said := [at if len(who) == everybody else f"{at} ({', '.join(who)})" for at, who in left.items()]:
        parts.append(f"Left out: {'; '.join(said)}.")
    return parts


def pooled(results: Records, method: str, best: Best, budget: str) -> tuple[str, str]:
    """The gap closed over all families with how many of them it holds, and which it leaves out, with the reason."""
    named = {family: best(family, budget) for family in results.families}
    bases = {family: base for family, base in named.items() if base is not None}
    left = {family: "not tuned" if family in named else "not run" for family in testbed.FAMILIES if family not in bases}
    left |= results.left_out(method, bases, budget)
    num = len({*testbed.FAMILIES, *bases})
    shown = f"{show(results.gap_closed(method, bases, budget))} ({num - len(left)})"
    return shown, ", ".join(f"{family} ({reason})" for family, reason in left.items())


def _difference_table(results: Records) -> str:
    lines: list[list[str]] = []
    for method in rivals(results):
        found = [results.test(method, LEXICAL, results.families, budget, "teacher") for budget in results.budgets]
        lines.append([method, *("–" if one is None else show(one[0]) for one in found)])
    return table(["method", *results.budgets], lines)


def show(estimate: Estimate) -> str:
    """A figure with its interval."""
    return "not scored" if math.isnan(estimate.value) else str(estimate)


# --- refinement ---


def refined_tables(main: Records | None, free: Records | None) -> list[str]:
    """What refinement by reinforcement adds to its supervised start: paired differences with p-values."""
    parts: list[str] = []
    for title, results, mode in (("step accuracy", main, "teacher"), ("exact match, free generation", free, "free")):
        if results is None:
            continue
        for name in results.methods("learned"):
            if name + START in results.methods():
                parts += [f"{name} minus {name}{START}, {title}:", _refined(results, name, mode)]
    if not parts:
        return []
    said = (
        "Paired by sample, with 95 % intervals; p is the share of 10,000 bootstrap draws in which refinement does not help "
        "(one-sided; at least 0.0001). The last line is the mean over families, resampled within each."
    )
    return ["## Refined against its supervised start", said, *parts]


def _refined(results: Records, name: str, mode: str) -> str:
    lines: list[list[str]] = []
    for title, families in [*((family, [family]) for family in results.families), ("all", results.families)]:
        found = [results.test(name, name + START, families, budget, mode) for budget in results.budgets]
        lines.append([title, *("–" if one is None else _tested(*one) for one in found)])
    return table(["family", *results.budgets], lines)


def _tested(apart: Estimate, p: float) -> str:
    return f"{apart.value:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}], p = {p:.4f}"


# --- free generation ---


def recall_line(results: Records) -> str:
    """Learned methods on recall at 1/4, where random should be at chance."""
    random = results.row("random", "recall", "1/4")
    learned = [row for name in results.methods("learned") if (row := results.row(name, "recall", "1/4"))]
    if random is None or not learned:
        return ""
    chance = 1 / len(VALUES)
    shown = ", ".join(f"{row['method']} {row['exact_match']:.3f}" for row in learned)
    return (
        f"Recall at 1/4, exact match: {shown}; random {random['exact_match']:.3f}. One word guessed among "
        f"{len(VALUES)} is right with {chance:.3f}, a whole answer hardly ever."
    )


def agreement_line(results: Records) -> str:
    """How far golden's second text follows the one its labels were made from."""
    rows = [row for row in results.rows if row.get("agreement") is not None]
    if not rows:
        return ""
    mean, fully = (sum(row[name] for row in rows) / len(rows) for name in ("agreement", "agreed_fully"))
    return (
        f"Golden runs twice; its second text follows the first for {100 * mean:.0f} % of its tokens on average, and to "
        f"the end in {100 * fully:.0f} % of samples. After leaving it, recency decides."
    )


def full_cache_table(found: dict[str, Records]) -> str:
    """Exact match with the full cache, family by family."""
    rows = [row for name in ("free", "main") if name in found for row in found[name].rows]
    full = [row for row in rows if row["method"] == "full" and row["exact_match"] is not None]
    lines: list[list[str]] = []
    for family in in_order(full, "family"):
        row = next(row for row in full if row["family"] == family)
        same = [other for other in rows if (other["method"], other["family"]) == ("full", family)]
        shown = next((f"{one['step_accuracy']:.3f}" for one in same if one["step_accuracy"] is not None), "–")
        lines.append(
            [family, f"{row['exact_match']:.3f}", shown, f"{row['tokens_generated']:.0f}", str(row["samples"])]
        )
    header = ["family", "exact match", "step accuracy", "tokens generated", "samples"]
    return "## The testbed with its full cache\n\n" + table(header, lines) if full else ""
