"""Random eviction: the floor under every comparison.

A token's score is a hash of (seed, layer, kv head, position in its row): SplitMix64's finaliser, top 24 bits. Nothing
depends on the row's index or on padding, so a row alone evicts what it evicts in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack

from learnevict.config import AnyBudget
from learnevict.methods import Paper
from learnevict.ops.random import finalise, uniform
from learnevict.parts.options import Options, compose
from learnevict.policy import Policy, Scorer
from learnevict.signals import Signals

PAPER = Paper("Random eviction", None, 2023, kind="reference")


@dataclass(frozen=True)
class Hashed(Scorer):
    """Uniform in [0, 1), fixed for each token of a layer and head."""

    seed: int = 0

    def score(self, signals: Signals) -> Tensor:
        place = signals.place.long()
        head = torch.arange(place.shape[1], device=place.device).view(1, -1, 1)
        start = finalise(torch.full_like(head, self.seed) ^ 0x5E_ED)
        word = finalise(finalise(start + (signals.layer << 20) + head) + place)
        return uniform(word)


def policy(budget: AnyBudget, *, seed: int = 0, **options: Unpack[Options]) -> Policy:
    """Keep a random subset beside the guards: another seed, another subset."""
    return compose("random", budget, Hashed(seed), **options)
