"""Budgets by demand: what layers were found to need, and what heads win of their layer's best slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learnevict.errors import UsageError
from learnevict.parts.allocators import Competing, best_of_all, in_proportion, largest_remainder

MILLION = 1_000_000


@dataclass(frozen=True)
class Demand(Competing):
    """Layers in proportion to a measured demand, heads to how many of the layer's best slots are theirs.

    Both are raised to the power `smooth`, held within `least` and `most` times their mean, and rescaled, so that the sum over
    layers is L * budget and over heads H * budget. Of what a budget holds beyond its floor, and beside protected slots.

    Attributes:
        layers: slots that each evicting layer needs, in order; empty: all alike.
        floor: share of an equal split that a head's demand is raised to.
    """

    layers: tuple[float, ...] = ()
    smooth: float = 0.5
    least: float = 0.25
    most: float = 2.0
    floor: float = 0.25

    def __post_init__(self) -> None:
        if not (0 <= self.floor <= 1 and 0 <= self.least <= 1 <= self.most and self.smooth >= 0):
            raise UsageError(
                f"demand is held within {self.least} and {self.most} of its mean, above {self.floor} of an equal split, to the "
                f"power {self.smooth}: give floor and least from 0 to 1, most of 1 or more and smooth of 0 or more"
            )
        if any(not 0 < need < float("inf") for need in self.layers):
            raise UsageError(
                "the demand of a layer is a number of slots above 0; measure it with reasonalloc.layer_demand"
            )

    def layer_budget(self, budget: int, rank: int, num_layers: int, floor: int) -> int:
        if not self.layers:
            return budget
        if num_layers != len(self.layers):
            raise UsageError(
                f"demand was measured for {len(self.layers)} layers, but {num_layers} layers of the model evict; measure it on "
                "this model: reasonalloc.layer_demand"
            )
        return in_proportion(
            limited_shares(torch.tensor(self.layers, dtype=torch.float64), self).tolist(), budget, rank, floor
        )

    def shares(self, ordered: Tensor, room: Tensor, free: Tensor) -> Tensor:
        equal = free.unsqueeze(-1).double() / room.shape[1]
        wanted = torch.maximum(best_of_all(ordered, free, room).double(), self.floor * equal)
        exact = (MILLION * free.unsqueeze(-1) * limited_shares(wanted, self)).floor().long()
        return largest_remainder(exact, MILLION, free)


def limited_shares(demand: Tensor, limits: Demand) -> Tensor:
    """Returns shares of 1, float64 [..., n], of a demand [..., n]."""
    smooth = demand.clamp_min(1e-9) ** limits.smooth
    mean = smooth.mean(-1, keepdim=True)
    within = smooth.maximum(limits.least * mean).minimum(limits.most * mean)
    return within / within.sum(-1, keepdim=True)


def num_needed(weights: Tensor, share: float) -> Tensor:
    """Returns how many of the largest weights [..., N] it takes to hold a share of their sum, int64 [...]; 0 for zeros."""
    ordered = weights.sort(-1, descending=True).values
    enough = ordered.cumsum(-1) < share * weights.sum(-1, keepdim=True)
    return (enough.sum(-1) + 1) * (weights.sum(-1) > 0)
