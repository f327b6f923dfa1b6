"""Two kinds of gates, and what their trainers ask of them: judges that rank slots, tables that look entries up."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from learnevict.config import Budget
from learnevict.parts.options import Options, compose
from learnevict.policy import Gate, Policy, Scorer
from learnevict.signals import Signals


class Judge(Gate):
    """Scores every slot by itself, from features; trained on recorded states (learnevict.train.ranker).

    Attributes:
        calibrated: bool [], whether `calibrate` has been called.
    """

    mode = "replay"
    calibrated: Tensor

    @abstractmethod
    def notes(self, signals: Signals) -> Tensor:
        """What attention and the clock say about each slot, float32 [B, H, N, c]."""

    @abstractmethod
    def features(self, keys: Tensor, values: Tensor, notes: Tensor) -> Tensor:
        """Inputs of the network, float32 [B, H, n, in], of keys [B, H, n, d], values and notes."""

    @abstractmethod
    def judge(self, layer: int, features: Tensor) -> Tensor:
        """Scores of features float32 [B, H, n, in] -> [B, H, n]."""

    @abstractmethod
    def calibrate(self, features: dict[int, Tensor], candidates: dict[int, Tensor]) -> None:
        """Take the scale of inputs from one batch of states, {layer: [M, H, n, in]} and {layer: bool [M, H, n]}."""


class Table(Gate):
    """A worth per entry, all zeros until fitted (learnevict.train.tables); `write` notes it in the column "worth".

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
class OtherBonus(Scorer):
    """The same table under another bonus for recency than the one it was saved with."""

    gate: Table
    bonus: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", self.gate.columns)

    def write(self, signals: Signals) -> dict[str, Tensor]:
        """As the gate."""
        return self.gate.write(signals)

    def score(self, signals: Signals) -> Tensor:
        """float32 [B, H, N]."""
        return aged(signals, self.bonus)

    def to(self, device: torch.device) -> Scorer:
        """Moves the table."""
        self.gate.to(device)
        return self


def aged(signals: Signals, bonus: Tensor | float) -> Tensor:
    """Worth less `bonus` for every e-fold of age, float32 [B, H, N]."""
    return signals.ledger["worth"] - bonus * torch.log1p(signals.age.clamp_min(0).float())


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
