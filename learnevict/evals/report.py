"""Rows into what people read: Markdown, CSV and a plot of accuracy against budget."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from learnevict.evals.plots import KNOWN, NATS, Measure, plot
from learnevict.evals.records import KEYS, ORACLE_KEYS, SCORE_KEYS, TEXT_KEYS, Row
from learnevict.files import MARKDOWN, PICTURE, check, write, writing
from learnevict.untrusted import one_line, spreadsheet_cell

PICTURES: dict[str, Measure | None] = {"accuracy.png": None, "known.png": KNOWN, "nats.png": NATS}
"""What is drawn against budget: step accuracy or exact match; exact match where the question is known; added nats."""


def write_report(rows: Sequence[Row], folder: Path, margin: str = "", *, overwrite: bool | None = None) -> list[Path]:
    """Writes table.md, table.csv, and a picture of each measure that rows with a budget have.

    Args:
        rows: of evaluations.
        folder: made if there is none; an earlier report in it is replaced.
        margin: Markdown that stands first, see evals.margin.
        overwrite: replace files of others too; None: the program has no such flag.

    Raises:
        DataError: the folder cannot be written, or files of these names are somebody else's; then none is written.
        UsageError: matplotlib is not installed.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    page, sheet, header = folder / "table.md", folder / "table.csv", ",".join(KEYS).encode()
    drawn = {folder / name: (one, found) for name, one in PICTURES.items() if (found := _drawn(rows, one))}
    for path, mark in ((page, MARKDOWN), (sheet, header), *((path, PICTURE) for path in drawn)):
        check(path, mark, overwrite=overwrite)
    said = f"{MARKDOWN.decode()} report. -->\n\n"
    write(page, said + "\n".join(part for part in (margin, markdown(rows)) if part), MARKDOWN, overwrite=overwrite)
    write(sheet, comma_separated(rows), header, overwrite=overwrite)
    pictures = [plot(found, path, measure, overwrite=overwrite) for path, (measure, found) in drawn.items()]
    return [page, sheet, *pictures]


def _drawn(rows: Sequence[Row], measure: Measure | None) -> list[Row]:
    """Returns the rows that a picture shows; none if there is none with a budget."""
    names = [measure[0]] if measure else ["step_accuracy", "exact_match"]
    found = [row for row in rows if any(row.get(name) is not None for name in names)]
    return found if any(row.get("budget") is not None for row in found) else []


def comma_separated(rows: Sequence[Row]) -> str:
    """Returns all rows as CSV: the common keys, and those of oracle, scores and texts if any; an empty field is null."""
    text = io.StringIO()
    others = (*ORACLE_KEYS, *SCORE_KEYS, *TEXT_KEYS)
    columns: list[str] = [*KEYS, *(key for key in others if any(_has(row, key) for row in rows))]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: spreadsheet_cell(row.get(key)) for key in columns} for row in rows)
    return text.getvalue()


def _has(row: Row, key: str) -> bool:
    return row.get(key) is not None


def markdown(rows: Sequence[Row]) -> str:
    """Returns a table per family and measure: methods down, budgets across."""
    parts: list[str] = []
    for family in in_order(rows, "family"):
        mine = [row for row in rows if row["family"] == family]
        parts.append(f"## {one_line(family)}\n\n{provenance(mine)}")
        for title, measure in MEASURES.items():
            if any(measure(row) for row in mine):
                parts.append(f"{title}\n\n{grid(mine, measure)}")
    return "\n\n".join(parts) + "\n"


def provenance(rows: Sequence[Row]) -> str:
    """Returns one line: model, samples and split or the length of the text, budgets in tokens."""
    first = rows[0]
    tokens = {budget_label(row): row["budget"] for row in rows if row.get("budget") is not None}
    budgets = ", ".join(one_line(f"{label} = {value} slots") for label, value in tokens.items() if str(value) != label)
    where = f"{first.get('samples')} samples, {first.get('split', 'test')} split"
    if first.get("num_tokens") is not None:
        where = f"{first['num_tokens']} tokens predicted"
    return f"Model {one_line(first.get('model', '?'))}, {one_line(where)}{'; ' + budgets if budgets else ''}."


