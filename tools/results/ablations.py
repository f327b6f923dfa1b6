"""Refinement in figures: what each correction buys (recipes/ablate.py), and the training of the gates that ship."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learnevict.errors import DataError, UsageError
from learnevict.evals import metrics
from learnevict.evals.plots import save_figure
from learnevict.evals.report import table

Variant = dict[str, Any]
SMOOTHED = 10
"""Steps over which a curve of costs is averaged."""
COMMON = ("rows", "samples", "start")
"""What all variants of one table share."""


def read_variants(path: Path) -> list[Variant]:
    """Reads variants in the order they were run; the first is the start.

    Raises:
        DataError: the file is not one of recipes/ablate.py.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert all({"name", "settings", "steps", "cost", "counts"} <= set(one) for one in found)
    except (OSError, ValueError, TypeError, AssertionError) as error:
        raise DataError(f"{str(path)!r} is no file of recipes/ablate.py ({type(error).__name__}: {error})") from error
    return found


def check_same(done: Sequence[Variant], wanted: Sequence[Variant], path: Path) -> None:
    """Refuses to go on with a file whose variants were run on other terms than those that are wanted now.

    Args:
        done: what the file holds.
        wanted: the start, then the variants; each with name, settings, steps and what all have in COMMON.

    Raises:
        UsageError: naming a variant and what differs.
    """
    now = {one["name"]: one for one in wanted}
    steps = {one["steps"] for one in wanted[1:]}
    for one in done:
        same = now.get(one["name"])
        apart = [term for term in COMMON if one.get(term) != wanted[0][term]]
        if one["steps"] not in ({same["steps"]} if same else steps):
            apart.append("steps")
        if same and one["settings"] != same["settings"]:
            apart.append("settings")
        if apart:
            raise UsageError(
                f"{path} holds {one['name']!r} with other {' and '.join(apart)} than asked for now; give those it was run "
                "with, remove the file to run all variants anew, or choose another --out"
            )


def ablation_table(variants: Sequence[Variant]) -> str:
    """Returns the step accuracy of every variant, and what it gains over the start, paired by sample."""
    start, shares = variants[0], list(variants[0]["counts"])
    lines: list[list[str]] = []
    for one in variants:
        cells = [one["name"], str(one["steps"])]
        for share in shares:
            counts, before = one["counts"][share], start["counts"][share]
            accuracy = sum(counts["right"]) / sum(counts["seen"])
            if one is start:
                cells.append(f"{accuracy:.3f}")
                continue
            gain = metrics.paired_difference(counts["right"], before["right"], counts["seen"])
            cells.append(f"{accuracy:.3f} ({gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}])")
        lines.append(cells)
    return table(["variant", "steps", *shares], lines)


def plot_curves(variants: Sequence[Variant], path: Path) -> Path:
    """Plots the cost of the sampled traces against steps, one line a variant, averaged over SMOOTHED steps."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for one in variants:
        costs = one["cost"]
        if len(costs) >= SMOOTHED:
            means = [sum(costs[i : i + SMOOTHED]) / SMOOTHED for i in range(len(costs) - SMOOTHED + 1)]
            axes.plot(range(SMOOTHED, len(costs) + 1), means, label=one["name"])
    axes.set(xlabel="step", ylabel="cost of a trace, nats per token", title="Refinement, short runs on program")
    axes.legend(fontsize="small")
    figure.tight_layout()
    return save_figure(figure, path)


def plot_training(record: Path, path: Path) -> Path | None:
    """Plots cost and entropy of the evictions against steps, from the record of a refinement; None if it has no log of that.

    Args:
        record: a run.json of recipes/grpo.py.
        path: of the picture.
    """
    import matplotlib.pyplot as plt

    log = json.loads(record.read_text(encoding="utf-8")).get("log", []) if record.exists() else []
    lines = [line for line in log if "cost" in line]
    if not lines:
        return None
    figure, left = plt.subplots(figsize=(8, 3.5))
    right = left.twinx()
    steps = [line["step"] for line in lines]
    left.plot(steps, [line["cost"] for line in lines], color="C0")
    right.plot(steps, [line["entropy"] for line in lines], color="C1")
    left.set(xlabel="step", yscale="log", title="Refinement of the gates that ship")
    left.set_ylabel("cost of a trace, nats per token", color="C0")
    right.set_ylabel("entropy of the first eviction, nats", color="C1")
    figure.tight_layout()
    return save_figure(figure, path)
