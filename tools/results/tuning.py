"""Tries hyperparameters of the baselines, and which training-free method is best where, on validation seeds.

The best setting is taken per family and budget, which favours the baselines: no user could tune so finely. Table baselines
are tuned alike (their bonus for recency); they are learned, so they are never "the best heuristic".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from learnevict import methods
from learnevict.errors import UsageError
from learnevict.evals.methods import EvaluatedMethod, evaluated_method
from learnevict.evals.plan import EvaluatedModel, Plan, configuration
from learnevict.evals.records import Row
from learnevict.evals.suite import Advance, run
from learnevict.evals.tasks import family_tasks
from learnevict.evals.tuning import TABLES, TUNED, Tuned, load
from learnevict.files import write
from learnevict.hub import Gates, weight_hash

BONUSES = (0.0, 0.0003, 0.001, 0.003, 0.01, 0.03)
GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "h2o": {"variant": ("paper", "kvpress")},
    "snapkv": {"variant": ("paper", "kvpress", "rkv"), "window": (8, 16)},
    "pyramidkv": {"beta": (2.0, 5.0, 20.0), "window": (8, 16)},
    "adakv": {"alpha": (0.2, 0.5), "window": (8, 16)},
    "rkv": {"mix": (0.07, 0.1, 0.3, 0.7), "window": (8, 16)},
    "expected_attention": {"window": (16, 64), "future": (64, 512), "epsilon": (0.0, 0.02)},
    **{name: {"bonus": BONUSES} for name in TABLES},
}
"""Settings that are tried; methods without an entry have none that matter under common rules."""


def training_free() -> list[str]:
    """Returns methods that need no training and no oracle; random is one of them."""
    return [name for name in methods.METHODS if name == "random" or methods.load(name).PAPER.kind == "heuristic"]


def candidates(names: Sequence[str], tables: Sequence[Gates] = ()) -> list[EvaluatedMethod]:
    """Returns every setting of every method and of the given tables as a method of its own, named "snapkv window=8"."""
    found: list[EvaluatedMethod] = []
    gates = {one.method: one for one in tables}
    for name in [*names, *gates]:
        grid = GRIDS.get(name, {})
        for values in product(*grid.values()):
            settings = dict(zip(grid, values, strict=True))
            label = " ".join([name, *(f"{key}={value}" for key, value in settings.items())])
            found.append(evaluated_method(name, gates.get(name), settings=settings, name=label))
    return found


def tune(
    plan: Plan, subject: EvaluatedModel, field: Sequence[EvaluatedMethod], out: Path, *, advance: Advance | None = None
) -> Tuned:
    """Runs all settings on the validation split and keeps the best of each method, per family and budget.

    Args:
        plan: families, budgets, samples and settings; split and modes are set here.
        field: what `candidates` lists.
        out: rows of all settings; goes on where it was interrupted.

    Settings that a budget is too small for are left out there.
    """
    plan = on_validation(plan)
    rows, _ = run(plan, subject, field, out, resume=True, advance=advance)
    return choose(rows, field, record_of(plan, subject, field))


def on_validation(plan: Plan) -> Plan:
    """Returns the plan with the split and the modes of tuning."""
    tasks = family_tasks([task.name for task in plan.tasks], split="validation")
    return replace(plan, tasks=tasks, teacher=True, free="none", oracle=False, lenient=True)


def record_of(plan: Plan, subject: EvaluatedModel, field: Sequence[EvaluatedMethod]) -> dict[str, Any]:
    """Returns what settings are tuned under; two files of settings with the same record belong together."""
    gates = {one.method: weight_hash(one.gates) for one in field if one.gates is not None}
    own = {"samples": plan.num_samples, "seed": plan.seed, "gates": gates}
    return json.loads(json.dumps({**configuration(on_validation(plan), subject), **own}))


def choose(rows: Sequence[Row], field: Sequence[EvaluatedMethod], record: Mapping[str, Any]) -> Tuned:
    """Returns the best setting of each method in each cell; of equals the first."""
    tuned = Tuned(dict(record), {}, {})
    by_name = {one.name: one for one in field}
    for row in rows:
        one, asked = by_name[row["method"]], row["budget_share"] or str(row["budget"])
        accuracy = tuned.accuracy.setdefault(row["family"], {}).setdefault(asked, {})
        settings = tuned.settings.setdefault(row["family"], {}).setdefault(asked, {})
        if row["step_accuracy"] is None:
            continue
        if row["step_accuracy"] > accuracy.get(one.method, -1.0):
            accuracy[one.method] = row["step_accuracy"]
            settings[one.method] = dict(one.settings)
    return tuned


def merge(parts: Sequence[Tuned]) -> Tuned:
    """Returns parts that tuned different families or budgets as one; of the same cell the last.

    Raises:
        UsageError: they were tuned under different conditions.
    """
    if any(part.record != parts[0].record for part in parts):
        raise UsageError("these parts were tuned under different conditions; run recipes/evaluate.py anew")
    merged = Tuned(parts[0].record, {}, {})
    for part in parts:
        for family in part.settings:
            merged.settings.setdefault(family, {}).update(part.settings[family])
            merged.accuracy.setdefault(family, {}).update(part.accuracy[family])
    return merged


def save(tuned: Tuned, path: Path = TUNED) -> None:
    """Writes settings as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(vars(tuned), indent=1) + "\n", b'"record": ')


def save_part(found: Tuned, part: Path, whole: Path = TUNED) -> None:
    """Writes what one process tuned to a file of its own, and all parts beside it into one.

    Processes that tune other families may do the same at any moment. A part written after this one read the folder is
    taken in by whoever wrote it, and one written in between by looking again afterwards.

    Args:
        found: settings of the families and budgets that this process tuned.
        part: the file, "NAME.tuned.json" in a folder of such; what it holds of other budgets stays.
        whole: settings of all families; those that it holds from elsewhere stay.

    Raises:
        UsageError: one of the files was tuned under other conditions; nothing is written.
    """
    check_alike(found.record, part, whole)
    save(merge([load(part), found]) if part.exists() else found, part)
    before, after = None, parts_beside(part)
    while after != before:
        known = [load(whole)] if whole.exists() else []
        save(merge([*known, *after]), whole)
        before, after = after, parts_beside(part)


def check_alike(record: Mapping[str, Any], part: Path, whole: Path = TUNED) -> None:
    """Raises rather than lose what was tuned under other conditions: settings of both do not belong into one file.

    Raises:
        UsageError: naming the files, the families in them, and what differs.
    """
    for path in (whole, *sorted(part.parent.glob("*.tuned.json"))):
        other = load(path) if path.exists() else None
        if other is None or other.record == record:
            continue
        differ = sorted(key for key in {*record, *other.record} if record.get(key) != other.record.get(key))
        raise UsageError(
            f"{path} holds settings of {', '.join(other.settings)} that were tuned under other conditions "
            f"({', '.join(differ)}); to tune all families anew, remove {whole} and {part.parent}/*.tuned.json first, or "
            "choose another --out"
        )


def parts_beside(part: Path) -> list[Tuned]:
    """Returns all parts in the folder of one."""
    return [load(path) for path in sorted(part.parent.glob("*.tuned.json"))]
