"""TOVA: keep what the newest query attends to (arXiv 2401.06104).

s_j = attention of the last query, averaged over all query heads of the layer (section 3.2); every head of a layer keeps
the same tokens. With slack=0 one token goes at every step, as in the paper; otherwise the query is the last one of each
block.

Departures: sinks 4 and recent 8 are protected by default; the paper protects nothing but what attention protects.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack

from learnevict.config import AnyBudget
from learnevict.methods import Paper
from learnevict.parts.options import Options, compose
from learnevict.policy import Policy, Scorer
from learnevict.signals import Signals

PAPER = Paper("Transformers are Multi-State RNNs", "2401.06104", 2024)


@dataclass(frozen=True)
class LastAttention(Scorer):
    """Attention of the newest query, one value for all heads of the layer."""

    window = 1

    def score(self, signals: Signals) -> Tensor:
        """Returns scores, float32 [B, H, N]; heads hold the same tokens, in any order of storage, and are matched by order."""
        weights = next(signals.window(1))[0].mean((2, 3))
        shared = weights.gather(-1, signals.order).mean(1, keepdim=True)
        return torch.empty_like(weights).scatter_(-1, signals.order, shared.expand_as(weights).contiguous())


def policy(budget: AnyBudget, **options: Unpack[Options]) -> Policy:
    """Keep what the newest query looks at."""
    return compose("tova", budget, LastAttention(), **options)