def grid(rows: Sequence[Row], measure: Callable[[Row], str]) -> str:
    """Returns a Markdown table of one family: methods down, budgets across, the full cache in a row of its own."""
    budgets = in_order([row for row in rows if row.get("budget") is not None], budget_label)
    lines: list[list[str]] = []
    for method in in_order(rows, "method"):
        mine = {budget_label(row): measure(row) for row in rows if row["method"] == method}
        if None in mine:
            lines.append([one_line(method), *([mine[None] or "–"] * max(len(budgets), 1))][: len(budgets) + 1])
        else:
            lines.append([one_line(method), *(mine.get(budget) or "–" for budget in budgets)])
    if not budgets:
        return table(["method", "full cache"], [[one_line(row["method"]), measure(row)] for row in rows])
    return table(["method", *map(one_line, budgets)], lines)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def in_order(rows: Sequence[Row], key: str | Callable[[Row], Any]) -> list[Any]:
    """Returns distinct values in order of appearance."""
    return list(dict.fromkeys(key(row) if callable(key) else row[key] for row in rows))


def budget_label(row: Row) -> str | None:
    """Returns a budget as it was asked for: "1/4", "64" or "25%"; None for the full cache."""
    if row.get("budget") is None:
        return None
    return row.get("budget_share") or str(row["budget"])


def show_accuracy(row: Row) -> str:
    """Returns step accuracy with its interval."""
    if row.get("step_accuracy") is None:
        return ""
    return f"{row['step_accuracy']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"


def show_exact(row: Row) -> str:
    """Returns exact match with its interval, and tokens generated."""
    if row.get("exact_match") is None:
        return ""
    text = f"{row['exact_match']:.3f}"
    if row.get("exact_low") is not None:
        text += f" [{row['exact_low']:.3f}, {row['exact_high']:.3f}]"
    return text + (f" ({row['tokens_generated']:.0f})" if row.get("tokens_generated") is not None else "")


def show_score(row: Row) -> str:
    """Returns the mean score with its interval."""
    if row.get("score") is None:
        return ""
    return f"{row['score']:.3f}" + (
        f" [{row['score_low']:.3f}, {row['score_high']:.3f}]" if _has(row, "score_low") else ""
    )


def show_perplexity(row: Row) -> str:
    """Returns perplexity of a text, and its ratio to the full cache's."""
    if row.get("perplexity") is None:
        return ""
    return f"{row['perplexity']:.3f} ({row['perplexity_ratio']:.3f})"


def show_loss(row: Row) -> str:
    """Returns loss ratio to the full cache."""
    return "" if row.get("loss_ratio") is None else f"{row['loss_ratio']:.3g}"


def show_oracle(row: Row) -> str:
    """Returns recall, regret and attention kept."""
    if row.get("top_recall") is None:
        return ""
    regret = "–" if row.get("regret") is None else f"{row['regret']:.2f}"
    return f"{row['top_recall']:.3f} / {regret} / {row['attention_kept']:.3f}"


def show_bytes(row: Row) -> str:
    """Returns most bytes held, and those of a full cache."""
    if None in (row.get("kv_bytes_peak"), row.get("kv_bytes_full")):
        return ""
    return f"{row['kv_bytes_peak'] / 1024:.0f} of {row['kv_bytes_full'] / 1024:.0f}"


EXACT = (
    "Exact match of the final answer in free generation; 95 % Wilson interval, bootstrap where tries are averaged (and mean "
    "tokens generated)."
)
ORACLE = (
    "Beside the oracle: recall of the tokens it would keep / attention lost over all budgets by the order of scores, over the "
    "least possible / share of the full cache's attention that falls on tokens still held."
)
MEASURES: dict[str, Callable[[Row], str]] = {
    "Step accuracy: reference text, checked tokens only; 95 % bootstrap interval over samples.": show_accuracy,
    EXACT: show_exact,
    "Score: the mean over answers, which may be partly right; 95 % interval over samples.": show_score,
    "Perplexity of the text (over that with the full cache).": show_perplexity,
    "Loss of the response over that with the full cache.": show_loss,
    ORACLE: show_oracle,
    "KiB of keys and values per sample: peak, of a full cache's.": show_bytes,
}
