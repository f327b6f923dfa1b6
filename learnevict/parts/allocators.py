"""Layer and head budget allocation: over layers (Pyramid, Profile), heads of a layer (Ada) or all heads (Together).

LayerAllocation is learned by reinforcement (learnevict.rl); its allocator is a Profile.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from learnevict.errors import UsageError
from learnevict.policy import Allocator, Uniform

MILLE = 1000
GAIN = 8.0
"""Logits per unit of a LayerAllocation's parameters: allocations have to move further in training than a scorer's weights."""


@dataclass(frozen=True)
class Pyramid(Uniform):
    """More for early layers, linearly less with depth; the sum over layers is exactly L * budget.

    The pyramid splits what a budget holds beyond `floor` (guards, fresh block, one slot): with base = budget - floor
    the last layer gets base / beta and the first 2 * base - base / beta, from the first event on. Fractions are settled by
    largest remainder, ties early.
    """

    beta: float = 20.0

    def __post_init__(self) -> None:
        if self.beta < 1:
            raise UsageError(f"a pyramid's beta is at least 1 (1 is uniform), not {self.beta}")

    def layer_budget(self, budget: int, rank: int, num_layers: int, floor: int) -> int:
        base = budget - floor
        if num_layers == 1 or base <= 0:
            return budget
        low = base / self.beta
        step = 2 * (base - low) / (num_layers - 1)
        return floor + whole_shares([2 * base - low - layer * step for layer in range(num_layers)])[rank]


@dataclass(frozen=True)
class Profile(Uniform):
    """Layers in fixed proportions that were learned, and that shift with the budget; the sum over layers is L * budget.

    Of what a budget holds beyond `floor` (guards, fresh block, one slot), free = budget - floor, layer l gets the share
    softmax(level + slope * x)_l, where x goes from -1 to 1 as log free goes over `span`, and stays there beyond. In whole
    slots by largest remainder, ties early.

    Attributes:
        level, slope: a number per evicting layer.
        span: smallest and largest `free` that they were learned for, at least 1.
        perturbations: of the levels, row by row of the batch; empty: none.
    """

    level: tuple[float, ...]
    slope: tuple[float, ...]
    span: tuple[int, int]
    perturbations: tuple[tuple[float, ...], ...] = ()

    def layer_budget(self, budget: int, rank: int, num_layers: int, floor: int) -> int:
        return self._share_out(budget, rank, num_layers, floor, (0.0,) * num_layers)

    def row_budget(self, row: int, budget: int, rank: int, num_layers: int, floor: int) -> int:
        shift = self.perturbations[row] if self.perturbations else (0.0,) * num_layers
        return self._share_out(budget, rank, num_layers, floor, shift)

    def _share_out(self, budget: int, rank: int, num_layers: int, floor: int, shift: tuple[float, ...]) -> int:
        if num_layers != len(self.level):
            raise UsageError(
                f"these gates allocate a budget to {len(self.level)} layers, but {num_layers} layers of the model evict"
            )
        place = place_in(self.span, budget - floor)
        parts = zip(self.level, self.slope, shift, strict=True)
        logits = [level + slope * place + more for level, slope, more in parts]
        return in_proportion([math.exp(logit - max(logits)) for logit in logits], budget, rank, floor)


class LayerAllocation(nn.Module):
    """Logits of the layers' shares, linear in the logarithm of the budget; equal until learned.

    Only a trainer that perturbs the shares learns from them, so its parameters are frozen until one unfreezes them.

    Args:
        num_layers: that evict.
        smallest, largest: slots per layer and head beyond the floor in training, at least 1.
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


class Competing(Allocator):
    """Each head has a share of the slots beside protected ones; what it cannot fill goes to the best slots of the others."""

    ragged = True

    @abstractmethod
    def shares(self, ordered: Tensor, room: Tensor, free: Tensor) -> Tensor:
        """Returns the slots that each head gets if it has so many, int64 [B, H] or [B, 1].

        Args:
            ordered: scores of candidates [B, H, N], best first, -inf behind them.
            room: candidates int64 [B, H].
            free: slots to share out int64 [B].
        """

    def counts(self, scores: Tensor, protected: Tensor, budget: Tensor) -> Tensor:
        candidate = ~protected & (scores > -torch.inf)
        room = candidate.sum(-1)
        ordered = scores.masked_fill(~candidate, -torch.inf).sort(-1, descending=True).values
        free = (scores.shape[1] * budget.long() - protected.sum((1, 2))).clamp_min(0).minimum(room.sum(-1))
        share = self.shares(ordered, room, free).minimum(room)
        slot = torch.arange(ordered.shape[-1], device=ordered.device)
        rest = ordered.masked_fill(slot < share.unsqueeze(-1), -torch.inf)
        return protected.sum(-1) + share + best_of_all(rest, free - share.sum(-1), room - share)


