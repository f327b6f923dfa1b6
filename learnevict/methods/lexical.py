"""Lexical: every token id has a score, whatever its context. The learned baseline that learned eviction must beat.

score = mean golden label of the token's id, per layer and kv head, - bonus * log(1 + age)

The table is fitted on training seeds (recipes/tables.py), the recency bonus tuned on
validation seeds. A policy that only learned "digits stay, filler goes" does no better than this.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from learnevict.config import Budget, Layout
from learnevict.errors import GateError
from learnevict.methods import Paper
from learnevict.parts.learned import Table, table_policy
from learnevict.parts.options import Options
from learnevict.policy import Policy
from learnevict.signals import Signals, StateColumn

PAPER = Paper("Lexical baseline: mean golden label per token id", None, 2026, kind="learned")


class LexicalGate(Table):
    """A score per token id; all zeros until fitted.

    Args:
        num_layers: of the base model; num_heads: its kv heads; vocab_size: its token ids.
    """

    columns = (StateColumn("score"),)

    def __init__(self, num_layers: int, num_heads: int, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_layers, num_heads, vocab_size), requires_grad=False)
        self.bonus = nn.Parameter(torch.zeros(()), requires_grad=False)

    def entries(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Table entries of whole texts, int64 [B, T]: the token ids."""
        return tokens

    def write(self, signals: Signals) -> dict[str, Tensor]:
        """Look the fresh tokens up.

        Raises:
            GateError: the model was called with embeddings, so there are no ids.
        """
        if signals.tokens is None:
            raise GateError("lexical scores token ids, but the model was called with inputs_embeds; pass input_ids")
        return {"score": self.table[signals.layer][:, signals.tokens].transpose(0, 1)}


def build(layout: Layout) -> LexicalGate:
    """An empty table for a base model."""
    return LexicalGate(layout.num_layers, layout.num_heads, layout.vocab_size)


def policy(
    budget: int | str | Budget, *, gate: LexicalGate, bonus: float | None = None, **options: Unpack[Options]
) -> Policy:
    """Keep the tokens with the highest label on average; arguments as in parts.learned.table_policy."""
    return table_policy("lexical", budget, gate, bonus, **options)
