"""Vectors in a few bits: groups of channels, each with a lowest value and a step of its own (round to nearest, asymmetric)."""

from __future__ import annotations

from itertools import count

import torch
from torch import Tensor

BITS = (2, 4, 8)
GROUP = 64
"""The most channels that share a step (QPruningKV: 64)."""


def num_groups(width: int) -> int:
    """Returns into how many equal groups of at most GROUP channels a vector is cut."""
    return next(num for num in count(-(-width // GROUP)) if width % num == 0)


def packed_width(width: int, bits: int) -> int:
    """Returns the bytes that the codes of `width` channels take."""
    return -(-width * bits // 8)


def quantise(vectors: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns vectors [..., d] in `bits` bits: codes uint8 [..., ceil(d * bits / 8)], lowest values and steps [..., groups].

    x is stored as round((x - lowest) / step), step = (max - min) / (2^bits - 1) of its group; it is off by at most half a step,
    and by the rounding of lowest value and step to the dtype of the vectors.
    """
    grouped = vectors.unflatten(-1, (num_groups(vectors.shape[-1]), -1))
    low, high = grouped.amin(-1), grouped.amax(-1)
    levels = 2**bits - 1
    step = ((high.float() - low.float()) / levels).to(vectors.dtype)
    scaled = (grouped.float() - low.float().unsqueeze(-1)) / step.float().masked_fill(step == 0, 1.0).unsqueeze(-1)
    return pack(scaled.round_().clamp_(0, levels).flatten(-2).to(torch.uint8), bits), low, step


def dequantise(codes: Tensor, low: Tensor, step: Tensor, width: int, bits: int) -> Tensor:
    """Returns the vectors [..., width] that `quantise` has stored, in the dtype of `low`."""
    grouped = unpack(codes, width, bits).to(low.dtype).unflatten(-1, (low.shape[-1], -1))
    return torch.addcmul(low.unsqueeze(-1), grouped, step.unsqueeze(-1)).flatten(-2)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Returns codes below 2^bits, uint8 [..., d], several to a byte, the first in the lowest bits."""
    each = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    packed = codes[..., 0].clone()
    for place in range(1, each):
        packed |= codes[..., place] << (bits * place)
    return packed


def unpack(packed: Tensor, width: int, bits: int) -> Tensor:
    """Returns the first `width` codes, uint8 [..., width]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)[..., :width]
