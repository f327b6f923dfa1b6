"""docs/results.md, its plots and the README's method table, from JSON rows: no number in the docs is typed by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

from learnevict import methods, testbed
from learnevict.errors import DataError
from learnevict.evals import tuning
from learnevict.evals.benchmarks import benchmark_tables
from learnevict.evals.metrics import SMALLEST_GAP, Estimate
from learnevict.evals.plots import plot
from learnevict.evals.report import grid, in_order, provenance, show_accuracy, show_exact, table
from learnevict.evals.results import Results, read_results
from learnevict.evals.rows import Row
from learnevict.hub import weight_hash
from learnevict.testbed.vocabulary import VALUES

START, STOP = "<!-- methods:start (scripts/write_tables) -->", "<!-- methods:end -->"
HEADER = "<!-- Written by scripts/write_tables from docs/results/. Do not edit. -->"
TITLES = {
    "main": ("Same rules for all", "Event period 16, 4 sinks, 8 recent tokens, no prompt protection."),
    "published": (
        "Each method's own window",
        "Event period 16, sinks and recent window as each method has them by default.",
    ),
    "prompt": (
        "Prompt protected",
        "The prompt stays and budgets count the rest. Answers of recall and dialogue are too short to evict from.",
    ),
    "long": ("Longer than trained", "Texts longer than any that the base model or a gate has seen."),
    "free": (
        "Free generation",
        "The model reads its own words; exact match of the final answer with its 95 % Wilson interval (and mean tokens "
        "generated).",
    ),
}


def write_results(results: Path, docs: Path, benchmarks: Path, tuned: tuning.Tuned | None = None) -> list[Path]:
    """Write docs/results.md and one plot per table.

    Args:
        results: a folder per table (see TITLES) with JSONL rows.
        docs: where results.md goes.
        benchmarks: JSON files of benchmarks; may be missing.
        tuned: names the best heuristic of every cell; without it no gap is shown.

    Raises:
        DataError: nothing to show, files that cannot be read, or results of different weights or tasks.
    """
    found = {name: read_results(sorted_rows(results / name)) for name in TITLES if sorted_rows(results / name)}
    if not found:
        raise DataError(f"no results in {str(results)!r}: run recipes/evaluate.py first")
    parts, written = [HEADER, "# Results", full_cache_table(found)], []
    check_same_origin([*found.values()], tuned)
    for name, part in found.items():
        parts += section(name, part, tuned)
        if any(row["budget"] is not None for row in part.rows):
            written.append(plot(part.rows, docs / f"results-{name}.png"))
            parts.append(f"![accuracy against budget](results-{name}.png)")
    parts += benchmark_tables(benchmarks)
    written.append(docs / "results.md")
    written[-1].write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return written


def check_same_origin(found: list[Results], tuned: tuning.Tuned | None) -> None:
    """All numbers of the page belong to the same weights and the same tasks.

    Raises:
        DataError: some are stale.
    """
    records = [record for results in found for record in results.configurations] + ([tuned.record] if tuned else [])
    for name in ("weights", "tasks"):
        values = {record[name] for record in records}
        if len(values) > 1:
            raise DataError(f"results of different {name} ({', '.join(sorted(values))}); run recipes/evaluate.py anew")


def check_bundled(results: Path) -> None:
    """The page is about the model that ships: rows of earlier weights are stale.

    Raises:
        DataError: some rows belong to other weights or tasks.
    """
    expected = {"weights": weight_hash(testbed.load()[0]), "tasks": testbed.fingerprint()}
    for name in TITLES:
        files = sorted_rows(results / name)
        for record in read_results(files).configurations if files else []:
            stale = [key for key, value in expected.items() if record[key] != value]
            if stale:
                raise DataError(
                    f"rows in {str(results / name)!r} belong to other {' and '.join(stale)} than the bundled model's; run "
                    "recipes/evaluate.py anew"
                )


def sorted_rows(folder: Path) -> list[Path]:
    """Row files of one table, families in their usual order."""
    order = {family: index for index, family in enumerate(testbed.FAMILIES)}
    files = [path for path in folder.glob("*.jsonl") if not path.name.endswith(".samples.jsonl")]
    return sorted(files, key=lambda path: (order.get(path.stem, len(order)), path.name))


def section(name: str, results: Results, tuned: tuning.Tuned | None) -> list[str]:
    """One table of comparisons with what follows from it."""
    title, rules = TITLES[name]
    parts = [f"## {title}", rules]
    measure = show_exact if name == "free" else show_accuracy
    if name != "free":
        parts.append("Step accuracy with its 95 % bootstrap interval over samples.")
    for family in results.families:
        rows = [row for row in results.rows if row["family"] == family]
        parts += [f"### {title}: {family}", provenance(rows), grid(rows, measure)]
    if name == "main":
        parts += gap_tables(results, tuned)
    if name == "free":
        parts.append(recall_line(results))
        parts.append(agreement_line(results))
    return parts


def full_cache_table(found: dict[str, Results]) -> str:
    """Exact match with the full cache, family by family."""
    rows = [row for name in ("free", "main") if name in found for row in found[name].rows]
    full = [row for row in rows if row["method"] == "full" and row["exact_match"] is not None]
    lines: list[list[str]] = []
    for family in in_order(full, "family"):
        row = next(row for row in full if row["family"] == family)
        measured = [other["step_accuracy"] for other in rows if _is_full(other, family)]
        shown = next((f"{value:.3f}" for value in measured if value is not None), "–")
        lines.append(
            [family, f"{row['exact_match']:.3f}", shown, f"{row['tokens_generated']:.0f}", str(row["samples"])]
        )
    header = ["family", "exact match", "step accuracy", "tokens generated", "samples"]
    return "## The testbed with its full cache\n\n" + table(header, lines) if full else ""


def _is_full(row: Row, family: str) -> bool:
    return row["method"] == "full" and row["family"] == family


def gap_tables(results: Results, tuned: tuning.Tuned | None) -> list[str]:
    """How much of the way to golden learned methods go, from the best heuristic and from lexical."""
    parts = ["### Gap closed"]
    if tuned is None:
        parts.append("Not shown: heuristics have not been tuned (recipes/evaluate.py --stage tune).")
    else:
        parts.append(
            "(method - best) / (golden - best) in step accuracy; best is the training-free method that was best on "
            f"validation seeds, random among them. Cells whose gap is below {SMALLEST_GAP} are not scored. The pooled line "
            "divides the sum of the scored families' differences by the sum of their gaps, so a family counts as much "
            "as its gap is wide; how many of the five it holds stands behind it, and below it which are left out."
        )
        parts.append(_gap_table(results, tuned.best))
    if "lexical" in results.methods():
        parts += ["The same from lexical:", _gap_table(results, lambda family, budget: "lexical")]
        parts += ["Step accuracy above lexical, paired:", _difference_table(results, "lexical")]
    return parts


def _gap_table(results: Results, best: Callable[[str, str], str]) -> str:
    lines: list[list[str]] = []
    notes: list[str] = []
    for method in [name for name in results.methods("learned") if name != "lexical"]:
        for family in results.families:
            bases = [(budget, best(family, budget)) for budget in results.budgets]
            closed = [(results.gap_closed(method, {family: base}, budget), base) for budget, base in bases]
            cells = [_show(one) + ("" if base == "lexical" else f" from {base}") for one, base in closed]
            lines.append([method, family, *cells])
        pooled = [_pooled(results, method, best, budget) for budget in results.budgets]
        lines.append([method, "pooled", *(shown for shown, _ in pooled)])
        notes += [
            f"{method} at {budget}: {left}" for budget, (_, left) in zip(results.budgets, pooled, strict=True) if left
        ]
    shown = table(["method", "family", *results.budgets], lines)
    return shown + (f"\n\nLeft out of the pooled line: {'; '.join(notes)}." if notes else "")


def _pooled(results: Results, method: str, best: Callable[[str, str], str], budget: str) -> tuple[str, str]:
    """The gap closed over all families with how many of them it holds, and which it leaves out, with the reason."""
    bases = {family: best(family, budget) for family in results.families}
    left = {family: "not run" for family in testbed.FAMILIES if family not in bases}
    left |= results.left_out(method, bases, budget)
    num = len({*testbed.FAMILIES, *bases})
    shown = f"{_show(results.gap_closed(method, bases, budget))} ({num - len(left)} of {num} families)"
    return shown, ", ".join(f"{family} ({reason})" for family, reason in left.items())


def _difference_table(results: Results, other: str) -> str:
    lines: list[list[str]] = []
    for method in [name for name in results.methods("learned") if name != other]:
        for family in results.families:
            found = [results.difference(method, other, family, budget) for budget in results.budgets]
            lines.append([method, family, *("–" if one is None else _show(one) for one in found)])
    return table(["method", "family", *results.budgets], lines)


def _show(estimate: Estimate) -> str:
    return "not scored" if math.isnan(estimate.value) else str(estimate)


def recall_line(results: Results) -> str:
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


def agreement_line(results: Results) -> str:
    """How far golden's second text follows the one its labels were made from."""
    rows = [row for row in results.rows if row.get("agreement") is not None]
    if not rows:
        return ""
    mean, fully = (sum(row[name] for row in rows) / len(rows) for name in ("agreement", "agreed_fully"))
    return (
        f"Golden runs twice; its second text follows the first for {100 * mean:.0f} % of its tokens on average, and to "
        f"the end in {100 * fully:.0f} % of samples. After leaving it, recency decides."
    )


