"""Who takes part in a comparison, and the settings that hold for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from learnevict import methods
from learnevict.errors import GateError, UsageError
from learnevict.evals.tasks.task import fingerprint
from learnevict.hub import Gates, weight_hash
from learnevict.methods import golden
from learnevict.oracle.collect import future_of, golden_labels
from learnevict.parts.options import EQUAL, POOLED
from learnevict.parts.shares import read_shares
from learnevict.policy import Guard, Policy, Uniform

GOLDEN, FULL, RANDOM = "golden", "full", "random"
ROOMY = 1 << 16
"""A budget that every method can be held to."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What every method of one table is given alike; None leaves it to the method.

    Attributes:
        slack: event period in tokens (0: one victim at every step).
        sinks: first tokens that stay.
        recent: last tokens that stay.
        prompt: the prompt stays and the budget is counted on the rest.
        schedule: "blocks", "prefill_end" or "prefill_only"; see parts.options.
        allocation: "equal", "pooled" or a file of shares; see parts.options.
    """

    slack: int = 16
    sinks: int | None = 4
    recent: int | None = 8
    prompt: bool = False
    schedule: str | None = None
    allocation: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Returns these settings as arguments of a method's `policy`."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def recorded(self) -> dict[str, Any]:
        """Returns what logs and rows say of them; nothing of what came later and is unset."""
        found = {**vars(self), "allocation": self.allocated}
        return {name: value for name, value in found.items() if value is not None or name in ("sinks", "recent")}

    @property
    def allocated(self) -> str | None:
        """Returns what rows call the allocation: "equal", "pooled", or "profile" and the content of the file."""
        if self.allocation in (None, EQUAL, POOLED):
            return self.allocation
        made = read_shares(Path(self.allocation))
        return f"profile {fingerprint(map(repr, (made.indices, made.layers)))}"

    @property
    def guard(self) -> Guard:
        """Returns the guard of these settings, for the oracle."""
        return Guard(**{name: self.options[name] for name in ("sinks", "recent", "prompt") if name in self.options})

    @property
    def block(self) -> int:
        """Returns tokens between events, at least 1."""
        return max(self.slack, 1)


COMPARISON = EvaluationSettings()
"""What comparison tables force on every method: the same event period, 4 sinks, 8 recent tokens, no prompt protection."""


@dataclass(frozen=True)
class EvaluatedMethod:
    """A method with its gates and hyperparameters.

    Attributes:
        name: what tables call it.
        method: a name of learnevict.methods or an import path.
        gates: its trained part, if it has one.
        settings: hyperparameters beside budget and common settings, for all budgets alike.
        tuned: hyperparameters by (family, budget as asked for), chosen on validation seeds; they win.
        allow_other_base: the gates may serve other weights than they were trained on.
        allocation: replaces that of the common settings.
    """

    name: str
    method: str
    gates: Gates | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    tuned: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    allow_other_base: bool = False
    allocation: str | None = None

    @property
    def kind(self) -> str:
        """Returns "reference", "heuristic" or "learned"."""
        return methods.load(self.method).PAPER.kind

    def options(self, family: str, budget: str) -> dict[str, Any]:
        """Returns the hyperparameters for one cell."""
        return {**self.settings, **self.tuned.get((family, budget), {})}

    def identity(self, family: str, budget: str) -> dict[str, Any]:
        """Returns what makes its numbers in one cell what they are: method, hyperparameters, hash of the gates."""
        parts = {"method": self.method, **self.options(family, budget)}
        if self.allocation is not None:
            parts["allocation"] = EvaluationSettings(allocation=self.allocation).allocated
        return parts if self.gates is None else {**parts, "gates": weight_hash(self.gates)}

    def rules(self, settings: EvaluationSettings) -> EvaluationSettings:
        """Returns the settings that hold for this method where `settings` hold for all."""
        return settings if self.allocation is None else replace(settings, allocation=self.allocation)

    @property
    def shares_itself(self) -> bool:
        """Whether layers or heads share budgets in a way of its own, so that no other allocation can be asked of it."""
        if self.method in (FULL, GOLDEN):
            return self.method == FULL
        made = self.policy(ROOMY, EvaluationSettings())
        return type(made.allocator) is not Uniform or made.scope == "model"

    def policy(
        self, budget: int | str, settings: EvaluationSettings, options: Mapping[str, Any] | None = None
    ) -> Policy:
        """Returns the policy for a resolved budget.

        Raises:
            UsageError: the method does not know an option.
            BudgetError: the budget cannot hold guards and a fresh block.
        """
        given = {**self.rules(settings).options, **(self.settings if options is None else options)}
        make: Any = methods.load(self.method).policy
        if self.gates is not None:
            make = partial(self.gates.policy, allow_other_base=self.allow_other_base)
        try:
            return make(budget, **given)
        except TypeError as error:
            raise UsageError(f"method {self.method!r} cannot be made with {given}: {error}") from error


def evaluated_method(method: str, gates: Gates | None = None, *, name: str = "", **parts: Any) -> EvaluatedMethod:
    """Returns a method whose parts fit together; `parts`: settings, tuned, allow_other_base, allocation.

    Raises:
        UsageError: no such method.
        GateError: gates missing, superfluous, or of another method.
    """
    if methods.load(method).PAPER.kind == "learned" and gates is None:
        raise GateError(f"method {method!r} is learned and needs gates; give --ckpt with a folder or Hub id")
    if gates is not None and gates.method != method:
        raise GateError(f"these gates belong to method {gates.method!r}, not to {method!r}; ask for that method")
    return EvaluatedMethod(name or method, method, gates, **parts)


def golden_policy(
    model: Any,
    ids: Int[Tensor, "B T"],
    budget: int | str,
    settings: EvaluationSettings,
    *,
    mask: Int[Tensor, "B T"] | None = None,
) -> Policy:
    """Returns golden eviction of texts, which the model reads in full for it."""
    labels, _ = golden_labels(model, ids, mask, block=settings.block)
    return golden.from_labels(budget, future_of(labels), text=ids, **settings.options)
