"""OBCache: keep what attention's output would miss, by Optimal Brain Damage on the cache (arXiv 2510.07651).

The squared error of the output, to second order, if a slot's value, key or both were set to zero, summed over the last W
queries and the query heads of the group (appendix B.5), max-pooled over 7 neighbours; see parts.output_error.saliency.

window=None adds up every query so far instead (the H2O form), window=1 asks the newest one alone (the TOVA form).

Departures: float32 throughout (squares of attention vanish in float16); votes at every event from a ring of queries, see
snapkv; a slot whose logit is 0 has no key saliency, because zeroing a key is not evicting it: caote is exact for that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack

from learnevict.config import AnyBudget
from learnevict.methods import Paper
from learnevict.parts.options import ScheduleOptions, compose, unknown_variant
from learnevict.parts.output_error import saliency
from learnevict.parts.window import HIGHEST, before_window, max_pool
from learnevict.policy import Policy, Scorer
from learnevict.signals import Signals, StateColumn

PAPER = Paper("OBCache: Optimal Brain KV Cache Pruning for Efficient Long-Context LLM Inference", "2510.07651", 2025)
VARIANTS = ("value", "key", "joint")
TOGETHER = 16
"""Queries whose saliency is added at a time."""


@dataclass(frozen=True)
class WindowSaliency(Scorer):
    """Saliency by the last `window` queries."""

    part: str = "joint"
    window: int = 16
    kernel: int = 7

    def score(self, signals: Signals) -> Tensor:
        before, total = before_window(signals), torch.zeros_like(signals.position, dtype=torch.float32)
        for logits, where in signals.window_logits(self.window):
            total = total + saliency(signals, logits, where, self.part)
        return max_pool(signals, total, before, self.kernel).masked_fill(~before, HIGHEST)


@dataclass(frozen=True)
class AllSaliency(Scorer):
    """Saliency by every query so far."""

    part: str = "joint"
    kernel: int = 7
    columns = (StateColumn("saliency"),)
    observes = True

    def observe(self, signals: Signals) -> dict[str, Tensor]:
        total, heads = signals.state["saliency"], signals.position.shape[1]
        query = signals.query.unflatten(1, (heads, -1))  # [B, H, G, S, d]
        for some, where in zip(query.split(TOGETHER, 3), signals.query_position.split(TOGETHER, 1), strict=True):
            logits = signals.slots.logits(some.flatten(2, 3)).unflatten(2, some.shape[2:4])
            total = total + saliency(signals, logits, where, self.part)
        return {"saliency": total}

    def score(self, signals: Signals) -> Tensor:
        return max_pool(signals, signals.state["saliency"], signals.occupied, self.kernel)


def policy(
    budget: AnyBudget,
    *,
    variant: str = "joint",
    window: int | None = 16,
    kernel: int = 7,
    recent: int | None = None,
    **options: Unpack[ScheduleOptions],
) -> Policy:
    """Keep what attention's output would miss.

    Args:
        variant: what is zeroed: "value", "key" or "joint".
        window: queries that ask (16: the paper's runs on SnapKV); None: every query so far.
        kernel: tokens that are max-pooled (7: the same); 1 for none.
        recent: last tokens that stay; None: the window, or 8.
    """
    if variant not in VARIANTS:
        raise unknown_variant("obcache", variant, VARIANTS)
    scorer = AllSaliency(variant, kernel) if window is None else WindowSaliency(variant, window, kernel)
    return compose("obcache", budget, scorer, recent=(window or 8) if recent is None else recent, **options)
