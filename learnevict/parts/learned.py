"""Kinds of gates, and what their trainers ask of them: judges and rankers of slots, surrogates of the oracle, tables."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from learnevict.config import Budget
from learnevict.errors import GateError, UsageError
from learnevict.parts.layer_allocation import LayerAllocation
from learnevict.parts.options import Options, compose
from learnevict.policy import Gate, Policy, WrappedScorer
from learnevict.signals import Signals, StateColumn


class SlotScorer(Gate):
    """Scores every slot by itself, from features; trained on recorded states (learnevict.train.trainers.pairwise).

    Attributes:
        calibrated: bool [], whether `calibrate` has been called.
        num_features: inputs of the network per slot.
        scope: who competes in training: slots of a head, or of all heads and layers (its scores then compare).
        demand: how layers share a budget; None: equally.
    """

    mode = "replay"
    scope: Literal["layer", "model"] = "layer"
    demand: LayerAllocation | None
    calibrated: Tensor
    num_features: int

    @abstractmethod
    def statistics(self, signals: Signals) -> Tensor:
        """What attention and the clock say about each slot, float32 [B, H, N, c]."""

    @abstractmethod
    def features(self, keys: Tensor, values: Tensor, statistics: Tensor) -> Tensor:
        """Inputs of the network, float32 [B, H, n, in], of keys [B, H, n, d], values and statistics."""

    @abstractmethod
    def score_features(self, layer: int, features: Tensor) -> Tensor:
        """Scores of features float32 [B, H, n, in] -> [B, H, n]."""

    def share_layers(self, num_layers: int, smallest: int, largest: int) -> LayerAllocation:
        """Give it a demand, if it has none, of so many evicting layers and for so many slots beyond the floor; see
        LayerAllocation.

        Raises:
            UsageError: its kind has none.
        """
        raise UsageError(f"{type(self).__name__} cannot learn how layers share a budget; drop share_spread")

    @abstractmethod
    def calibrate(self, features: dict[int, Tensor], candidates: dict[int, Tensor]) -> None:
        """Take the scale of inputs from one batch of states, {layer: [M, H, n, in]} and {layer: bool [M, H, n]}."""


class Learner(Gate):
    """Learns from one pass of the frozen base, layer by layer, with the oracle's verdict beside
    (learnevict.train.trainers.regression).

    Attributes:
        oracle: what its paper would have it predict, a name of learnevict.oracle.PRESETS.
        objective: how its numbers are compared with the oracle's, a name of learnevict.train.trainers.teacher_pass.OBJECTIVES.
        at_cuts: True if it ranks the slots held at an event, False if it judges tokens as they are written.
    """

    mode = "stream"
    oracle: str
    objective: str
    at_cuts: bool

    @abstractmethod
    def predictions(self, signals: Signals) -> Tensor:
        """What is compared with the oracle, with gradient, float32 [B, H, tokens or slots]."""

    def calibrate(self, signals: Signals) -> None:
        """Take the scale of inputs from whole texts of one layer, once and before training; nothing by default."""


class Surrogate(Learner):
    """Estimates the oracle's number of a token when it is written, and notes it in the column "estimate"."""

    columns = (StateColumn("estimate"),)
    at_cuts = False

    @abstractmethod
    def estimate(self, signals: Signals) -> Tensor:
        """Of fresh tokens, with gradient, float32 [B, H, S]."""

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
    """Scores all slots at an event, with gradient; what it notes with tokens as they are written may be learned too."""

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
    """A worth per entry, all zeros until fitted (learnevict.train.trainers.token_tables); `write` notes it in the
    column "worth".

    Attributes:
        table: float32 [L, H, entries].
        bonus: float32 [], for recency.
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
    """Worth less `bonus` for every e-fold of age, float32 [B, H, N]."""
    return signals.state["worth"] - bonus * torch.log1p(signals.age.clamp_min(0).float())


def keep_worthiest(
    name: str, budget: int | str | Budget, gate: Table, bonus: float | None, **options: Unpack[Options]
) -> Policy:
    """The policy of a table.

    Args:
        name: of the method.
        budget: tokens, "25%" or "64MiB".
        gate: fitted, from `Gates.from_pretrained(...)`.
        bonus: for recency; None: the gate's own, one for all budgets.
        **options: see parts.options.Options.
    """
    return compose(name, budget, gate if bonus is None else OtherBonus(gate, bonus), **options)
