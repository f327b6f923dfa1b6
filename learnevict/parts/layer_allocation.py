"""How layers share a budget, as something to be learned (learnevict.rl); the allocator that follows it is Profile."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from learnevict.errors import UsageError
from learnevict.parts.allocators import Profile, place_in

GAIN = 8.0
"""Logits per unit of a parameter: as far as a judge's weights move in training, shares have to move further."""


class LayerAllocation(nn.Module):
    """Logits of the layers' shares, linear in the logarithm of the budget; equal until learned.

    Only what tries other shares can teach it, so its parameters are frozen until a trainer of that kind comes along.

    Args:
        num_layers: that evict.
        smallest, largest: slots per layer and head beyond the floor in training, at least 1.

    Raises:
        UsageError: a span that is none.
    """

    def __init__(self, num_layers: int, smallest: int, largest: int) -> None:
        super().__init__()
        if not 1 <= smallest <= largest:
            raise UsageError(f"demand is learned for 1 or more slots beyond the floor, not {smallest} to {largest}")
        self.span = (smallest, largest)
        self.level = nn.Parameter(torch.zeros(num_layers), requires_grad=False)
        self.slope = nn.Parameter(torch.zeros(num_layers), requires_grad=False)

    def logits(self, free: int) -> Float[Tensor, "L"]:
        """Of the shares of `free` slots beyond the floor, with mean 0."""
        found = GAIN * (self.level + self.slope * place_in(self.span, free))
        return found - found.mean()

    def allocator(self, shifts: Float[Tensor, "B L"] | None = None) -> Profile:
        """What follows it; with `shifts`, each row of a batch departs from it."""
        level, slope = ((GAIN * part.detach().double()).tolist() for part in (self.level, self.slope))
        rows = () if shifts is None else tuple(tuple(row) for row in shifts.double().tolist())
        return Profile(tuple(level), tuple(slope), self.span, rows)
