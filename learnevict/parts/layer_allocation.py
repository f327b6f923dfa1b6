"""Layer budget allocation that is learned by reinforcement (learnevict.rl); its allocator is Profile."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from learnevict.errors import UsageError
from learnevict.parts.allocators import Profile, place_in

GAIN = 8.0
"""Logits per unit of a parameter: allocations have to move further in training than a scorer's weights."""


class LayerAllocation(nn.Module):
    """Logits of the layers' shares, linear in the logarithm of the budget; equal until learned.

    Only a trainer that perturbs the shares learns from them, so its parameters are frozen until one unfreezes them.

    Args:
        num_layers: that evict.
        smallest, largest: slots per layer and head beyond the floor in training, at least 1.

    Raises:
        UsageError: smallest below 1 or above largest.
    """

    def __init__(self, num_layers: int, smallest: int, largest: int) -> None:
        super().__init__()
        if not 1 <= smallest <= largest:
            raise UsageError(
                f"layer budgets are learned for 1 or more slots beyond the floor, not {smallest} to {largest}"
            )
        self.span = (smallest, largest)
        self.level = nn.Parameter(torch.zeros(num_layers), requires_grad=False)
        self.slope = nn.Parameter(torch.zeros(num_layers), requires_grad=False)

    def logits(self, free: int) -> Float[Tensor, "L"]:
        """Returns the logits of the shares of `free` slots beyond the floor, with mean 0."""
        found = GAIN * (self.level + self.slope * place_in(self.span, free))
        return found - found.mean()

    def allocator(self, perturbations: Float[Tensor, "B L"] | None = None) -> Profile:
        """Returns the allocator with these shares; `perturbations` of the logits, if any, are of each row of a batch."""
        level, slope = ((GAIN * part.detach().double()).tolist() for part in (self.level, self.slope))
        rows = () if perturbations is None else tuple(tuple(row) for row in perturbations.double().tolist())
        return Profile(tuple(level), tuple(slope), self.span, rows)
