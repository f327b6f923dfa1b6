"""The sections of docs/results.md for one comparison: an overview over all families, and each family behind a fold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from learnevict import methods, testbed
from learnevict.evals import tuning
from learnevict.evals.metrics import SMALLEST_GAP, Estimate, signed
from learnevict.evals.records import Row
from learnevict.evals.report import ORACLE, grid, in_order, provenance, show_accuracy, show_exact, show_oracle, table
from learnevict.testbed.vocabulary import VALUES
from tools.results.records import Records

LEXICAL = "lexical"
START = "-sl"
"""The end of the name of supervised gates, beside the ones refined from them."""
SHORT = {"learned": 4, "heuristic": 2}
"""Methods of each kind in the first table, beside the full cache, golden, random and lexical."""
Best = Callable[[str, str], str | None]


def by_budget(first: str, names: Iterable[str], budgets: Sequence[str], cell: Callable[[str, str], str]) -> str:
    """Returns a table, names down and budgets across, without lines that say nothing."""
    lines = [[name, *(cell(name, budget) for budget in budgets)] for name in names]
    lines = [line for line in lines if set(line[1:]) != {"–"}]
    return table([first, *budgets], lines) if lines else ""


def mean(results: Records, method: str, budget: str, mode: str) -> Estimate | None:
    """Returns a method's mean over families; that of the full cache at every budget."""
    whole = any(row["budget"] is None for row in results.rows if row["method"] == method)
    return results.mean(method, None if whole else budget, mode)


def short_table(results: Records) -> list[str]:
    """Returns the table that opens the page: the best methods of each kind and the baselines."""
    found = {name: [mean(results, name, budget, "teacher") for budget in results.budgets] for name in results.methods()}
    figures = {name: [one.value for one in line if one] for name, line in found.items()}
    ranking = sorted(
        (name for name, line in figures.items() if line and len(line) == len(results.budgets)),
        key=lambda name: -sum(figures[name]),
    )
    chosen = {"full", "golden", "random", LEXICAL}
    for kind, most in SHORT.items():
        of_kind = [name for name in ranking if name in results.methods(kind) and name not in (*chosen, *tuning.TABLES)]
        chosen |= set(of_kind[:most])
    lines = [[name, *(f"{value:.3f}" for value in figures[name])] for name in ranking if name in chosen]
    if not lines or not results.budgets:
        return []
    return [
        f"Step accuracy on held-out samples, mean over {len(results.families)} families: "
        "the full cache, golden eviction, the best four learned methods, the best two heuristics and two baselines. All "
        "methods, with intervals, are under [Same rules for all](#same-rules-for-all).",
        table(["method", *results.budgets], lines),
    ]


def overview(results: Records, mode: str) -> list[str]:
    """Returns the mean over families, methods down and budgets across; and which methods are missing."""
    over = f"mean over {len(results.families)} families ({', '.join(results.families)})"
    said = f"Step accuracy, {over}; 95 % bootstrap intervals. One of no width says that no sample had an error, not that none "
    said += "could have."
    if mode == "free":
        said = (
            f"Exact match of the final answer, {over}; 95 % Wilson intervals, for as many answers as all have together."
        )

    def cell(method: str, budget: str) -> str:
        return str(mean(results, method, budget, mode) or "–")

    found = by_budget("method", results.methods(), results.budgets, cell) if results.budgets else ""
    return [said, found, *notes(results)] if found else []


def notes(results: Records) -> list[str]:
    """Says which methods could not take part, and why."""
    there = {name for row in results.rows for name in (row["method"], row.get("gates_of"))}
    if len(results.methods()) < len(methods.METHODS) // 2:  # a table of some methods only
        return []
    absent = [name for name in methods.METHODS if methods.load(name).PAPER.kind == "learned" and name not in there]
    cells: dict[str, list[str]] = {}
    for row in results.rows:
        if row.get("impossible"):
            cells.setdefault(row["method"], []).append(f"{row['family']} {row['budget_share'] or row['budget']}")
    said = [f"No gates, so not here: {', '.join(absent)}."] if absent else []
    return said + [
        f"{method} cannot be held to {', '.join(where)}: guards and fresh block leave one of its layers no slot."
        for method, where in cells.items()
    ]