@dataclass(frozen=True)
class Ada(Competing):
    """Heads compete for slots by score, above a floor that each keeps (Algorithm 1 of arXiv 2407.11550).

    Of the slots beside protected ones, F in the whole layer, head h has f_h among the F best of all heads. Its share is
    (1 - alpha) * f_h + alpha * F / H, in whole numbers by largest remainder (ties: the lower head), so that the layer
    holds exactly H * budget. Exact integers, no sort of ties.
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha is the share that heads divide equally, 0 to 1, not {self.alpha}")

    def shares(self, ordered: Tensor, room: Tensor, free: Tensor) -> Tensor:
        heads, equal = room.shape[1], round(self.alpha * MILLE)
        exact = (MILLE - equal) * heads * best_of_all(ordered, free, room) + equal * free.unsqueeze(-1)
        return largest_remainder(exact, MILLE * heads, free)


@dataclass(frozen=True)
class Together(Competing):
    """The best slots of all heads, above a floor that each keeps; for comparable scores, and for policies of scope "model".

    Of the F slots beside protected ones that H heads share, each head keeps its own best floor * F / H, rounded down, if
    it has so many; all that is left goes to the best of the rest, whoever holds them (global ranking of arXiv 2601.17668
    and 2605.09649, with the safeguard of 2407.11550: a pure threshold leaves heads without any slot). Unlike Ada's share,
    the floor takes nothing from a head that would win as much anyway; 0 is the pure threshold, 1 uniform.
    """

    floor: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise UsageError(f"floor is the share of an equal split that every head keeps, 0 to 1, not {self.floor}")

    def shares(self, ordered: Tensor, room: Tensor, free: Tensor) -> Tensor:
        return self.least(free, room.shape[1]).unsqueeze(-1)

    def least(self, free: Tensor, heads: int) -> Tensor:
        """Returns how many of `free` [B] slots beside protected ones every head keeps, if it has so many."""
        return free * round(self.floor * MILLE) // (MILLE * heads)


def place_in(span: tuple[int, int], free: int) -> float:
    """Returns where a number of slots lies in a span of them, -1 to 1, on a logarithmic scale; 0 if the span is one number."""
    low, high = (math.log(end) for end in span)
    return 0.0 if low == high else 2 * (min(max(math.log(max(free, 1)), low), high) - low) / (high - low) - 1


def in_proportion(weights: Sequence[float], budget: int, rank: int, floor: int) -> int:
    """Returns the budget of the `rank`-th layer, if what budgets hold beyond the floor is shared out in these proportions."""
    free = budget - floor
    if free <= 0:
        return budget
    return floor + whole_shares([len(weights) * free * weight / sum(weights) for weight in weights])[rank]


def whole_shares(shares: list[float]) -> list[int]:
    """Returns shares of a whole number in whole numbers, by largest remainder; ties early."""
    whole = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: round(whole[index] - shares[index], 6))
    extra = by_remainder[: round(sum(shares)) - sum(whole)]
    return [share + (index in extra) for index, share in enumerate(whole)]


def largest_remainder(exact: Tensor, unit: int, total: Tensor) -> Tensor:
    """Returns exact [B, H] / unit in whole numbers that sum to total [B], int64 [B, H]; of equal remainders lower heads win."""
    whole, remainder = exact // unit, exact % unit
    place = remainder.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return whole + (place < (total - whole.sum(-1)).unsqueeze(-1))


def best_of_all(scores: Tensor, count: Tensor, room: Tensor) -> Tensor:
    """Returns how many of the `count` [B] best scores [B, H, N] each head has, int64 [B, H]; of equal scores lower heads win.

    Args:
        scores: -inf where there is nothing to choose; storage order does not matter.
        count: int64 [B], at most the sum of `room`.
        room: int64 [B, H], scores above -inf.
    """
    flat = scores.flatten(1).sort(-1, descending=True).values
    least = flat.gather(1, (count - 1).clamp_min(0).unsqueeze(-1)).unsqueeze(-1)
    above = (scores > least).sum(-1)
    equal = (scores == least).sum(-1).minimum(room - above)
    left = (count - above.sum(-1)).unsqueeze(-1)
    before = equal.cumsum(-1) - equal
    return above + (left - before).clamp_min(0).minimum(equal)
