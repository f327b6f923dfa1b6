"""How slots are divided among the heads of a model: by competition, or in fixed numbers read off traces whose heads compete.

Heads compete over those of a layer (Ada-KV, arXiv 2407.11550) or of the whole model (global ranking of arXiv 2601.17668 and
2605.09649), above a floor that every head keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from learnevict.errors import UsageError
from learnevict.signals import Trace


@dataclass(frozen=True)
class Share:
    """How slots are divided among heads.

    Attributes:
        scope: whose tokens compete: those of one "head", of a "layer", or of the whole "model".
        floor: share of an equal split, beside guards and fresh block, that every head keeps; for "layer" and "model".
        slots: int [L, H], slots of each head for scope "head"; their mean is the budget. None: all alike.
    """

    scope: Literal["head", "layer", "model"] = "head"
    floor: float = 0.2
    slots: Tensor | None = None

    def __post_init__(self) -> None:
        if self.scope not in ("head", "layer", "model") or not 0 <= self.floor <= 1:
            raise UsageError(
                f"scope={self.scope!r}, floor={self.floor}: heads share by head, layer or model, and keep 0 to 1 of an "
                "equal split"
            )
        if self.slots is not None and self.scope != "head":
            raise UsageError(f"slots per head leave nothing to share by {self.scope}; use scope='head'")


EQUAL = Share()
"""All heads hold as many slots."""


def held_after(expiry: Int[Tensor, "L B H T"], position: Int[Tensor, "B T"], seen: int) -> Int[Tensor, "L B H"]:
    """Returns slots held right after the event at `seen` tokens; anything for rows that are shorter."""
    end = (position == seen - 1).int().argmax(-1) + 1
    return ((expiry > end[:, None, None]) & ((position >= 0) & (position < seen)).unsqueeze(1)).sum(-1)


def profile(trace: Trace, position: Int[Tensor, "B T"]) -> Float[Tensor, "L H"]:
    """Returns the mean slots that each head holds right after events, over rows and events at which the whole budget is held.

    Args:
        trace: of golden eviction whose heads share.
        position: each real token's unpadded position, -1 for padding.

    Raises:
        UsageError: a trace of unknown budget or period, or one that never held its budget.
    """
    if trace.budget is None or trace.period is None:
        raise UsageError(f"a profile needs a trace that knows budget and period, not one from {trace.source!r}")
    expiry = trace.expiry
    position = position.to(expiry.device)
    total, count = torch.zeros(expiry.shape[0], expiry.shape[2], device=expiry.device), 0
    for seen in range(trace.period, int(position.max()) + 2, trace.period):
        held = held_after(expiry, position, seen).float()
        full = (position == seen - 1).any(-1) & (held.mean((0, 2)) >= trace.budget - 0.5)
        total, count = total + held[:, full].sum(1), count + int(full.sum())
    if not count:
        raise UsageError(f"the texts are too short for a budget of {trace.budget}: nothing was evicted")
    return total / count


def slots_of(free: Float[Tensor, "L H"], budget: int, reserved: int) -> Int[Tensor, "L H"]:
    """Returns whole slots per head: what is reserved, and the rest in the given proportions; their mean is the budget.

    Args:
        free: what each head holds beyond `reserved`, in any unit, such as `profile(trace) - reserved`.
        budget: mean slots.
        reserved: slots that every head has: guards and a fresh block.
    """
    rest = (budget - reserved) * free.numel()
    exact = free.double().clamp_min(0)
    exact = exact / exact.sum() * rest
    whole = exact.floor()
    more = (whole - exact).flatten().argsort(stable=True)[: rest - int(whole.sum())]
    whole.view(-1)[more] += 1
    return reserved + whole.long()
