"""Attention of the last W queries, the family behind SnapKV, PyramidKV, Ada-KV and R-KV.

The published codes differ in every field below and call the result by one name; a method's `variant` is a record of
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from learnevict.errors import UsageError
from learnevict.policy import Scorer
from learnevict.signals import NEVER, Attention, Signals

HIGHEST = torch.finfo(torch.float32).max


def voting_window(window: int | None, recent: int | None, usual: int) -> tuple[int, int]:
    """Returns how many last queries vote and how many last tokens stay: what is not given follows the other, else `usual`.

    Raises:
        UsageError: a window without queries.
    """
    if window is None:
        window = usual if recent is None else max(recent, 1)
    if window < 1:
        raise UsageError(f"a window of {window} queries scores nothing; give 1 or more")
    return window, window if recent is None else recent


@dataclass(frozen=True)
class WindowAttention(Scorer):
    """Attention from the last `window` queries to the slots before them, pooled over neighbouring tokens.

    Slots inside the window rank above all others: its queries score the others.

    Attributes:
        window: W, queries in the ring.
        support: the softmax runs over "all" visible slots, or over the "candidates" before the window.
        group: query heads that share a kv head become one by the maximum of logits ("logit_max") or probabilities
            ("prob_max"), the mean of probabilities ("prob_mean"), or the mean after pooling ("pooled_mean").
        reduce: over queries: "sum", "mean" or "max".
        pool: "max", "avg" (edges count as zeros, as in the authors' code) or "none".
        kernel: tokens per pool, odd.
    """

    window: int = 32
    support: Literal["all", "candidates"] = "all"
    group: Literal["logit_max", "prob_max", "prob_mean", "pooled_mean"] = "pooled_mean"
    reduce: Literal["sum", "mean", "max"] = "sum"
    pool: Literal["max", "avg", "none"] = "max"
    kernel: int = 7

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise UsageError(
                f"a window of {self.window} queries pooled by {self.kernel}: give window >= 1 and an odd kernel"
            )

    def score(self, signals: Signals) -> Tensor:
        return self.importance(signals).masked_fill(~before_window(signals), HIGHEST)

    def importance(self, signals: Signals) -> Tensor:
        """Returns pooled attention of candidates, float32 [B, H, N]; meaningless elsewhere."""
        candidates = before_window(signals)
        total, num_queries = self._attention(signals, candidates)
        if self.reduce == "mean":
            total = total / num_queries.clamp_min(1).view(-1, 1, 1, 1)
        pooled = sum(self._pooled(signals, head, candidates) for head in total.unbind(2))
        assert isinstance(pooled, Tensor)
        return pooled / total.shape[2]

    def _attention(self, signals: Signals, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Returns attention reduced over queries, [B, H, G or 1, N], and the number of queries in each row's window, [B]."""
        total: Tensor | None = None
        num_queries = signals.rows.now.new_zeros(signals.rows.now.shape, dtype=torch.int64)
        for logits, where in signals.window_logits(self.window):
            weights = self._probabilities(signals, logits, where, candidates)
            part = weights.amax(3) if self.reduce == "max" else weights.sum(3)
            both = torch.maximum if self.reduce == "max" else torch.add
            total = part if total is None else both(total, part)
            num_queries = num_queries + (where >= 0).sum(-1)
        assert total is not None
        return total, num_queries

    def _probabilities(self, signals: Signals, logits: Tensor, where: Tensor, candidates: Tensor) -> Tensor:
        """Returns probabilities [B, H, G or 1, w, N] of logits [B, H, G, w, N]; zeros for missing queries."""
        scores = logits
        attention = signals.attention
        visible = signals.visible(where)
        if self.support == "candidates":
            attention = Attention(attention.scaling, attention.softcap)
            visible = visible & candidates[:, :, None, None, :]
        if self.group == "logit_max":
            # Scaling and cap are increasing, so the maximum may be taken first.
            scores = logits.amax(2, keepdim=True)
            attention = Attention(attention.scaling, attention.softcap)
        weights = attention.probabilities(scores, visible)
        if self.group == "prob_max":
            return weights.amax(2, keepdim=True)
        return weights.mean(2, keepdim=True) if self.group == "prob_mean" else weights

    def _pooled(self, signals: Signals, values: Tensor, candidates: Tensor) -> Tensor:
        """Returns [B, H, N] pooled along tokens, among candidates only."""
        half = self.kernel // 2
        if self.pool == "none":
            return values
        if self.pool == "avg":
            return signals.in_order(
                values.masked_fill(~candidates, 0.0),
                lambda ordered: torch.nn.functional.avg_pool1d(ordered, self.kernel, 1, half),
                empty=0.0,
            )
        return max_pool(signals, values, candidates, self.kernel)


def before_window(signals: Signals) -> Tensor:
    """Returns the slots whose token is older than every query of the window, bool [B, H, N]."""
    assert signals.ring is not None
    where = signals.ring[1]
    oldest = where.masked_fill(where < 0, NEVER).amin(-1)
    return signals.occupied & (signals.position < oldest.view(-1, 1, 1))


def max_pool(signals: Signals, values: Tensor, candidates: Tensor, kernel: int) -> Tensor:
    """Returns the maximum over `kernel` neighbouring tokens, candidates only, of values [B, H, N]."""
    return signals.in_order(
        values.masked_fill(~candidates, -torch.inf),
        lambda ordered: torch.nn.functional.max_pool1d(ordered, kernel, 1, kernel // 2),
        empty=-torch.inf,
    )


class WindowStatistics(NamedTuple):
    """Attention that each slot received from the last queries, float32 [B, H, N, G].

    Attributes:
        mean, top: mean and maximum over the window.
        recent: means over the last few queries.
    """

    mean: Tensor
    top: Tensor
    recent: list[Tensor]


def window_statistics(signals: Signals, window: int, spans: Sequence[int]) -> WindowStatistics:
    """Returns the attention of the last `window` queries, and means over the last of each span; computed once per event."""
    memo = signals.memo
    if "window_mean" not in memo:
        batch, heads, num = signals.position.shape
        shape = (batch, heads, signals.query.shape[1] // heads, num)
        total, top, *recent = (torch.zeros(shape, device=signals.position.device) for _ in range(2 + len(spans)))
        for weights, where in signals.window(window):
            total += weights.sum(3)
            top = torch.maximum(top, weights.amax(3))
            for span, part in zip(spans, recent, strict=True):
                late = (signals.rows.age(where) < span).view(batch, 1, 1, -1, 1)
                part += (weights * late).sum(3)
        count = signals.rows.seen.clamp_max(window).view(-1, 1, 1, 1)
        memo["window_mean"], memo["window_top"] = (total / count).mT, top.mT
        for span, part in zip(spans, recent, strict=True):
            memo[f"window_{span}"] = (part / span).mT
    return WindowStatistics(memo["window_mean"], memo["window_top"], [memo[f"window_{span}"] for span in spans])
