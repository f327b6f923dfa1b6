"""Needles found, by length of the context and depth of the needle: a panel for each method and budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from learnevict.evals.contests import open_rows
from learnevict.evals.methods import FULL
from learnevict.evals.plan import Key
from learnevict.evals.plots import INK, figure_of, save_figure, written
from learnevict.evals.report import budget_label, in_order

BINS = 5
MOST = 8
"""Methods that are drawn: the full cache and the best."""


@dataclass(frozen=True)
class Needle:
    """A needle that was asked for when its context had been compressed."""

    method: str
    budget: str | None
    length: int
    depth: float
    found: float


def read_needles(files: Sequence[Path]) -> list[Needle]:
    """Returns the needles of rows whose logs lie beside them, task `needle` only.

    Raises:
        DataError: a file is no result of an evaluation.
    """
    needles: list[Needle] = []
    for row, log in open_rows(files):
        kind, _, rest = row["family"].partition("@")
        seeds = range(row.get("seed", 0), row.get("seed", 0) + row["samples"])
        key = Key(row["method"], row["family"], budget_label(row) or FULL, "after")
        columns = log.columns(key, seeds, "depth", "exact") if kind == "needle" else None
        for depth, found in zip(*columns, strict=True) if columns else ():
            needles.append(Needle(row["method"], budget_label(row), int(rest.split("@")[0]), depth, found))
    return needles


def heat_map(needles: Sequence[Needle], path: Path, *, overwrite: bool | None = None) -> Path:
    """Draws the share of needles found: lengths down, depths across.

    Raises:
        UsageError: matplotlib is not installed.
        DataError: the file cannot be written, or is somebody else's.
    """
    methods = _best(needles)
    budgets = in_order([vars(one) for one in needles if one.budget is not None], "budget") or [None]
    lengths = sorted({one.length for one in needles})
    size = (2.3 * len(methods) + 0.8, (0.5 * len(lengths) + 1.1) * len(budgets) + 0.4)
    figure, axes = figure_of(len(budgets), len(methods), size)
    image = None
    for line, budget in zip(axes, budgets, strict=True):
        for axis, method in zip(line, methods, strict=True):
            mine = [one for one in needles if one.method == method and one.budget in (budget, None)]
            image = _panel(axis, grid(mine, lengths), lengths)
            axis.set_title(f"{written(method)}\n{written(str(budget or ''))}", fontsize=9, color=INK)
    figure.supxlabel("depth of the needle, in parts of the context", fontsize=9, color=INK)
    figure.supylabel("tokens of the context", fontsize=9, color=INK)
    figure.tight_layout()
    figure.colorbar(image, ax=axes.ravel().tolist(), shrink=0.8, label="found")
    return save_figure(figure, path, dpi=130, overwrite=overwrite)


def grid(needles: Sequence[Needle], lengths: Sequence[int]) -> np.ndarray:
    """Returns the share of needles found, float64 [lengths, BINS]; NaN where there was none."""
    found, count = np.zeros((2, len(lengths), BINS))
    for one in needles:
        place = lengths.index(one.length), min(int(one.depth * BINS), BINS - 1)
        found[place] += one.found
        count[place] += 1
    return np.where(count > 0, found / np.maximum(count, 1), np.nan)


def _best(needles: Sequence[Needle]) -> list[str]:
    """Returns the methods to draw, in order of appearance."""
    values: dict[str, list[float]] = {}
    for one in needles:
        values.setdefault(one.method, []).append(one.found)
    ranking = sorted(values, key=lambda name: (name != FULL, -sum(values[name]) / len(values[name])))
    return [name for name in values if name in ranking[:MOST]]


def _panel(axis: Any, shares: np.ndarray, lengths: Sequence[int]) -> Any:
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for (line, column), share in np.ndenumerate(shares):
        if share == share:
            color = "white" if share > 0.6 else INK
            axis.text(column, line, f"{share:.2f}", ha="center", va="center", fontsize=7, color=color)
    axis.set_yticks(range(len(lengths)), [str(length) for length in lengths], fontsize=7)
    axis.set_xticks(
        [edge - 0.5 for edge in range(BINS + 1)], [f"{edge / BINS:g}" for edge in range(BINS + 1)], fontsize=7
    )
    axis.tick_params(length=0)
    return image
