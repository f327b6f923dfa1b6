"""Gates that look a score up by token ids (lexical, clausal): baselines that learned eviction has to beat."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learnevict.errors import GateError
from learnevict.policy import Gate, Scorer, WrappedScorer
from learnevict.signals import Signals, StateColumn


class Table(Gate):
    """A score per entry, all zeros until fitted (recipes/tables.py); `write` puts it into the column "score".

    Attributes:
        table: float32 [L, H, entries].
        bonus: float32 [], the recency bonus.
    """

    columns = (StateColumn("score"),)

    def __init__(self, num_layers: int, num_heads: int, entries: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_layers, num_heads, entries), requires_grad=False)
        self.bonus = nn.Parameter(torch.zeros(()), requires_grad=False)

    @abstractmethod
    def entries(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Returns the table entries of whole texts, int64 [B, T]; mask [B, T], 0 = padding."""

    def looked_up(self, layer: int, entries: Tensor) -> Tensor:
        """Returns the scores of entries int64 [B, S], float32 [B, H, S]."""
        return self.table[layer][:, entries].transpose(0, 1)

    def score(self, signals: Signals) -> Tensor:
        return self.aged(signals, self.bonus)

    def aged(self, signals: Signals, bonus: Tensor | float) -> Tensor:
        """Returns the token's score less `bonus` for every e-fold of age, float32 [B, H, N]."""
        return signals.state["score"] - bonus * torch.log1p(signals.age.clamp_min(0).float())

    def under(self, bonus: float | None) -> Scorer:
        """Returns the same table under another recency bonus than its own, one for all budgets; None: its own."""
        return self if bonus is None else OtherBonus(self, bonus)


@dataclass(frozen=True)
class OtherBonus(WrappedScorer):
    """A table under another recency bonus than the one it was saved with."""

    scorer: Table
    bonus: float

    def score(self, signals: Signals) -> Tensor:
        return self.scorer.aged(signals, self.bonus)


def tokens_of(signals: Signals, method: str) -> Tensor:
    """Returns the fresh token ids, int64 [B, S]. Raises GateError: the model was called with embeddings, so there are none."""
    if signals.tokens is None:
        raise GateError(f"{method} scores token ids, but the model was called with inputs_embeds; pass input_ids")
    return signals.tokens
