"""Kinds of learned gates and what their trainers need: rankers of slots, surrogates of the oracle, tables."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from learnevict.config import Budget
from learnevict.errors import GateError
from learnevict.parts.options import Options, compose
from learnevict.policy import Gate, Policy, WrappedScorer
from learnevict.signals import Signals, StateColumn


class Learner(Gate):
    """Learns from one pass of the frozen base, layer by layer, with the oracle's labels as targets
    (learnevict.train.trainers.regression).

    Attributes:
        oracle: what its paper would have it predict, a name of learnevict.oracle.PRESETS.
        objective: how its numbers are compared with the oracle's, a name of learnevict.train.trainers.teacher_pass.OBJECTIVES.
        at_cuts: True if it ranks the slots held at an event, False if it scores tokens as they are written.
    """

    mode = "stream"
    oracle: str
    objective: str
    at_cuts: bool

    @abstractmethod
    def predictions(self, signals: Signals) -> Tensor:
        """Returns what is compared with the oracle's labels, with gradient, float32 [B, H, tokens or slots]."""

    def calibrate(self, signals: Signals) -> None:
        """Take the scale of inputs from whole texts of one layer, once and before training; nothing by default."""


class Surrogate(Learner):
    """Estimates the oracle's label of a token when it is written, and stores it in the column "estimate"."""

    columns = (StateColumn("estimate"),)
    at_cuts = False

    @abstractmethod
    def estimate(self, signals: Signals) -> Tensor:
        """Returns the estimates of fresh tokens, with gradient, float32 [B, H, S]."""

    def predictions(self, signals: Signals) -> Tensor:
        """See Learner."""
        return self.estimate(signals)

    def write(self, signals: Signals) -> dict[str, Tensor]:
        """See Scorer."""
        return {"estimate": self.estimate(signals)}

    def score(self, signals: Signals) -> Tensor:
        """float32 [B, H, N]."""
        return signals.state["estimate"]


class Ranker(Learner):
    """Scores all slots at an event, with gradient; its per-slot state may be learned too."""

    at_cuts = True

    def predictions(self, signals: Signals) -> Tensor:
        """See Learner."""
        return self.score(signals)


def hidden_of(signals: Signals, method: str) -> Tensor:
    """Inputs of the attention module for fresh tokens, float32 [B, S, E].

    Raises:
        GateError: there are none, as in a replay from stored queries.
    """
    if signals.hidden is None:
        raise GateError(
            f"{method} reads hidden states, but layer {signals.layer} was given none; run it inside a model"
        )
    return signals.hidden.float()


class Table(Gate):
    """A score per entry, all zeros until fitted (recipes/tables.py); `write` puts it into the
    column "score".

    Attributes:
        table: float32 [L, H, entries].
        bonus: float32 [], the recency bonus.
    """

    table: nn.Parameter
    bonus: nn.Parameter

    @abstractmethod
    def entries(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Table entries of whole texts, int64 [B, T]; mask [B, T], 0 = padding."""

    def score(self, signals: Signals) -> Tensor:
        """float32 [B, H, N]."""
        return aged(signals, self.bonus)


@dataclass(frozen=True)
class OtherBonus(WrappedScorer):
    """The same table under another recency bonus than the one it was saved with."""

    bonus: float

    def score(self, signals: Signals) -> Tensor:
        """float32 [B, H, N]."""
        return aged(signals, self.bonus)


def aged(signals: Signals, bonus: Tensor | float) -> Tensor:
    """Returns the token's score less `bonus` for every e-fold of age, float32 [B, H, N]."""
    return signals.state["score"] - bonus * torch.log1p(signals.age.clamp_min(0).float())


def table_policy(
    name: str, budget: int | str | Budget, gate: Table, bonus: float | None, **options: Unpack[Options]
) -> Policy:
    """Returns the policy of a table.

    Args:
        name: of the method.
        budget: tokens, "25%" or "64MiB".
        gate: fitted, from `Gates.from_pretrained(...)`.
        bonus: recency bonus; None: the gate's own, one for all budgets.
        **options: see parts.options.Options.
    """
    return compose(name, budget, gate if bonus is None else OtherBonus(gate, bonus), **options)
