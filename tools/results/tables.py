"""Writes docs/results.md, its plots and the README's method table from JSON rows: no number there is typed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from learnevict import methods, testbed
from learnevict.errors import DataError
from learnevict.evals import tuning
from learnevict.evals.margin import margin_tables
from learnevict.evals.plots import plot
from learnevict.evals.report import table
from learnevict.files import write
from learnevict.hub import GATES_FOLDER, Gates, weight_hash
from tools.results.ablations import ablation_table, plot_curves, plot_training, read_variants
from tools.results.benchmarks import benchmark_tables
from tools.results.goals import EQUAL, goal_tables
from tools.results.label_table import TriedLabels, label_tables
from tools.results.records import Records, read_results
from tools.results.sections import (
    START,
    agreement_line,
    family_parts,
    folded,
    full_cache_table,
    overview,
    recall_line,
    recovery_tables,
    refined_pairs,
    refined_tables,
    short_table,
)

METHODS = "<!-- methods:start (scripts/write_tables) -->", "<!-- methods:end -->"
REAL = "<!-- tables:start (scripts/write_tables) -->", "<!-- tables:end -->"
HEADER = "<!-- Written by scripts/write_tables from docs/results/. Do not edit. -->"
LEGEND = (
    "Budgets are shares of a family's mean length, in slots per layer and kv head. Methods are named in the README, learned "
    "ones after the gates that ship with the package (`learnevict/gates/testbed-NAME`). Families open on a click."
)
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
    "free": ("Free generation", "The model reads the text it generates."),
}


def write_results(results: Path, docs: Path, benchmarks: Path, tuned: tuning.Tuned | None = None) -> list[Path]:
    """Writes docs/results.md and one plot per table, and returns their paths.

    Args:
        results: a folder per table (see TITLES) with JSONL rows; labels.json and ablations.json if they were made.
        docs: where results.md goes.
        benchmarks: JSON files of benchmarks; may be missing.
        tuned: names the best heuristic of every cell; without it no recovery is shown.

    Raises:
        DataError: nothing to show, files that cannot be read, or results of different weights, tasks or gates.
    """
    found = {name: read_results(sorted_rows(results / name)) for name in TITLES if sorted_rows(results / name)}
    if not found:
        raise DataError(f"no results in {str(results)!r}: run recipes/evaluate.py first")
    check_same_origin([*found.values()], tuned)
    names = {name for part in found.values() for name in part.methods("learned")}
    plots = {
        name: plot(part.rows, docs / f"results-{name}.png")
        for name, part in found.items()
        if any(row["budget"] is not None for row in part.rows)
    }
    images = {name: f"![accuracy against budget]({path.name})" for name, path in plots.items()}
    written, main = [*plots.values()], found.get("main")
    parts: list[str] = [HEADER, "# Results", images.pop("main", "")]
    parts += short_table(main) if main else []
    parts += [" ".join([LEGEND, *who_is_who(names)]), full_cache_table(found)]
    parts += goal_tables(main, found.get("free"), tuned) if main else []
    for name, part in found.items():
        parts += [*section(name, part, tuned), images.get(name, "")]
        if name == "main":
            parts += refined_tables(part, found.get("free"))
            for refined, _ in refined_pairs(part):
                curve = plot_training(GATES_FOLDER / f"testbed-{refined}" / "run.json", docs / "training.png")
                if curve is not None:
                    written.append(curve)
                    parts.append(f"![cost and entropy against steps]({curve.name})")
    if (ablations := results / "ablations.json").exists():
        variants = read_variants(ablations)
        written.append(plot_curves(variants, docs / "ablations.png"))
        parts += ["## What each part of refinement buys", ablation_table(variants)]
        parts.append("![cost against steps](ablations.png)")
    if (labels := results / "labels.json").exists():
        parts += label_tables(TriedLabels.open(labels))
    parts += benchmark_tables(benchmarks)
    written.append(docs / "results.md")
    write(written[-1], "\n\n".join(part for part in parts if part) + "\n", HEADER.encode())
    return written


def who_is_who(names: Collection[str], gates: Path = GATES_FOLDER) -> list[str]:
    """Says what stands behind names that are no method's, or not only; layer budgets as the gates' settings have them."""
    said: list[str] = []
    known = set(methods.METHODS)
    for name in sorted(name for name in names if name + START in names):
        learned = gates_config(gates, name).get("settings", {}).get("demand")
        shares = (
            "share the budget as learned in refinement (gates setting `demand`)" if learned else "have equal shares"
        )
        said.append(f"{name} is the scorer refined by reinforcement, and its layers {shares}.")
        said.append(f"{name + START} is the supervised scorer that refinement started from, with equal shares.")
        if name + EQUAL in names:
            said.append(f"{name + EQUAL} was refined with equal shares.")
        known |= {name, name + START, name + EQUAL}
    for name in sorted(set(names) - known):
        said.append(f"{name} are gates of {gates_config(gates, name).get('method', 'a method unknown here')}.")
    return said


def gates_config(gates: Path, name: str) -> dict[str, Any]:
    """Returns the config.json of gates that ship; nothing if there are none of that name."""
    config = gates / f"testbed-{name}" / "config.json"
    return json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}


def check_same_origin(found: list[Records], tuned: tuning.Tuned | None) -> None:
    """Checks that all numbers belong to the same weights and tasks, and all of one name to the same gates.

    Raises:
        DataError: some are stale.
    """
    records = [record for results in found for record in results.configurations] + ([tuned.record] if tuned else [])
    for name in ("weights", "tasks"):
        values = {record[name] for record in records}
        if len(values) > 1:
            raise DataError(f"results of different {name} ({', '.join(sorted(values))}); run recipes/evaluate.py anew")
    gates = {name: {one} for name, one in (tuned.record.get("gates", {}) if tuned else {}).items()}
    for name, hashes in (item for results in found for item in results.gates.items()):
        gates.setdefault(name, set()).update(hashes)
    if mixed := {name: hashes for name, hashes in gates.items() if len(hashes) > 1}:
        said = "; ".join(f"{name}: {', '.join(sorted(hashes))}" for name, hashes in mixed.items())
        raise DataError(
            f"results of different gates under one name ({said}); run recipes/evaluate.py --replace {next(iter(mixed))}"
        )


def check_bundled(results: Path) -> None:
    """Checks that rows belong to the model and the gates that ship; rows of earlier ones are stale.

    Raises:
        DataError: some rows belong to other weights, tasks or gates.
    """
    model, _ = testbed.load()
    expected = {"weights": weight_hash(model), "tasks": testbed.fingerprint()}
    shipped = {one.name.removeprefix("testbed-"): one for one in GATES_FOLDER.glob("testbed-*")}
    hashes = {name: weight_hash(Gates.load(folder, model)) for name, folder in shipped.items()}
    for name in TITLES:
        files = sorted_rows(results / name)
        found = read_results(files) if files else Records()
        stale = {key for record in found.configurations for key, value in expected.items() if record[key] != value}
        stale |= {f"gates of {one}" for one, ran in found.gates.items() if ran != {hashes.get(one)}}
        if stale:
            raise DataError(
                f"rows in {str(results / name)!r} belong to other {' and '.join(sorted(stale))} than those that ship; run "
                "recipes/evaluate.py anew, for gates with --replace NAME"
            )


def sorted_rows(folder: Path) -> list[Path]:
    """Returns the row files of one table, families in their usual order."""
    order = {family: index for index, family in enumerate(testbed.FAMILIES)}
    files = [path for path in folder.glob("*.jsonl") if not path.name.endswith(".samples.jsonl")]
    return sorted(files, key=lambda path: (order.get(path.stem, len(order)), path.name))


def section(name: str, results: Records, tuned: tuning.Tuned | None) -> list[str]:
    """Returns one table of comparisons with what follows from it."""
    title, rules = TITLES[name]
    mode = "free" if name == "free" else "teacher"
    parts = [f"## {title}", rules, *overview(results, mode)]
    if name == "main":
        parts += recovery_tables(results, tuned)
    if name == "free":
        parts += [recall_line(results), agreement_line(results)]
    best = tuned.known_best if tuned is not None and name == "main" else None
    return parts + [folded(family, family_parts(results, family, mode, best)) for family in results.families]


def method_table() -> str:
    """Returns the registered methods as a Markdown table."""
    lines: list[list[str]] = []
    for name in methods.METHODS:
        module = methods.load(name)
        first = " ".join((module.__doc__ or "").split("\n\n")[0].split())
        said = re.sub(r"\s*\(arXiv [^)]*\)", "", first.partition(": ")[2] or first).rstrip(".")
        paper = module.PAPER
        link = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv}), {paper.year}" if paper.arxiv else "–"
        lines.append([f"`{name}`", said, link, paper.group])
    return table(["method", "what it is", "paper", "kind"], lines)


def real_tables(folders: list[Path]) -> str:
    """Returns what evaluations of pretrained models leave to be learned, and their allocations, in Markdown."""
    pages = [(folder.name, margin_tables(sorted_rows(folder)).strip()) for folder in folders]
    return "\n\n".join(
        f"### {name}\n\n" + re.sub("^## ", "#### ", page, flags=re.MULTILINE) for name, page in pages if page
    )


def write_between(page: Path, marks: tuple[str, str], content: str) -> bool:
    """Replaces what stands between two markers of a page; returns False if the page has none.

    Raises:
        DataError: the page cannot be read or written.
    """
    first, last = marks
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {str(page)!r}: {error.strerror}") from error
    if first not in text or last not in text:
        return False
    write(page, f"{text.split(first)[0]}{first}\n{content}\n{last}{text.split(last)[1]}", first.encode())
    return True


def main() -> None:
    """Regenerates everything, from the repository's root."""
    root = Path(__file__).resolve().parents[2]
    readme, real = root / "README.md", root / "docs" / "real-models.md"
    written = [readme] if write_between(readme, METHODS, method_table()) else []
    folders = sorted(path for path in (root / "docs" / "results" / "real").iterdir() if path.is_dir())
    written += [real] if write_between(real, REAL, real_tables(folders)) else []
    if any(sorted_rows(root / "docs" / "results" / name) for name in TITLES):
        tuned = tuning.load() if tuning.TUNED.exists() else None
        check_bundled(root / "docs" / "results")
        written += write_results(root / "docs" / "results", root / "docs", root / "benchmarks" / "results", tuned)
    for path in written:
        print(path.relative_to(root))  # noqa: T201 - a program that says what it wrote


if __name__ == "__main__":
    main()
