"""VaSE: values of a large range stay, and of the rest a random sample (arXiv 2606.03928).

A few values of reasoning models are very large, and a cache without them fails; among the others chance does better than
always the same ranking. range_j = max over d of v_j - min over d of v_j.

Variants:
    attention  (VaSE-AttnV) a quarter of the budget goes to the largest ranges, the rest is drawn without replacement with
               weights a = avg-pool 5 of the mean attention of the last 64 queries, softmax over the tokens before them
    sketch     (VaSE-DKV) s = |k G|^2 |v G|^2 with a Gaussian matrix G [d, 20], shared by heads and drawn anew at every event
    fixed      (CurDKV) the same with one G for ever

Departures: the draw is log a plus Gumbel noise, which is the same draw and cannot run out of weights; noise is a hash of
seed, layer, head, token and event; sinks are guarded beside the quarter (the authors count them in it); events also inside the
prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack

from learnevict.config import AnyBudget
from learnevict.methods import Paper
from learnevict.ops import keep_top
from learnevict.ops.random import hashed
from learnevict.parts.draws import gumbel, normal, slot_keys
from learnevict.parts.options import ScheduleOptions, compose, unknown_variant
from learnevict.parts.window import HIGHEST, WindowAttention, before_window, voting_window
from learnevict.policy import Policy, Scorer
from learnevict.signals import Signals

PAPER = Paper("Value-Aware Stochastic KV Cache Eviction for Reasoning Models", "2606.03928", 2026)
VARIANTS = ("attention", "sketch", "fixed")
RANK = 20


@dataclass(frozen=True)
class LargeOrDrawn(Scorer):
    """Values of the largest range first, then a sample by attention."""

    window: int = 64
    share: float = 0.25
    seed: int = 0

    def score(self, signals: Signals) -> Tensor:
        before = before_window(signals)
        weights = WindowAttention(self.window, "candidates", "prob_mean", "mean", "avg", 5).importance(signals)
        drawn = weights.clamp_min(torch.finfo(torch.float32).tiny).log() + gumbel(slot_keys(signals, self.seed))
        size = signals.per_slot(lambda _, values: (values.amax(-1) - values.amin(-1)).float())
        count = (self.share * signals.budget).long().view(-1, 1).expand(size.shape[:2])
        large = keep_top(size.masked_fill(~before, -torch.inf), signals.position, count)
        return drawn.masked_fill(large | ~before, HIGHEST)


@dataclass(frozen=True)
class Sketch(Scorer):
    """Squared norms of key and value, seen through a random matrix."""

    seed: int = 0
    fixed: bool = False

    def score(self, signals: Signals) -> Tensor:
        def size(states: Tensor) -> Tensor:
            return (states.float() @ self._matrix(signals, states.shape[-1])).square().sum(-1)

        return signals.per_slot(lambda keys, values: size(keys) * size(values), RANK)

    def _matrix(self, signals: Signals, width: int) -> Tensor:
        """Returns G, float32 [B, 1, width, RANK]."""
        event = torch.zeros_like(signals.rows.seen) if self.fixed else signals.rows.seen
        place = torch.arange(width * RANK, device=event.device).view(width, RANK)
        return normal(hashed(place, event.view(-1, 1, 1, 1), signals.layer, self.seed)) / math.sqrt(RANK)


def policy(
    budget: AnyBudget,
    *,
    variant: str = "attention",
    share: float = 0.25,
    window: int | None = None,
    seed: int = 0,
    recent: int | None = None,
    **options: Unpack[ScheduleOptions],
) -> Policy:
    """Keep values of a large range and a sample of the rest.

    Args:
        variant: see above.
        share: of the budget that the largest ranges get (0.25: the paper).
        window: queries that give the weights (64: the authors' code); None: `recent` if given.
        seed: of the draws.
        recent: last tokens that stay; None: the window.
    """
    if variant not in VARIANTS:
        raise unknown_variant("vase", variant, VARIANTS)
    window, recent = voting_window(window, recent, 64)
    scorer = LargeOrDrawn(window, share, seed) if variant == "attention" else Sketch(seed, variant == "fixed")
    return compose("vase", budget, scorer, recent=recent, **options)
