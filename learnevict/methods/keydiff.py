"""KeyDiff: keys unlike the average key are kept (arXiv 2504.15364).

s_j = -cos(k_j, mean over i of k_i / ||k_i||), over the slots held (section 3, and kvpress); events after every block,
as in the paper. Keys are post-RoPE, as stored.

Departures: sinks and recent tokens are protected.
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

PAPER = Paper("KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference", "2504.15364", 2025)


@dataclass(frozen=True)
class Unlikeness(Scorer):
    """Minus the cosine to the mean direction of the keys held."""

    def score(self, signals: Signals) -> Tensor:
        batch, heads, _ = signals.position.shape
        occupied = signals.occupied.float().unsqueeze(-1)
        total: Tensor | float = 0.0
        width = signals.query.shape[-1]
        for part, keys, _ in signals.pieces(width):
            total = total + (directions(keys) * occupied[:, :, part]).sum(2)
        assert isinstance(total, Tensor)
        anchor = directions(total).view(batch, heads, 1, -1)  # the mean has the direction of the sum
        return -signals.per_slot(lambda keys, _: (directions(keys) * anchor).sum(-1), width)


def directions(vectors: Tensor) -> Tensor:
    """Returns unit vectors in float32; zero stays zero."""
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


def policy(budget: AnyBudget, **options: Unpack[Options]) -> Policy:
    """Keep keys that differ from the average."""
    return compose("keydiff", budget, Unlikeness(), **options)
