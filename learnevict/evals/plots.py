"""A figure against budget: one panel a family, one line a method; the ones to look at are coloured and named at their end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learnevict.errors import UsageError
from learnevict.evals.records import Row
from learnevict.files import PICTURE, replacing
from learnevict.untrusted import one_line

STRONG = ("#0b6bcb", "#c2410c", "#7c3aed", "#0f766e")
BROWN = ("#92400e", "#b45309", "#a16207")
MUTED = ("#94a3b8", "#a8a29e", "#9ca3af", "#b6a58c", "#8fa89b", "#b39ab3", "#9fb1c9", "#c4a49a", "#a3b18a", "#b8b08d")
FEW = 12
"""Up to so many methods are all named."""
BASELINES = ("random", "lexical")
INK = "#1f2937"
NAMED = 1.1


Measure = tuple[str, str, str]
"""A figure of rows, and the ends of its interval."""
ACCURACY, EXACT = ("step_accuracy", "ci_low", "ci_high"), ("exact_match", "exact_low", "exact_high")
KNOWN, NATS = ("exact_known", "known_low", "known_high"), ("added_nats", "added_low", "added_high")


def plot(
    rows: Sequence[Row], path: Path, measure: Measure | None = None, *, title: str = "", overwrite: bool | None = None
) -> Path:
    """Draws a measure, otherwise step accuracy (or exact match where there is none), against slots kept, with intervals.

    Golden is the dashed reference, the full cache a dotted line, the best learned methods are coloured, the best heuristics
    brown, the others thin and muted; of many only the former, random and lexical are named.

    Raises:
        UsageError: matplotlib is not installed.
        DataError: the file cannot be written, or is somebody else's.
    """
    families = list(dict.fromkeys(row["family"] for row in rows))
    columns = min(3, len(families))
    lines = -(-len(families) // columns)
    figure, axes = figure_of(lines, columns, (5.2 * columns, 4.2 * lines))
    looks = styles(rows, measure)
    for axis, family in zip(axes.flat, families, strict=False):
        _panel(axis, family, [row for row in rows if row["family"] == family], looks, measure)
    for axis in axes.flat[len(families) :]:
        axis.set_visible(False)
    if title:
        figure.suptitle(title, color=INK)
    figure.tight_layout()
    return save_figure(figure, path, dpi=130, overwrite=overwrite)


def figure_of(lines: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """Returns a figure of pyplot, width and height in inches, and its panels [lines, columns].

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise UsageError("plots need matplotlib: pip install 'learnevict[report]'") from error
    return pyplot.subplots(lines, columns, figsize=size, squeeze=False)


def save_figure(figure: Any, path: Path, *, dpi: int = 120, overwrite: bool | None = None) -> Path:
    """Writes a figure of pyplot as PNG and close it.

    Raises:
        DataError: the file cannot be written, or is somebody else's.
    """
    from matplotlib import pyplot

    try:
        with replacing(path, PICTURE, overwrite=overwrite) as fresh:
            figure.savefig(fresh, dpi=dpi, format="png", metadata={"Software": "learnevict"})
    finally:
        pyplot.close(figure)
    return path


def _usual(rows: Sequence[Row]) -> Measure:
    """Returns what is drawn where nothing else is asked for."""
    return EXACT if all(row.get("step_accuracy") is None for row in rows) else ACCURACY


def _panel(
    axis: Any, family: str, rows: Sequence[Row], looks: dict[str, dict[str, Any]], asked: Measure | None
) -> None:
    measure, low, high = asked or _usual(rows)
    sized = [row for row in rows if isinstance(row.get("budget"), int) and row.get(measure) is not None]
    ends: list[tuple[float, str, str]] = []
    there = {row["method"] for row in sized}
    for method, look in looks.items():
        if method not in there:
            continue
        points = sorted((row for row in sized if row["method"] == method), key=lambda row: row["budget"])
        x, y = [row["budget"] for row in points], [row[measure] for row in points]
        named = look["linewidth"] >= NAMED
        axis.plot(x, y, marker="o", markersize=3 if named else 1.5, **look)
        if named and all(row.get(low) is not None for row in points):
            edges = [[row[edge] for row in points] for edge in (low, high)]
            axis.fill_between(x, *edges, color=look["color"], alpha=0.12, linewidth=0)
        if named:
            ends.append((y[0], method, look["color"]))
    full = next((row for row in rows if row.get("budget") is None and row.get(measure) is not None), None)
    if full is not None:
        axis.axhline(full[measure], color=INK, linestyle=":", linewidth=1)
        ends.append((full[measure], "full cache", INK))
    _dress(axis, family, sized, measure)
    _name_lines(axis, ends)


