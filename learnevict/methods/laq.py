"""Lookahead Q-Cache: the model writes a few tokens ahead, and their queries say what to keep (arXiv 2505.20334).

    s_i = max-pool 7 (sum over n lookahead queries, and the last w read, of A[t, i])

The n = 8 tokens are the likeliest, one after the other. They see only what another method, `base`, would keep under the
same budget; their queries are then put to all of it, and they are forgotten. Each event costs n short forwards.

Variants:
    laq++  w = 8: the last 8 queries read vote too, and the last 8 tokens stay
    laq    w = 0: lookahead queries alone

Departures: at every event, inside the prompt and while decoding (schedule="prefill_only" is the paper's single question at the
prompt's end); query heads are pooled apart and then averaged over the group, as in snapkv; the code's mask, which hides up to 8
tokens of the prompt from its own queries, is not copied; tokens after an end of text count as others. What the base would keep
is masked, not copied, so the peak is that of the cache alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from learnevict.config import AnyBudget
from learnevict.errors import UsageError
from learnevict.methods import Paper, load
from learnevict.parts.options import unknown_variant
from learnevict.parts.window import HIGHEST, max_pool
from learnevict.policy import Policy, Questions, WrappedScorer
from learnevict.signals import Signals, StateColumn

PAPER = Paper(
    "Lookahead Q-Cache: Achieving More Consistent KV Cache Eviction via Pseudo Query", "2505.20334", 2025,
    decides=("wrapper",),
)  # fmt: skip
VARIANTS = {"laq++": 8, "laq": 0}
"""The last queries read that vote beside the lookahead ones."""


@dataclass(frozen=True)
class Lookahead(WrappedScorer):
    """Attention of queries that are still to come, and of the last ones read.

    Attributes:
        first: whose choice the lookahead tokens see.
        num_tokens: n.
        past: w.
    """

    first: Policy
    num_tokens: int = 8
    past: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        own = {"columns": (*self.scorer.columns, StateColumn("looked")), "asks": True}
        for name, value in {**own, "window": max(self.scorer.window, self.past)}.items():
            object.__setattr__(self, name, value)

    def score(self, signals: Signals) -> Tensor:
        return signals.state["looked"]

    def ask(self, questions: Questions) -> dict[int, dict[str, Tensor]]:
        chosen = {layer: self.first.keep(self._of_base(signals)) for layer, signals in questions.layers.items()}
        visible = {layer: keep for layer, keep in chosen.items() if keep is not None}
        tokens = questions.next_tokens().unsqueeze(-1).repeat(1, self.num_tokens)
        queries: dict[int, Tensor] = {}
        for written in range(1, self.num_tokens + 1):
            following = questions.run(
                tokens[:, :written], lambda layer, query, _: queries.update({layer: query}), visible
            )
            tokens[:, written : written + 1] = following.unsqueeze(-1)[:, : self.num_tokens - written]
        return {layer: {"looked": self._votes(questions.layers[layer], query)} for layer, query in queries.items()}

    def _of_base(self, signals: Signals) -> Signals:
        """Returns what the base sees: no more queries than it asks for, because its window begins where they do."""
        assert signals.ring is not None
        (queries, positions), size = signals.ring, self.scorer.window
        if size >= queries.shape[2]:
            return signals
        order = positions.argsort(-1)[:, queries.shape[2] - size :]
        index = order[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
        return replace(signals, ring=(queries.gather(2, index), positions.gather(1, order)), memo={})

    def _votes(self, signals: Signals, query: Tensor) -> Tensor:
        batch, heads, num = signals.position.shape
        logits = signals.slots.logits(query.reshape(batch, heads, -1, query.shape[-1]))
        logits = logits.view(batch, heads, -1, self.num_tokens, num)
        votes = signals.attention.probabilities(logits, signals.occupied[:, :, None, None]).sum(3)
        for weights, _ in signals.window(self.past):
            votes = votes + weights.sum(3)
        before = signals.occupied & (signals.age >= self.past)
        pooled = [max_pool(signals, head, before, 7) for head in votes.unbind(2)]
        return torch.stack(pooled).mean(0).masked_fill(~before, HIGHEST)


def policy(
    budget: AnyBudget,
    *,
    base: str = "snapkv",
    variant: str = "laq++",
    tokens: int = 8,
    recent: int | None = None,
    **options: Any,
) -> Policy:
    """Keep what the next tokens would attend to.

    Args:
        base: the method whose choice those tokens see (snapkv: the paper).
        variant: see above.
        tokens: that are written ahead (8: the paper).
        recent: last tokens that stay; None: those whose queries vote.
        **options: of the base.

    Raises:
        UsageError: no tokens, or a base that asks itself or ranks layers together.
    """
    if variant not in VARIANTS:
        raise unknown_variant("laq", variant, VARIANTS)
    first = load(base).policy(budget, **options, **({} if recent is None else {"recent": recent}))
    if tokens < 1 or first.deferred:
        raise UsageError(
            f"laq writes 1 token or more ahead, under a base that decides layer by layer; tokens={tokens} with {base} is not "
            "that"
        )
    past = VARIANTS[variant]
    guard = replace(first.guard, recent=past if recent is None else recent)
    return replace(first, scorer=Lookahead(first.scorer, first, tokens, past), guard=guard, name="laq")
