"""Lexical: every token id has a score, whatever its context. The learned baseline that learned eviction must beat.

score = mean golden label of the token's id, per layer and kv head, - bonus * log(1 + age)

The table is fitted on training seeds (recipes/tables.py), the recency bonus tuned on
validation seeds. A policy that only learned "digits stay, filler goes" does no better than this.
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from learnevict.config import AnyBudget, Layout
from learnevict.methods import Paper
from learnevict.parts.options import Options, compose
from learnevict.parts.tables import Table, tokens_of
from learnevict.policy import Policy
from learnevict.signals import Signals

PAPER = Paper("Lexical baseline: mean golden label per token id", None, 2026, kind="learned")


class LexicalGate(Table):
    """A score per token id; arguments as of Table."""

    def entries(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Returns the token ids."""
        return tokens

    def write(self, signals: Signals) -> dict[str, Tensor]:
        """See Scorer; raises GateError without token ids."""
        return {"score": self.looked_up(signals.layer, tokens_of(signals, "lexical"))}


def build(layout: Layout) -> LexicalGate:
    """Returns an empty table for a base model."""
    return LexicalGate(layout.num_layers, layout.num_heads, layout.vocab_size)


def policy(budget: AnyBudget, *, gate: LexicalGate, bonus: float | None = None, **options: Unpack[Options]) -> Policy:
    """Keep the tokens with the highest label on average; `bonus` as of Table.under."""
    return compose("lexical", budget, gate.under(bonus), **options)
