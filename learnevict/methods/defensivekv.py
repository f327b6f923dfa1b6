"""DefensiveKV: the most that any recent query needed, and never less than the average (arXiv 2510.13334).

s_j = max over query heads of the group and the last 32 queries of A_tj;  s_j <- max(s_j, mean of s): two lines, against
the mean that SnapKV takes, which forgets a token that one query in thirty needs. A is pooled by 5 neighbours first,
query by query, and keeps its sum; s is multiplied by the size of the value, and heads share the layer's budget as in Ada-KV.

Departures: |v| (1-norm) for |W_o v|, which no cache knows; the first stage that the authors' code takes over from
CriticalKV (tokens up to 90 % of the attention go first) is left out; votes at every event, see snapkv. Layer-DefensiveKV,
whose layers compete too, is not built.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack

from learnevict.config import AnyBudget
from learnevict.methods import Paper
from learnevict.parts.allocators import Ada
from learnevict.parts.options import ScheduleOptions, compose
from learnevict.parts.window import HIGHEST, before_window, voting_window
from learnevict.policy import Policy, Scorer
from learnevict.signals import Signals

PAPER = Paper(
    "Taming the Fragility of KV Cache Eviction in LLM Inference", "2510.13334", 2025, decides=("score", "allocation")
)


@dataclass(frozen=True)
class WorstCase(Scorer):
    """Largest attention from the last `window` queries, at least the mean, times the size of the value."""

    window: int = 32
    kernel: int = 5

    def score(self, signals: Signals) -> Tensor:
        before = before_window(signals)
        most = torch.zeros_like(signals.position, dtype=torch.float32)
        for weights, _ in signals.window(self.window):
            most = torch.maximum(most, self._pooled(signals, weights, before[:, :, None, None, :]).amax((2, 3)))
        mean = (most * before).sum(-1, keepdim=True) / before.sum(-1, keepdim=True).clamp_min(1)
        size = signals.per_slot(lambda _, values: values.float().abs().sum(-1))
        return (torch.maximum(most, mean) * size).masked_fill(~before, HIGHEST)

    def _pooled(self, signals: Signals, weights: Tensor, before: Tensor) -> Tensor:
        """Returns weights [B, H, G, w, N] averaged over neighbouring candidates, each query's sum unchanged."""
        weights = weights * before
        order = signals.order[:, :, None, None, :].expand_as(weights)
        rows = weights.gather(-1, order).flatten(0, 3).unsqueeze(1)
        pooled = torch.nn.functional.avg_pool1d(rows, self.kernel, 1, self.kernel // 2).view_as(weights)
        pooled = torch.empty_like(weights).scatter_(-1, order, pooled) * before
        tiny = torch.finfo(torch.float32).tiny
        return pooled * (weights.sum(-1, keepdim=True) / pooled.sum(-1, keepdim=True).clamp_min(tiny))


def policy(
    budget: AnyBudget,
    *,
    alpha: float = 0.2,
    window: int | None = None,
    recent: int | None = None,
    **options: Unpack[ScheduleOptions],
) -> Policy:
    """Keep what some recent query needed.

    Args:
        alpha: share that heads divide equally, see adakv.
        window: queries that vote (32: the authors' code); None: `recent` if given.
        recent: last tokens that stay; None: the window.
    """
    window, recent = voting_window(window, recent, 32)
    return compose("defensivekv", budget, WorstCase(window), recent=recent, allocator=Ada(alpha), **options)