def folded(title: str, parts: Sequence[str]) -> str:
    """Returns parts that open on a click."""
    body = "\n\n".join(part for part in parts if part)
    return f'<details markdown="1">\n<summary>{title}</summary>\n\n{body}\n\n</details>'


def family_parts(results: Records, family: str, mode: str, best: Best | None) -> list[str]:
    """Returns all numbers of one family."""
    rows = [row for row in results.rows if row["family"] == family]
    parts = [provenance(rows)]
    if mode == "free":
        devices = " and ".join(dict.fromkeys(row.get("device", "cpu").upper() for row in rows))
        together = f"batches of at most {results.batch} samples" if results.batch else "batches"
        speed = (
            "Tokens per second / KiB of keys and values per sample at the peak. Tokens per second are of a single pass in "
            f"{together} on a shared {devices}, beside whatever else ran there: no benchmark, and no ground to compare methods "
            "on. Medians of interleaved runs are under [Speed and memory](#speed-and-memory)."
        )
        parts += ["Exact match, 95 % Wilson interval (mean tokens generated).", grid(rows, show_exact)]
        return [*parts, speed, grid(rows, lambda row: _beside_bytes(row, "tokens_per_second", ".0f"))]
    parts += ["Step accuracy, 95 % bootstrap interval over samples.", grid(rows, show_accuracy)]
    parts.append("Loss over that with the full cache / KiB of keys and values per sample at the peak.")
    parts.append(grid(rows, lambda row: _beside_bytes(row, "loss_ratio", ".3g")))
    if any(show_oracle(row) for row in rows):
        parts += [ORACLE, grid(rows, show_oracle)]
    if best is not None and any(row["method"] == "golden" for row in rows):

        def cell(method: str, budget: str) -> str:
            base = best(family, budget)
            return f"{show(results.recovery(method, {family: base}, budget))} from {base}" if base else "not tuned"

        parts += [
            "Recovery, from which heuristic to golden.",
            by_budget("method", rivals(results), results.budgets, cell),
        ]
    return parts


def _beside_bytes(row: Row, name: str, how: str) -> str:
    if row.get(name) is None:
        return "not possible" if row.get("impossible") else ""
    return f"{row[name]:{how}} / " + ("–" if row.get("kv_bytes_peak") is None else f"{row['kv_bytes_peak'] / 1024:.0f}")


def rivals(results: Records) -> list[str]:
    """Returns the learned methods without the baseline they have to beat."""
    return [name for name in results.methods("learned") if name != LEXICAL]


def recovery_tables(results: Records, tuned: tuning.Tuned | None) -> list[str]:
    """Returns how far learned methods go from the best heuristic, and from lexical, to golden, pooled over families."""
    parts = ["### Recovery, from the best heuristic to golden"]
    if tuned is None:
        parts.append("Not shown: heuristics have not been tuned (recipes/evaluate.py --stage tune).")
    else:
        parts.append(
            "(method - best) / (golden - best) in step accuracy (not the loss recovered from random to golden that `learnevict "
            "eval` and evaluations during training show); best is the training-free method that was best on "
            f"validation seeds, random among them. Cells whose gap is below {SMALLEST_GAP} are not scored. Pooled: the sum of "
            "the scored families' differences over the sum of their gaps, so a family counts as much as its gap is wide; "
            "how many of the five it holds stands behind it, and below the table which are left out."
        )
        parts += pooled_table(results, tuned.known_best)
    if LEXICAL in results.methods():

        def above(method: str, budget: str) -> str:
            found = results.test(method, LEXICAL, results.families, budget, "teacher")
            return "–" if found is None else show(found[0])

        parts += ["The same from lexical to golden:", *pooled_table(results, lambda family, budget: LEXICAL)]
        parts += ["Step accuracy above lexical, paired, mean over families:"]
        parts.append(by_budget("method", rivals(results), results.budgets, above))
    return parts


