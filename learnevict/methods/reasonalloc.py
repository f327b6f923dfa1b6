"""ReasonAlloc: layers get what they were found to need, heads what they win at each event (arXiv 2606.11164).

Scores are those of `rkv`. Layers, once per model: n_l = mean over queries of the fewest slots that hold 93 % of the attention,
on a few prompts (oracle.layer_demand); budgets in proportion to n_l ** 0.5, held within 0.25 and 2 times the mean. Heads, at
every event: r_h = how many of the layer's best slots are theirs, at least a quarter of an equal split; the same smoothing
and limits.

Departures: no code is public, and the order of smoothing and limits follows the text; whole slots by largest remainder; layers
share what a budget holds beyond guards and fresh block. Without `layers` they are equal, and heads alone differ. A head whose
demand rises gets no evicted slot back.
"""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import Unpack

from learnevict.config import AnyBudget
from learnevict.methods import Paper
from learnevict.methods.rkv import ImportantAndNew
from learnevict.parts.demand import Demand
from learnevict.parts.options import ScheduleOptions, compose
from learnevict.policy import Policy

PAPER = Paper(
    "ReasonAlloc: Hierarchical Decoding-Time KV Cache Budget Allocation for Reasoning Models",
    "2606.11164",
    2026,
    decides=("allocation", "score"),
)


def policy(
    budget: AnyBudget,
    *,
    layers: Sequence[float] = (),
    floor: float = 0.25,
    mix: float = 0.1,
    window: int = 8,
    recent: int | None = None,
    **options: Unpack[ScheduleOptions],
) -> Policy:
    """Keep what is attended to and not said elsewhere, where it is needed.

    Args:
        layers: what oracle.layer_demand found for this model; none: equal.
        floor: share of an equal split that every head's demand is raised to (mu = 0.25).
        mix: lambda, see rkv.
        window: queries that vote.
        recent: last tokens that stay; None: the window.
    """
    recent = window if recent is None else recent
    allocator = Demand(tuple(map(float, layers)), floor=floor)
    return compose(
        "reasonalloc", budget, ImportantAndNew(mix, window=window), recent=recent, allocator=allocator, **options
    )
