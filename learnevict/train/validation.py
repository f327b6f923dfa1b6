"""Evaluation of gates while they learn: how much of the way from random eviction to the oracle's they have come."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from learnevict import methods
from learnevict.config import Budget
from learnevict.data.documents import Collator
from learnevict.data.label_store import Document
from learnevict.errors import BudgetError, UsageError
from learnevict.hub import Gates
from learnevict.oracle.metrics import PolicyMetrics, measure
from learnevict.oracle.reference import Reference
from learnevict.policy import Policy

BEST = "eval_oracle_gap_closed"
"""The figure of early stopping and of the best checkpoint; higher is better."""


@dataclass
class Validation:
    """The texts and budgets of evaluations.

    Attributes:
        documents: not trained on.
        budgets: tokens, "25%" or "64MiB"; figures are means over them, and given for each if there are several.
        batch_size: documents at a time.
        terms: of the eviction: sinks, recent, slack; options that a method does not have are left out.
        memory: bytes of the full cache's labels that are kept between evaluations; others are computed again.
    """

    documents: Sequence[Document]
    budgets: tuple[str, ...] = ("25%",)
    batch_size: int = 8
    terms: dict[str, Any] = field(default_factory=dict)
    memory: int = 2**30
    kept: dict[int, Reference] = field(default_factory=dict, repr=False)

    def policies(self, gates: Gates) -> dict[str, Policy]:
        """Returns the policy of the gates under every budget.

        Raises:
            BudgetError: there is none, or one that cannot be held.
        """
        if not self.budgets:
            raise BudgetError("nothing to evaluate under: give --eval_budgets, for instance 25%")
        taken = inspect.signature(methods.load(gates.method).policy).parameters
        free = any(one.kind is one.VAR_KEYWORD for one in taken.values())
        terms = {name: value for name, value in self.terms.items() if free or name in taken}
        return {
            str(budget): gates.policy(Budget.parse(budget), allow_other_base=True, **terms) for budget in self.budgets
        }

    def references(self, base: PreTrainedModel, block: int, share: slice) -> Iterator[Reference]:
        """Yields what the full cache makes of this process's share of the documents, batch after batch."""
        collate, mine = Collator(0), list(self.documents[share])
        for start in range(0, len(mine), self.batch_size):
            reference = self.kept.get(start)
            if reference is None:
                batch = collate(mine[start : start + self.batch_size])
                ids, mask, prompt = (
                    batch[name].to(base.device) for name in ("input_ids", "attention_mask", "prompt_length")
                )
                reference = Reference.of(base, ids, mask, block=block, prompt_length=prompt)
                if sum(one.labels.nbytes for one in [*self.kept.values(), reference]) <= self.memory:
                    self.kept[start] = reference
            yield reference


@torch.no_grad()
def validate(
    gates: Gates, base: PreTrainedModel, validation: Validation, share: slice = slice(None)
) -> dict[str, list[PolicyMetrics]]:
    """Returns the metrics of gates on every batch of a share of the documents, by budget; `summarise` makes figures of them."""
    policies = validation.policies(gates)
    found: dict[str, list[PolicyMetrics]] = {budget: [] for budget in policies}
    block = next(iter(policies.values())).schedule.period
    for reference in validation.references(base, block, share):
        for budget, policy in policies.items():
            found[budget].append(measure(base, policy, reference))
    return found


def summarise(found: dict[str, list[PolicyMetrics]], prefix: str) -> dict[str, float]:
    """Returns figures of learnevict.oracle.metrics: {"eval_NAME": mean over budgets, "eval_NAME_25%": if there are several}.

    Raises:
        UsageError: nothing was evicted, so nothing can be compared.
    """
    by_budget: dict[str, dict[str, float]] = {}
    for budget, parts in found.items():
        by_budget[budget] = pool(parts).figures()
        if BEST.removeprefix("eval_") not in by_budget[budget]:
            raise UsageError(
                f"the documents held out are too short for --eval_budgets {budget}: nothing is evicted, or all the same is"
            )
    figures: dict[str, float] = {}
    for name in dict.fromkeys(name for values in by_budget.values() for name in values):
        values = {budget: values[name] for budget, values in by_budget.items() if name in values}
        figures[f"{prefix}_{name}"] = round(sum(values.values()) / len(values), 5)
        if len(by_budget) > 1:
            figures |= {f"{prefix}_{name}_{budget}": round(value, 5) for budget, value in values.items()}
    return figures


def pool(parts: list[PolicyMetrics]) -> PolicyMetrics:
    """Returns several batches as one, on the host: what they hold per text, one after the other."""

    def joined(found: list[Any]) -> Any:
        if isinstance(found[0], Tensor):
            return torch.cat([one.cpu() for one in found])
        names = [one.name for one in fields(found[0])]
        return replace(found[0], **{name: joined([getattr(one, name) for one in found]) for name in names})

    return joined(parts)


class Patience(TrainerCallback):
    """Stops training when so many evaluations in a row have not been better than the best before them.

    It reads the log and keeps no state of its own, so a resumed run stops where the other one would have.
    """

    def __init__(self, evaluations: int) -> None:
        self.evaluations = evaluations

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keeps a run stopped that had stopped already."""
        control.should_training_stop = self.exhausted(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stops where patience is exhausted."""
        control.should_training_stop = control.should_training_stop or self.exhausted(state)

    def exhausted(self, state: TrainerState) -> bool:
        """Returns whether so many evaluations in a row were no better."""
        values = [line[BEST] for line in state.log_history if BEST in line]
        return bool(values) and len(values) - 1 - values.index(max(values)) >= self.evaluations