def pooled_table(results: Records, best: Best) -> list[str]:
    """Returns learned methods down, budgets across; then which families each budget leaves out."""
    left: dict[str, list[str]] = {}

    def cell(method: str, budget: str) -> str:
        named = {family: best(family, budget) for family in results.families}
        bases = {family: base for family, base in named.items() if base is not None}
        absent = {one: "not tuned" if one in named else "not run" for one in testbed.FAMILIES if one not in bases}
        absent |= results.left_out(method, bases, budget)
        if absent:
            reasons = ", ".join(f"{family} ({reason})" for family, reason in absent.items())
            left.setdefault(f"{budget}: {reasons}", []).append(method)
        num = len({*testbed.FAMILIES, *bases}) - len(absent)
        return f"{show(results.recovery(method, bases, budget))} ({num})"

    parts = [by_budget("method", rivals(results), results.budgets, cell)]
    said = [at if len(who) == len(rivals(results)) else f"{at} ({', '.join(who)})" for at, who in left.items()]
    return [*parts, f"Left out: {'; '.join(said)}."] if said else parts


def show(estimate: Estimate) -> str:
    """Returns a figure with its interval."""
    return "not scored" if math.isnan(estimate.value) else str(estimate)


def refined_pairs(results: Records) -> list[tuple[str, str]]:
    """Returns gates refined by reinforcement, each with its supervised start."""
    learned = results.methods("learned")
    return [(name, name + START) for name in learned if name + START in learned]


def refined_tables(main: Records | None, free: Records | None) -> list[str]:
    """Returns what refinement by reinforcement adds to its supervised start: paired differences with p-values."""
    parts: list[str] = []
    for title, results, mode in (("step accuracy", main, "teacher"), ("exact match, free generation", free, "free")):
        for name, start in refined_pairs(results) if results else ():
            parts += [f"{name} minus {start}, {title}:", _refined(results, (name, start), mode)]
    if not parts:
        return []
    said = (
        "Paired by sample, with 95 % intervals; p is the share of 10,000 bootstrap draws in which refinement does not help "
        "(one-sided; at least 0.0001). The last line is the mean over families, resampled within each."
    )
    return ["## Refined against its supervised start", said, *parts]


def _refined(results: Records, pair: tuple[str, str], mode: str) -> str:
    def cell(family: str, budget: str) -> str:
        found = results.test(*pair, results.families if family == "all" else [family], budget, mode)
        return "–" if found is None else f"{signed(found[0])}, p = {found[1]:.4f}"

    return by_budget("family", [*results.families, "all"], results.budgets, cell)


def recall_line(results: Records) -> str:
    """Says how learned methods do on recall at 1/4, where random should be at chance."""
    random = results.row("random", "recall", "1/4")
    learned = [row for name in results.methods("learned") if (row := results.row(name, "recall", "1/4"))]
    if random is None or not learned:
        return ""
    shown = ", ".join(f"{row['method']} {row['exact_match']:.3f}" for row in learned)
    return (
        f"Recall at 1/4, exact match: {shown}; random {random['exact_match']:.3f}. One word guessed among "
        f"{len(VALUES)} is right with {1 / len(VALUES):.3f}, a whole answer hardly ever."
    )


def agreement_line(results: Records) -> str:
    """Says how far golden's second text follows the one its labels were made from."""
    rows = [row for row in results.rows if row.get("agreement") is not None]
    if not rows:
        return ""
    mean, fully = (sum(row[name] for row in rows) / len(rows) for name in ("agreement", "agreed_fully"))
    return (
        f"Golden runs twice; its second text follows the first for {100 * mean:.0f} % of its tokens on average, and to "
        f"the end in {100 * fully:.0f} % of samples. After leaving it, recency decides."
    )


def full_cache_table(found: dict[str, Records]) -> str:
    """Returns exact match with the full cache, family by family."""
    rows = [row for name in ("free", "main") if name in found for row in found[name].rows if row["method"] == "full"]
    full = [row for row in rows if row["exact_match"] is not None]
    lines: list[list[str]] = []
    for family in in_order(full, "family"):
        row = next(row for row in full if row["family"] == family)
        steps = [one["step_accuracy"] for one in rows if one["family"] == family and one["step_accuracy"] is not None]
        shown = f"{steps[0]:.3f}" if steps else "–"
        lines.append(
            [family, f"{row['exact_match']:.3f}", shown, f"{row['tokens_generated']:.0f}", str(row["samples"])]
        )
    header = ["family", "exact match", "step accuracy", "tokens generated", "samples"]
    return "## The testbed with its full cache\n\n" + table(header, lines) if full else ""