def method_table() -> str:
    """The registered methods as a Markdown table."""
    lines: list[list[str]] = []
    for name in methods.METHODS:
        module = methods.load(name)
        first = " ".join((module.__doc__ or "").split("\n\n")[0].split())
        said = re.sub(r"\s*\(arXiv [^)]*\)", "", first.partition(": ")[2] or first).rstrip(".")
        paper = module.PAPER
        link = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv}), {paper.year}" if paper.arxiv else "–"
        lines.append([f"`{name}`", said, link, paper.kind])
    return table(["method", "what it is", "paper", "kind"], lines)


def write_method_table(readme: Path) -> bool:
    """Replace what stands between the markers; False if the page has none.

    Raises:
        DataError: the page cannot be read or written.
    """
    try:
        text = readme.read_text(encoding="utf-8")
        if START not in text or STOP not in text:
            return False
        before, after = text.split(START)[0], text.split(STOP)[1]
        readme.write_text(f"{before}{START}\n{method_table()}\n{STOP}{after}", encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {str(readme)!r}: {error.strerror}") from error
    return True


def main() -> None:
    """Regenerate everything, from the repository's root."""
    root = Path(__file__).resolve().parents[2]
    readme = root / "README.md"
    changed = write_method_table(readme)
    written = [readme] if changed else []
    if any(sorted_rows(root / "docs" / "results" / name) for name in TITLES):
        tuned = tuning.load() if tuning.TUNED.exists() else None
        check_bundled(root / "docs" / "results")
        written += write_results(root / "docs" / "results", root / "docs", root / "benchmarks" / "results", tuned)
    for path in written:
        print(path.relative_to(root))  # noqa: T201 - a program that says what it wrote


if __name__ == "__main__":
    main()
