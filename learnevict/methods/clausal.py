"""Clausal: a token's score is that of its place in a clause that begins with a certain word. No other context.

score = mean golden label of (first token id of the clause, place in the clause), per layer and head, - bonus * log(1 + age)

The stronger sibling of lexical: where the first word of a statement says whether it counts (as on the testbed), this table
knows it. What a learned policy has over it is context beyond one clause. Fitted like lexical
(recipes/tables.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from learnevict.config import AnyBudget, Layout
from learnevict.methods import Paper
from learnevict.parts.options import Options, compose
from learnevict.parts.tables import Table, tokens_of
from learnevict.policy import Policy
from learnevict.signals import Signals, StateColumn

PAPER = Paper("Clausal baseline: mean golden label per clause opening and place", None, 2026, kind="learned")


class ClausalGate(Table):
    """A score per (first token id of the clause, place in it).

    Args:
        num_layers: of the base model; num_heads: its kv heads; vocab_size: its token ids.
        separator: token id that ends a clause.
        places: places that are told apart; later ones count as the last.
    """

    columns = (
        *Table.columns,
        StateColumn("opening", dtype=torch.int32),
        StateColumn("following", dtype=torch.int32),
    )

    def __init__(self, num_layers: int, num_heads: int, vocab_size: int, separator: int, places: int) -> None:
        super().__init__(num_layers, num_heads, vocab_size * places)
        self.made = {"separator": separator, "places": places}
        self.separator, self.places = separator, places

    def entries(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Returns table entries of whole texts, int64 [B, T]; padding ends a clause."""
        start = tokens.new_zeros(len(tokens))
        opening, place = self._clauses(torch.where(mask.bool(), tokens, self.separator), start, start)
        return self._entry(opening, place)

    def _entry(self, opening: Tensor, place: Tensor) -> Tensor:
        return opening * self.places + place.clamp_max(self.places - 1)

    def _clauses(self, tokens: Tensor, opening: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the first token of each token's clause and its place, int64 [B, S]; [B] say how the text before ended."""
        index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        begins = torch.zeros_like(tokens, dtype=torch.bool)
        begins[:, 1:] = tokens[:, :-1] == self.separator
        begins[:, 0] = following == 0
        start = torch.where(begins, index, -1).cummax(1).values
        own = start >= 0
        first = torch.where(own, tokens.gather(1, start.clamp_min(0)), opening.unsqueeze(1))
        return first, torch.where(own, index - start, following.unsqueeze(1) + index)

    def write(self, signals: Signals) -> dict[str, Tensor]:
        """See Scorer; the newest slot knows how far its clause has come. Raises GateError without token ids."""
        tokens = tokens_of(signals, "clausal")
        first, following = tokens.new_zeros(2, len(tokens)).unbind(0)
        if signals.position.shape[-1]:
            newest = signals.position[:, :1].argmax(-1, keepdim=True)
            there = signals.position[:, :1].amax(-1)[:, 0] >= 0
            before = [signals.state[name][:, :1].gather(-1, newest)[:, 0, 0] for name in ("opening", "following")]
            first, following = (torch.where(there, part, 0).long() for part in before)
        opening, place = self._clauses(tokens, first, following)
        after = torch.where(tokens == self.separator, 0, place + 1)
        heads = self.table.shape[1]
        return {
            "score": self.looked_up(signals.layer, self._entry(opening, place)),
            "opening": opening.int().unsqueeze(1).expand(-1, heads, -1),
            "following": after.int().unsqueeze(1).expand(-1, heads, -1),
        }


def build(layout: Layout, separator: int = 0, places: int = 8) -> ClausalGate:
    """Returns an empty table for a base model."""
    return ClausalGate(layout.num_layers, layout.num_heads, layout.vocab_size, separator, places)


def policy(budget: AnyBudget, *, gate: ClausalGate, bonus: float | None = None, **options: Unpack[Options]) -> Policy:
    """Keep the places of clauses with the highest label on average; `bonus` as of Table.under."""
    return compose("clausal", budget, gate.under(bonus), **options)
