"""What a comparison consists of, checked before anything is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from learnevict import testbed
from learnevict.errors import BudgetError, UsageError
from learnevict.evals.budgets import resolve
from learnevict.evals.methods import COMPARISON, FULL, GOLDEN, EvaluatedMethod, EvaluationSettings
from learnevict.evals.sample_log import Key
from learnevict.hub import weight_hash


@dataclass(frozen=True)
class EvaluatedModel:
    """The model that is evaluated, and what tables call it."""

    model: Any
    tokenizer: Any
    name: str = "testbed"


@dataclass(frozen=True)
class Plan:
    """The settings of one comparison.

    Attributes:
        families, budgets: what every method is run on; budgets as "1/4" (of the family's mean length), "64" or "25%".
        num_samples, seed: samples seed .. seed + num_samples - 1 of each family.
        split, length: see testbed.generate.
        rules: what holds for all methods.
        teacher: measure step accuracy and loss.
        free: who answers freely: nobody, only the full cache, or all.
        batch_size: samples per forward.
        temperature, tries: of free answers; 0 is greedy, tries are averaged (avg@k).
        oracle: compare what is kept with what the oracle would keep; costs about a fifth more.
        lenient: a method that a budget is too small for has a row that says so, instead of stopping the run.
    """

    families: tuple[str, ...] = testbed.FAMILIES
    budgets: tuple[str, ...] = ("1/4",)
    num_samples: int = 200
    seed: int = 0
    split: str = "test"
    length: str = "normal"
    rules: EvaluationSettings = COMPARISON
    teacher: bool = True
    free: Literal["none", "full", "all"] = "full"
    batch_size: int = 32
    temperature: float = 0.0
    tries: int = 1
    oracle: bool = True
    lenient: bool = False

    @property
    def seeds(self) -> range:
        """Returns seeds of the samples."""
        return range(self.seed, self.seed + self.num_samples)


@dataclass(frozen=True)
class Cell:
    """One method on one family at one budget, as asked for ("1/4") and in tokens (None: the full cache).

    `impossible`: why the method cannot be held to the budget; it has no modes then.
    """

    evaluated_method: EvaluatedMethod
    family: str
    asked: str
    budget: int | str | None
    modes: tuple[str, ...]
    impossible: str | None = None

    def key(self, mode: str) -> Key:
        """Returns where the log keeps its numbers."""
        return Key(self.evaluated_method.name, self.family, self.asked, mode)

    @property
    def identity(self) -> dict[str, Any]:
        """See EvaluatedMethod.identity."""
        return self.evaluated_method.identity(self.family, self.asked)

    @property
    def options(self) -> dict[str, Any]:
        """Returns hyperparameters of the method in this cell."""
        return self.evaluated_method.options(self.family, self.asked)


def cells(plan: Plan, evaluated_methods: Sequence[EvaluatedMethod], family: str) -> Iterator[Cell]:
    """Yields cells of one family. The full cache comes first, asked for or not: losses are ratios to it."""
    asked = next((one for one in evaluated_methods if one.method == FULL), None)
    teacher = ("teacher",) if plan.teacher else ()
    free = ("free",) if plan.free == "all" else ()
    modes = teacher if asked is None else teacher + (() if plan.free == "none" else ("free",))
    yield Cell(asked or EvaluatedMethod(FULL, FULL), family, FULL, None, modes)
    for budget in plan.budgets:
        tokens = resolve(budget, family, plan.length, prompt=not plan.rules.prompt)
        for one in evaluated_methods:
            if one.method != FULL:
                yield _possible(plan, Cell(one, family, budget, tokens, teacher + free))


def _possible(plan: Plan, cell: Cell) -> Cell:
    """Returns the cell, or one without modes if the plan is lenient and the budget too small."""
    if not plan.lenient:
        return cell
    try:
        _check_cell(plan, cell)
    except BudgetError as error:
        return replace(cell, modes=(), impossible=str(error))
    return cell


def check(plan: Plan, evaluated_methods: Sequence[EvaluatedMethod]) -> None:
    """Raises an error for what cannot work, before hours are spent.

    Raises:
        BudgetError: a budget that some method cannot be held to, unless the plan is lenient.
        UsageError: unknown families, something named twice, nothing to do, or golden where it is not defined.
    """
    check_families(plan.families)
    if plan.num_samples < 1 or plan.batch_size < 1 or plan.tries < 1:
        raise UsageError("samples, batch size and tries must be at least 1")
    if not 0 <= plan.temperature < float("inf"):
        raise UsageError(f"temperature must be 0 (greedy) or more, not {plan.temperature}")
    if len({one.name for one in evaluated_methods}) < len(evaluated_methods) or not evaluated_methods:
        raise UsageError("give at least one method, and each only once")
    if len(set(plan.budgets)) < len(plan.budgets):
        raise UsageError(
            f"budgets {', '.join(plan.budgets)}: give each only once, for each is measured on the same samples"
        )
    if not plan.teacher and plan.free == "none":
        raise UsageError("nothing to measure: neither teacher-forced nor free")
    if plan.tries > 1 and plan.temperature == 0:
        raise UsageError("greedy answers are all alike: several tries need a temperature above 0")
    for family in plan.families:
        for cell in cells(plan, evaluated_methods, family):
            if cell.impossible is None:
                _check_cell(plan, cell)


def check_families(families: Sequence[str]) -> None:
    """Raises an error for families that do not exist, or are named twice.

    Raises:
        UsageError: naming those that do exist.
    """
    unknown = [family for family in families if family not in testbed.FAMILIES]
    if unknown or not families:
        given = ", ".join(unknown) or "none given"
        raise UsageError(f"no such task family: {given}; choose {', '.join(testbed.FAMILIES)}")
    if len(set(families)) < len(families):
        raise UsageError(
            f"families {', '.join(families)}: give each only once, for each has the same samples every time"
        )


def _check_cell(plan: Plan, cell: Cell) -> None:
    if cell.budget is None:
        return
    if cell.evaluated_method.method != GOLDEN:
        cell.evaluated_method.policy(cell.budget, plan.rules, cell.options)
        return
    smallest = plan.rules.guard.reserved(plan.rules.block) + 1
    if not isinstance(cell.budget, int):
        raise UsageError(f"golden is rolled out for a number of slots, not {cell.budget}; give 1/4 or tokens (64)")
    if cell.budget < smallest:
        raise BudgetError(f"budget {cell.budget} on {cell.family} is too small; the smallest that works is {smallest}")
    if plan.temperature > 0 and "free" in cell.modes:
        raise UsageError("golden in free generation follows one greedy text; drop --temperature or golden")


def configuration(plan: Plan, subject: EvaluatedModel) -> dict[str, Any]:
    """Returns all that would make old numbers wrong if it changed; more methods, budgets, families or samples do not."""
    sampled = plan.temperature > 0
    return {
        "model": subject.name,
        "weights": weight_hash(subject.model),
        "dtype": str(subject.model.dtype),
        "tasks": testbed.fingerprint(),
        "split": plan.split,
        "length": plan.length,
        "rules": asdict(plan.rules),
        "decoding": [plan.temperature, plan.tries, plan.batch_size] if sampled else "greedy",
    }


def count(plan: Plan, evaluated_methods: Sequence[EvaluatedMethod]) -> int:
    """Returns samples that a run goes through in all, for a progress bar."""
    modes = sum(len(cell.modes) for family in plan.families for cell in cells(plan, evaluated_methods, family))
    return modes * plan.num_samples
