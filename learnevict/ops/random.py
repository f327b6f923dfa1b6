"""Draws without a generator: a hash of what a draw is for, so that it depends on that and on nothing else.

Who draws next, how a batch is padded and how its rows are shared out among processes then changes no draw. SplitMix64's
finaliser on int64, modulo 2**64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hashed(*parts: Tensor | int) -> Tensor:
    """Returns a random key, int64, for whole numbers that are broadcast against each other; their order matters."""
    key = torch.zeros((), dtype=torch.int64)
    for part in parts:
        key = finalise(key + torch.as_tensor(part, dtype=torch.int64))
    return key


def uniform(key: Tensor) -> Tensor:
    """Words as float32 in [0, 1): their top 24 bits."""
    return shift(key, 40).float() * 2.0**-24


def shift(key: Tensor, bits: int) -> Tensor:
    """Returns the logical right shift of int64."""
    return (key >> bits) & ((1 << (64 - bits)) - 1)


def finalise(key: Tensor) -> Tensor:
    """SplitMix64's mixing of int64 keys, modulo 2**64."""
    key = key + (0x9E3779B97F4A7C15 - 2**64)
    key = (key ^ shift(key, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    key = (key ^ shift(key, 27)) * (0x94D049BB133111EB - 2**64)
    return key ^ shift(key, 31)
