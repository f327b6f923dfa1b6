"""R-KV: attended and not redundant (arXiv 2505.24133).

s = lambda * I - (1 - lambda) * R (section 3.4): I is the attention of the last 8 queries, the largest logit of the
group, softmax over the tokens before the window, mean over queries, max-pool 7. R is the redundancy of keys (section 3.3):
M_ij = cos(k_i, k_j), 0 for i = j; in every row i the newest j with M_ij > 0.5 is set to 0, so the newest member of a cluster is
not called redundant; R = softmax over j of (1 / N) sum over i of M_ij.

Variants: "paper" has lambda = 0.1, "code" the authors' class default 0.07.

Departures: neighbours and "latest" go by position, not by a slot order that was shuffled by the last event; every row
of a batch has its own R (the authors' code uses row 0's for all); a row of M without a neighbour above the threshold loses
nothing (the authors' code zeroes its first column); events also inside the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack

from learnevict.config import AnyBudget
from learnevict.methods import Paper
from learnevict.parts.options import ScheduleOptions, compose, unknown_variant
from learnevict.parts.window import HIGHEST, WindowAttention, before_window
from learnevict.policy import Policy, Scorer
from learnevict.signals import EMPTY, Signals

PAPER = Paper("R-KV: Redundancy-aware KV Cache Compression for Reasoning Models", "2505.24133", 2025)
MIX = {"paper": 0.1, "code": 0.07}


@dataclass(frozen=True)
class ImportantAndNew(Scorer):
    """Attention of the last queries less redundancy of the key."""

    mix: float = 0.1
    threshold: float = 0.5
    window: int = 8

    def score(self, signals: Signals) -> Tensor:
        attention = WindowAttention(self.window, "candidates", "logit_max", "mean")
        score = self.mix * attention.importance(signals)
        if self.mix < 1:
            score = score - (1 - self.mix) * redundancy(signals, self.threshold)
        return score.masked_fill(~before_window(signals), HIGHEST)


def redundancy(signals: Signals, threshold: float = 0.5) -> Tensor:
    """Returns R, float32 [B, H, N], which sums to 1 over occupied slots; keys above `threshold` are alike.

    Rows of M are visited a few at a time: nothing as large as N x N, or as the layer's keys, exists.
    """
    position, occupied = signals.position, signals.occupied
    norm = signals.per_slot(lambda keys, _: torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)) + 1e-8
    total = torch.zeros_like(norm)
    there = position.unsqueeze(2)
    for part, keys, _ in signals.pieces(position.shape[-1]):
        rows = (keys.float() / norm[:, :, part, None]).to(keys.dtype)
        here = position[:, :, part].unsqueeze(3)
        alike = signals.slots.logits(rows).float() / norm.unsqueeze(2)
        alike = alike.masked_fill((here == EMPTY) | (there == EMPTY) | (here == there), 0.0)
        newest = torch.where(alike > threshold, there, EMPTY).amax(-1, keepdim=True)
        total += alike.masked_fill(there == newest, 0.0).sum(2)
    mean = total / occupied.sum(-1, keepdim=True).clamp_min(1)
    return mean.masked_fill(~occupied, torch.finfo(torch.float32).min).softmax(-1)


def policy(
    budget: AnyBudget,
    *,
    variant: str = "paper",
    mix: float | None = None,
    threshold: float = 0.5,
    window: int = 8,
    recent: int | None = None,
    **options: Unpack[ScheduleOptions],
) -> Policy:
    """Keep what is attended to and not said elsewhere.

    Args:
        variant: see above.
        mix: lambda, 1 is attention alone; None: the variant's.
        threshold: cosine above which keys are alike (0.5: the authors' code).
        window: queries that vote (alpha = 8: section 4.1).
        recent: last tokens that stay; None: the window.
    """
    if variant not in MIX:
        raise unknown_variant("rkv", variant, MIX)
    scorer = ImportantAndNew(MIX[variant] if mix is None else mix, threshold, window)
    return compose("rkv", budget, scorer, recent=window if recent is None else recent, **options)
