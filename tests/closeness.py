"""How near two tensors are, in proportion to the largest magnitude expected.

Float32 sums round in proportion to the terms they add, and differently on every processor, so a fixed distance that holds on
one machine fails on another as soon as numbers are large, and proves nothing where they are small. Tests therefore state how
large an error may be beside the largest magnitude of the expected tensor. One step of float32 is 6e-8 of a number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SUMS = 1e-5
"""Bound for float32 sums of some hundred terms against other code; rounding reaches a tenth of it, an error in a formula
goes far beyond."""


def distance(actual: Any, expected: Any, where: Tensor | None = None, scale: float | None = None) -> float:
    """The largest difference, divided by the largest finite magnitude expected.

    Args:
        actual, expected: tensors of one shape, numbers, or lists of numbers.
        where: only entries at which this is set, over leading dimensions, are compared; a mask [B, T] selects real tokens.
        scale: divide by this instead; for sums that cancel, whose terms are larger than what comes out.

    Returns:
        0.0 if all entries are equal; infinite where infinities or NaN differ, or if zeros are expected and not found.
    """
    one, other = (torch.as_tensor(part).detach().double() for part in (actual, expected))
    assert one.shape == other.shape, f"shapes {tuple(one.shape)} and {tuple(other.shape)}"
    if where is not None:
        one, other = one[where.bool()], other[where.bool()]
    assert one.numel() > 0, "nothing to compare"
    apart = ~((one == other) | (one.isnan() & other.isnan()))
    if not apart.any():
        return 0.0
    difference = (one - other)[apart].abs()
    if not difference.isfinite().all():
        return float("inf")
    scale = scale or float(other[other.isfinite()].abs().max())
    return float(difference.max()) / scale if scale else float("inf")


def close(
    actual: Any,
    expected: Any,
    rel: float = SUMS,
    where: Tensor | None = None,
    *,
    scale: float | None = None,
    about: str = "values",
) -> None:
    """Asserts that `distance` is at most `rel`, and reports it."""
    found = distance(actual, expected, where, scale)
    assert found <= rel, (
        f"{about} differ by {found:.2g} of the largest magnitude expected; at most {rel:.2g} is rounding"
    )
