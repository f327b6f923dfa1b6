"""Random numbers for slots: hashes of what they are for, so that neither padding nor the other rows of a batch change them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learnevict.ops.random import finalise, hashed, uniform
from learnevict.signals import Signals

SMALLEST = 2.0**-25
"""Half of the step between two uniform numbers, in place of 0."""


def slot_keys(signals: Signals, seed: int) -> Tensor:
    """Returns a random key for every slot, int64 [B, H, N]: another one at every event."""
    head = torch.arange(signals.position.shape[1], device=signals.position.device).view(1, -1, 1)
    return hashed(signals.place, head, signals.rows.seen.view(-1, 1, 1), signals.layer, seed)


def gumbel(keys: Tensor) -> Tensor:
    """Returns numbers of the standard Gumbel distribution, float32: added to log-weights, the largest are a sample without
    replacement."""
    return -(-torch.log1p(-uniform(keys))).clamp_min(SMALLEST).log()


def normal(keys: Tensor) -> Tensor:
    """Returns numbers of the standard normal distribution, float32 (Box and Muller)."""
    radius = (-2 * uniform(keys).clamp_min(SMALLEST).log()).sqrt()
    return radius * (2 * math.pi * uniform(finalise(keys))).cos()
