"""Sums over the processes of one launch, for what belongs to the whole batch and not to a process's share of it.

Every process has to call these as often as the others. Alone, they are the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as processes


def count() -> int:
    """Processes of this launch."""
    return processes.get_world_size() if processes.is_available() and processes.is_initialized() else 1


def summed(value: Tensor) -> Tensor:
    """Returns the sum over processes, without gradient."""
    if count() == 1:
        return value.detach()
    total = value.detach().clone()
    processes.all_reduce(total)
    return total


def highest(value: int, device: torch.device | str = "cpu") -> int:
    """Returns the largest of all processes' numbers.

    Args:
        value: this process's.
        device: one that the processes' backend can send from.
    """
    if count() == 1:
        return value
    most = torch.tensor(value, device=device)
    processes.all_reduce(most, op=processes.ReduceOp.MAX)
    return int(most)


def ratio(numerator: Tensor, denominator: Tensor, least: float = 1.0) -> Tensor:
    """Returns numerator / max(denominator, least), of the batch of all processes.

    The value is the same in all of them. The gradient is that of a process's own part, times their number, so that its mean
    over processes, which is what data-parallel training takes, is the gradient of the whole.

    Args:
        numerator: a sum over the rows of this process [], maybe with gradient.
        denominator: another [], without gradient.
        least: guards against an empty batch.
    """
    if count() == 1:
        return numerator / denominator.clamp_min(least)
    own = numerator.detach()
    whole = summed(torch.stack([own, denominator.detach().to(own.dtype)]))
    counted = whole[1].clamp_min(least)
    return whole[0] / counted + (numerator - own) * (count() / counted)
