"""Files of benchmarks/ and scripts/gpu as tables: figures with quartiles, ratios, goals met and missed, and where measured."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from learnevict.errors import DataError
from learnevict.evals.report import table

Content = dict[str, Any]
QUARTILES = {"median", "q1", "q3", "n"}
ROOT = Path(__file__).resolve().parents[2]
ORACLE = ("learnevict/oracle", "learnevict/ops")
CACHE = (
    "learnevict/infer", "learnevict/methods", "learnevict/ops", "learnevict/parts", "learnevict/policy",
    "learnevict/signals.py",
)  # fmt: skip
MEASURED = {"labels": ORACLE, "labelling": (*ORACLE, "learnevict/train", "recipes/oracle.py")}
"""What a benchmark times; all others time the cache and who governs it."""


def benchmark_tables(folder: Path) -> list[str]:
    """Returns the tables of every JSON file of a folder; [] if there is none.

    Raises:
        DataError: a file that no benchmark has written.
    """
    parts = [part for path in sorted(folder.glob("*.json")) for part in file_tables(path)]
    if not parts:
        return []
    return ["## Speed and memory", "Figures are medians, with quartiles in parentheses.", *parts]


def file_tables(path: Path) -> list[str]:
    """Returns the tables of one file.

    Raises:
        DataError: no benchmark has written it.
    """
    parts: list[str] = []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for name, status, result in results_in(path.stem, content):
            parts += [f"### {name}", *([status] if status else []), *(section(result) if result else [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{str(path)!r} is no file of a benchmark ({type(error).__name__}: {error})") from error
    return parts


def results_in(name: str, content: Content) -> Iterator[tuple[str, str, Content | None]]:
    """Yields title, what went wrong if anything did, and content of each benchmark in a file; scripts/gpu writes several."""
    if "parts" not in content:
        yield name, "", content
        return
    for part, run in content["parts"].items():
        status = "" if run["status"] == "ok" else f"This part {run['status']}."
        yield f"{name}: {part}", status, run["result"]


def section(content: Content) -> list[str]:
    """Returns caption, warning and tables of one benchmark."""
    parts = [caption(content), *age(content)]
    rows = content["rows"]
    if rows and "ok" in rows[0]:
        parts.append(law_table(rows))
    elif rows:
        parts.append(rows_table(rows))
    if prompts := content.get("prompts"):
        parts += ["Reading the prompts:", rows_table(prompts)]
    if ratios := content.get("ratios"):
        parts += ["Ratios:", transposed(ratios)]
    if goals := content.get("goals"):
        parts += ["Goals:", goals_table(goals)]
    return parts


def caption(content: Content) -> str:
    """Returns machine, commit and configuration in words."""
    machine = content["machine"]
    threads = f"{machine['threads']} {'thread' if machine['threads'] == 1 else 'threads'}"
    where = f"{machine['gpu']} (host: {machine['cpu']})" if machine["gpu"] else f"{machine['cpu']}, {threads}"
    said = [f"{where}; torch {machine['torch']}, transformers {machine['transformers']}; commit {content['commit']}."]
    if content["smoke"]:
        said.append("A smoke run: the same code, no figures of worth.")
    if not content["finished"]:
        said.append("Interrupted: not all repetitions.")
    if left := content.get("cells_left"):
        said.append(f"{left} cells were not tried for lack of time.")
    if content.get("kernels"):
        said.append("Through the Triton kernels.")
    return " ".join([*said, f"Configuration: {words(content['config'])}."])


def age(content: Content) -> list[str]:
    """Returns a warning if the code that was measured has changed since, or if that cannot be known."""
    commit, name = content["commit"], content.get("benchmark", "")
    measured = (*MEASURED.get(name, CACHE), f"benchmarks/{name}.py", *(["kernels"] if content.get("kernels") else []))
    changed = changed_since(commit, measured)
    if changed is None:
        return [f"Whether the code has changed since commit {commit} cannot be told here: its history is missing."]
    return [f"**Older than the code**: since commit {commit} {', '.join(changed)} changed; run it again."] * bool(
        changed
    )


def changed_since(commit: str, paths: tuple[str, ...]) -> list[str] | None:
    """Returns those of some paths in the repository that differ from a commit; None without the commit."""
    known = re.match(r"[0-9a-f]{7,40}\b", commit)
    if known is None:
        return None
    command = ["git", "diff", "--name-only", known[0], "--", *paths]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    files = done.stdout.splitlines()
    return [path for path in paths if any(file == path or file.startswith(f"{path}/") for file in files)]


def words(config: Content) -> str:
    """Returns settings as prose: "budget 512, contexts 1024 8192"; what a nested one holds stands beside the rest."""
    said: list[str] = []
    for name, value in config.items():
        if isinstance(value, dict):
            said.append(words(value))
        else:
            said.append(f"{name.replace('_', ' ')} {' '.join(map(str, value)) if isinstance(value, list) else value}")
    return ", ".join(said)


def rows_table(rows: list[Content]) -> str:
    """Returns objects as a Markdown table, a column per key."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return table([key.replace("_", " ") for key in keys], [[cell(row.get(key)) for key in keys] for row in rows])


def transposed(rows: list[Content]) -> str:
    """Returns the same with a column per object, named by its first key: for keys that are sentences."""
    first = next(iter(rows[0]))
    keys = list(dict.fromkeys(key for row in rows for key in row if key != first))
    return table(
        ["", *(str(row[first]) for row in rows)], [[key, *(cell(row.get(key)) for row in rows)] for key in keys]
    )


def goals_table(goals: list[Content]) -> str:
    """Returns what was to be reached, what was measured, and whether that meets it."""
    lines = [[g["goal"], cell(g["measured"]), cell(g["at_most"]), "yes" if g["met"] else "**missed**"] for g in goals]
    return table(["goal", "measured", "at most", "met"], lines)


def law_table(rows: list[Content]) -> str:
    """Returns, of each law, how many cells hold, and every one that does not."""
    lines: list[list[str]] = []
    for law, dtype in dict.fromkeys((row["law"], row["dtype"]) for row in rows):
        mine = [row for row in rows if (row["law"], row["dtype"]) == (law, dtype)]
        wrong = [f"{row['method']} on {row['model']}" for row in mine if not row["ok"]]
        notes = wrong + [row["note"] for row in mine if row["note"].startswith("not run")]
        worst = max(row["error"] for row in mine)
        lines.append([law, dtype, f"{len(mine) - len(wrong)} of {len(mine)}", cell(worst), ", ".join(notes) or "–"])
    return table(["law", "dtype", "holds", "largest error", "broken"], lines)


def cell(value: Any) -> str:
    """Returns one figure: "1.25 (1.2–1.31)" where quartiles are known."""
    if value is None:
        return "–"
    if isinstance(value, dict) and set(value) == QUARTILES:
        spread = "" if value["n"] == 1 else f" ({value['q1']:.4g}–{value['q3']:.4g})"
        return f"{value['median']:.4g}{spread}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
