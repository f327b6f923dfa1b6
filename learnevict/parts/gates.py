"""Two kinds of gates, and what their trainers ask of them: judges that rank slots, tables that look entries up."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from learnevict.policy import Gate
from learnevict.signals import Signals


class Judge(Gate):
    """Scores every slot by itself, from features; trained on recorded states (learnevict.train.ranker).

    Attributes:
        calibrated: bool [], whether `calibrate` has been called.
    """

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
    """A worth per entry, all zeros until fitted (learnevict.train.tables).

    Attributes:
        table: float32 [L, H, entries].
        bonus: float32 [], for recency.
    """

    table: nn.Parameter
    bonus: nn.Parameter

    @abstractmethod
    def entries(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Table entries of whole texts, int64 [B, T]; mask [B, T], 0 = padding."""