def styles(rows: Sequence[Row], measure: Measure | None = None) -> dict[str, dict[str, Any]]:
    """Returns how each method is drawn, the important ones last, on top; lines thinner than NAMED have no name."""
    ranking = _ranking(rows, measure or _usual(rows))
    learned = {row["method"] for row in rows if row.get("kind") == "learned"}
    few = len(ranking) <= FEW
    strong, brown, muted = iter(STRONG), iter(BROWN), iter(MUTED * len(ranking))
    looks: dict[str, dict[str, Any]] = {}
    for name in ranking:  # best first
        color = None
        if name == "golden":
            looks[name] = {"color": INK, "linestyle": "--", "linewidth": 1.6}
            continue
        if name in learned and name not in BASELINES:
            color = next(strong, None)
        elif name not in BASELINES:
            color = next(brown, None)
        if color is not None:
            looks[name] = {"color": color, "linewidth": 2.2 if name in learned else 1.4}
        else:
            looks[name] = {"color": next(muted), "linewidth": NAMED if few or name in BASELINES else 0.7}
    return dict(sorted(looks.items(), key=lambda item: (item[0] == "golden", item[1]["linewidth"])))


def _ranking(rows: Sequence[Row], asked: Measure) -> list[str]:
    """Returns methods by their mean figure under budgets, the best first."""
    measure, sign = asked[0], 1 if asked == NATS else -1
    values: dict[str, list[float]] = {}
    for row in rows:
        if isinstance(row.get("budget"), int) and row.get(measure) is not None:
            values.setdefault(row["method"], []).append(row[measure])
    return sorted(values, key=lambda name: sign * sum(values[name]) / len(values[name]))


def _dress(axis: Any, family: str, rows: Sequence[Row], measure: str) -> None:
    ticks = {row["budget"]: row.get("budget_share") or str(row["budget"]) for row in rows}
    axis.set_title(written(family), loc="left", color=INK, fontweight="bold")
    axis.set_ylabel("added nats per token" if measure == NATS[0] else measure.replace("_", " "), color=INK)
    axis.set_xlabel("slots kept per layer and kv head, fewer to the right", color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e5e7eb", linewidth=0.6)
    axis.set_axisbelow(True)
    if ticks:
        axis.set_xscale("log")
        labels = [
            f"{written(label)}\n{budget}" if "/" in label else written(label) for budget, label in sorted(ticks.items())
        ]
        axis.set_xticks(sorted(ticks), labels)
        axis.minorticks_off()
        axis.invert_xaxis()


def written(text: str) -> str:
    """Returns text that matplotlib does not take for a formula, no longer than a panel."""
    return one_line(text)[:60].replace("$", r"\$")


def _name_lines(axis: Any, ends: list[tuple[float, str, str]]) -> None:
    """Writes each name beside the end of its line, moved apart where they would overlap."""
    if not ends:
        return
    low, high = axis.get_ylim()
    step = (high - low) * 0.052
    ordered = sorted(ends)
    places: list[float] = []
    for value, _, _ in ordered:
        places.append(max(value, places[-1] + step) if places else value)
    ceiling = high
    for index in reversed(range(len(places))):
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - step
    for place, (value, name, color) in zip(places, ordered, strict=True):
        axis.annotate(
            written(name), xy=(1.0, value), xycoords=("axes fraction", "data"), xytext=(1.02, place),
            textcoords=("axes fraction", "data"), color=color, fontsize=8, va="center", annotation_clip=False,
        )  # fmt: skip
    axis.set_ylim(low, high)
