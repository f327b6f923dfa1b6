"""ForesightKV: a scoring network ranks cached tokens by the attention they will receive (arXiv 2602.03203).

    x = [key; value; statistics of the attention it has received so far; its age; the budget]
    score = w3 . GELU(W2 GELU(W1 x + b1) + b2)           per layer and kv head, higher stays (Section 3.2)

The network is trained to order tokens as golden eviction does (learnevict.train). Departures from the paper and its code:
features are means over queries (not sums) and their clock counts tokens (not events), so that they do not depend on the event
period; decayed and undecayed sums are separate per-slot state; probabilities enter as logarithms; the size of every rotary pair
is given beside the rotated key, because it survives rotation; age and budget / length let one network serve many budgets; two
more statistics, the peak so far and the tokens since a token was last needed; two hidden layers; higher means keep. Attention
is read from the last `window` queries of every period: gates remember the period they were trained with, and `policy` uses that
unless told otherwise; so with the allocation: beside the paper's equal budgets (scope "layer"), slots of all heads and layers
may compete ("model"), or layers may get the budget allocation that refinement has learned (`demand`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Unpack

from learnevict.config import AnyBudget, Layout
from learnevict.methods import Paper
from learnevict.parts.allocators import Together
from learnevict.parts.learned import Scope, SlotScorer
from learnevict.parts.options import Options, compose
from learnevict.parts.window import window_statistics
from learnevict.policy import Policy
from learnevict.signals import Signals, StateColumn

PAPER = Paper("ForesightKV: learning long-term contribution for KV cache eviction", "2602.03203", 2026, "learned")
TRAINING = {"learning_rate": 3e-3}
WINDOW = 16
RECENT = (4, 8)  # paper: 8, 16, 32 of a period of 128-256; here scaled to a ring of 16 queries
DECAY = 0.9  # paper (Section 3.2): per event; here per WINDOW tokens
NEEDED = 0.02  # a probability that counts as "needed" for the column "idle"


class ForesightGate(SlotScorer):
    """A slot scorer that accumulates the attention each slot receives; arguments as of SlotScorer (paper: 16 hidden units)."""

    refreshes = True

    def __init__(
        self,
        layout: Layout,
        hidden: int = 64,
        window: int = WINDOW,
        period: int | None = None,
        scope: Scope = "layer",
        demand: Sequence[int] | None = None,
    ) -> None:
        group = layout.num_query_heads // layout.num_heads
        statistics = (5 + len(RECENT)) * group + 5
        super().__init__(layout, statistics, hidden=hidden, window=window, period=period, scope=scope, demand=demand)
        of_queries = [StateColumn(name, (group,)) for name in ("received", "decayed", "peak")]
        self.columns = (*of_queries, StateColumn("tokens"), StateColumn("idle"))

    def refresh(self, signals: Signals) -> dict[str, Tensor]:
        """Adds the attention of the last queries to the per-slot state; once per event."""
        window, state, rows = window_statistics(signals, self.window, RECENT), signals.state, signals.rows
        tokens = (rows.age(rows.block) + 1).view(-1, 1, 1).float()
        left = (DECAY ** (tokens / WINDOW)).unsqueeze(-1)
        return {
            "received": state["received"] + tokens.unsqueeze(-1) * window.mean,
            "decayed": left * state["decayed"] + (1 - left) * window.mean,
            "peak": torch.maximum(state["peak"], window.top),
            "tokens": state["tokens"] + tokens,
            "idle": torch.where(window.top.amax(-1) > NEEDED, 0.0, state["idle"] + tokens),
        }

    def statistics(self, signals: Signals) -> Tensor:
        """Returns logarithms of attention, age, length, budget / length, idle time and position, float32 [B, H, N, c]."""
        window, state, rows = window_statistics(signals, self.window, RECENT), signals.state, signals.rows
        received = state["received"] / state["tokens"].unsqueeze(-1).clamp_min(1)
        attention = [window.mean, window.top, *window.recent, received, state["decayed"], state["peak"]]
        seen = rows.seen.view(-1, 1, 1).float()
        age = signals.age.clamp_min(0).float()
        share = (signals.budget.view(-1, 1, 1).float() / seen).clamp_max(1.0)
        whole = [torch.log(seen).expand_as(age), torch.log(share).expand_as(age)]
        place = signals.place.clamp_min(0).float()
        scalars = [torch.log1p(age), *whole, torch.log1p(state["idle"]), torch.log1p(place)]
        return torch.cat([*(torch.log(part + 1e-4) for part in attention), torch.stack(scalars, -1)], dim=-1)


build = ForesightGate


def policy(budget: AnyBudget, *, gate: ForesightGate, floor: float = 0.2, **options: Unpack[Options]) -> Policy:
    """Evict what the network ranks lowest; paper: every 256 tokens in training, every 128 in its inference code.

    Args:
        floor: share of an equal split that every head keeps, for gates that were trained for the scope "model".

    Warns:
        TrainedOtherwiseWarning: another slack than the gate was trained with.
    """
    gate.warn_if_trained_otherwise(options.setdefault("slack", gate.period or 128))
    together = gate.scope == "model"
    allocator = Together(floor) if together else None if gate.demand is None else gate.demand.allocator()
    return compose("foresightkv", budget, gate, allocator=allocator, scope=gate.scope, **options)
