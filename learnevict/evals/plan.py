"""What a comparison consists of, checked before anything is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from learnevict.errors import BudgetError, UsageError
from learnevict.evals.methods import COMPARISON, FULL, GOLDEN, RANDOM, EvaluatedMethod, EvaluationSettings
from learnevict.evals.tasks import SHARED_MODES, Task, family_tasks, is_share, resolve
from learnevict.hub import weight_hash


@dataclass(frozen=True)
class EvaluatedModel:
    """The model that is evaluated, and what tables call it."""

    model: Any
    tokenizer: Any
    name: str = "testbed"


@dataclass(frozen=True)
class Key:
    """One cell of a comparison in one mode: "teacher", "free" or one of the task's own."""

    method: str
    family: str
    budget: str
    mode: str


@dataclass(frozen=True)
class Plan:
    """The settings of one comparison.

    Attributes:
        tasks: what every method is run on; all of one origin.
        budgets: as "1/4" (of a task's mean length), "64" or "25%".
        num_samples, seed: samples seed .. seed + num_samples - 1 of each task.
        settings: what holds for all methods.
        teacher: measure step accuracy and loss.
        free: who answers freely: nobody, only the full cache, or all.
        batch_size: samples per forward.
        temperature, tries: of free answers; 0 is greedy, tries are averaged (avg@k).
        oracle: compare what is kept with what the oracle would keep; costs about a fifth more.
        lenient: a method that a budget is too small for has a row that says so, instead of stopping the run.
    """

    tasks: tuple[Task, ...] = family_tasks()
    budgets: tuple[str, ...] = ("1/4",)
    num_samples: int = 200
    seed: int = 0
    settings: EvaluationSettings = COMPARISON
    teacher: bool = True
    free: Literal["none", "full", "all"] = "full"
    batch_size: int = 32
    temperature: float = 0.0
    tries: int = 1
    oracle: bool = True
    lenient: bool = False

    @property
    def seeds(self) -> range:
        """Returns the seeds of the samples."""
        return range(self.seed, self.seed + self.num_samples)


@dataclass(frozen=True)
class Cell:
    """One method on one task at one budget, as asked for ("1/4") and in tokens (None: the full cache).

    `impossible`: why the method cannot be held to the budget; it has no modes then.
    """

    evaluated_method: EvaluatedMethod
    family: str
    asked: str
    budget: int | str | None
    modes: tuple[str, ...] = ()
    impossible: str | None = None

    def key(self, mode: str) -> Key:
        """Returns where the log keeps its numbers."""
        return Key(self.evaluated_method.name, self.family, self.asked, mode)

    @property
    def share(self) -> str | None:
        """Returns the budget if it was asked for as a share."""
        return self.asked if is_share(self.asked) else None

    @property
    def golden(self) -> bool:
        """Returns whether it is the oracle that evicts."""
        return self.evaluated_method.method == GOLDEN

    @property
    def place(self) -> tuple[Any, ...]:
        """Returns what its row is about: family, method, budget in slots and as a share."""
        return self.family, self.evaluated_method.name, self.budget, self.share

    @property
    def identity(self) -> dict[str, Any]:
        """See EvaluatedMethod.identity."""
        return self.evaluated_method.identity(self.family, self.asked)

    @property
    def options(self) -> dict[str, Any]:
        """Returns hyperparameters of the method in this cell."""
        return self.evaluated_method.options(self.family, self.asked)


def cells(plan: Plan, evaluated_methods: Sequence[EvaluatedMethod], task: Task) -> Iterator[Cell]:
    """Yields the cells of one task. The full cache comes first, asked for or not: losses are ratios to it."""
    asked = next((one for one in evaluated_methods if one.method == FULL), None)
    teacher = ("teacher",) if plan.teacher and "teacher" in task.modes else ()
    free = ("free",) if plan.free != "none" and "free" in task.modes else ()
    own = tuple(mode for mode in task.modes if mode not in SHARED_MODES)
    whole = teacher if asked is None else teacher + free + own
    yield Cell(asked or EvaluatedMethod(FULL, FULL), task.name, FULL, None, whole)
    modes = teacher + (free if plan.free == "all" else ()) + own
    for budget in plan.budgets:
        tokens = resolve(budget, lambda: task.mean_length(prompt=not plan.settings.prompt))
        for one in evaluated_methods:
            if one.method == FULL:
                continue
            cell = Cell(one, task.name, budget, tokens, modes)
            try:
                if plan.lenient:
                    _check_cell(plan, cell)
            except BudgetError as error:
                cell = replace(cell, modes=(), impossible=str(error))
            yield cell


def check(plan: Plan, evaluated_methods: Sequence[EvaluatedMethod]) -> None:
    """Raises an error for what cannot work, before hours are spent.

    Raises:
        BudgetError: a budget that some method cannot be held to, unless the plan is lenient.
        UsageError: something named twice, nothing to do, or golden where it is not defined.
    """
    if plan.num_samples < 1 or plan.batch_size < 1 or plan.tries < 1:
        raise UsageError("samples, batch size and tries must be at least 1")
    if not 0 <= plan.temperature < float("inf"):
        raise UsageError(f"temperature must be 0 (greedy) or more, not {plan.temperature}")
    if len({one.name for one in evaluated_methods}) < len(evaluated_methods) or not evaluated_methods:
        raise UsageError("give at least one method, and each only once")
    if len({task.name for task in plan.tasks}) < len(plan.tasks) or any(
        task.origin != plan.tasks[0].origin for task in plan.tasks
    ):
        raise UsageError("one log holds tasks of different names and one origin; evaluate others with another --out")
    if len(set(plan.budgets)) < len(plan.budgets):
        raise UsageError(
            f"budgets {', '.join(plan.budgets)}: give each only once, for each is measured on the same samples"
        )
    if plan.tries > 1 and plan.temperature == 0:
        raise UsageError("greedy answers are all alike: several tries need a temperature above 0")
    for task in plan.tasks:
        planned = list(cells(plan, evaluated_methods, task))
        if not any(cell.modes or cell.impossible for cell in planned):
            raise UsageError("nothing to measure: neither teacher-forced nor free")
        for cell in planned:
            if cell.impossible is None:
                _check_cell(plan, cell)


def _check_cell(plan: Plan, cell: Cell) -> None:
    if cell.budget is None:
        return
    known = replace(cell.evaluated_method, method=RANDOM) if cell.golden else cell.evaluated_method
    known.policy(
        cell.budget, plan.settings, cell.options
    )  # what budget golden can be held to does not hang on its labels
    if cell.golden and plan.temperature > 0 and "free" in cell.modes:
        raise UsageError("golden in free generation follows one greedy text; drop --temperature or golden")


def configuration(plan: Plan, subject: EvaluatedModel) -> dict[str, Any]:
    """Returns all that would make old numbers wrong if it changed; more methods, budgets, tasks or samples do not."""
    sampled = plan.temperature > 0
    return {
        "model": subject.name,
        "weights": weight_hash(subject.model),
        "dtype": str(subject.model.dtype),
        **plan.tasks[0].origin,
        "rules": plan.settings.recorded,
        "decoding": [plan.temperature, plan.tries, plan.batch_size] if sampled else "greedy",
    }


def count(plan: Plan, evaluated_methods: Sequence[EvaluatedMethod]) -> int:
    """Returns samples that a run goes through in all, for a progress bar."""
    modes = sum(len(cell.modes) for task in plan.tasks for cell in cells(plan, evaluated_methods, task))
    return modes * plan.num_samples
