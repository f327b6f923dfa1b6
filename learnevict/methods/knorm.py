"""KNorm: keys of small norm are kept (arXiv 2406.11430).

s_j = -||k_j||_2 (section 3); RoPE does not change it. Models that normalise keys (Qwen3, Gemma3) leave it little to
see.

Departures: all layers evict (KVCache-Factory skips layers 0 and 1, which would leave them unbounded); events also while
decoding; sinks and recent tokens are protected.
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

PAPER = Paper("A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", "2406.11430", 2024)


@dataclass(frozen=True)
class KeyNorm(Scorer):
    """Minus the norm of the key."""

    def score(self, signals: Signals) -> Tensor:
        return -signals.per_slot(lambda keys, values: torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32))


def policy(budget: AnyBudget, **options: Unpack[Options]) -> Policy:
    """Keep keys of small norm."""
    return compose("knorm", budget, KeyNorm(), **options)
