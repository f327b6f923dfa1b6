"""PyramidKV: SnapKV's votes, with budgets that shrink with depth (arXiv 2406.02069).

The budget of layer l falls linearly from 2 * base - base / beta to base / beta (section 3.2.1, beta = 20 in the
authors' code), where base is what the budget holds beyond what always stays.

Departures: what always stays is guards and fresh block (the paper: the window); fractions are settled so that layers
sum to exactly L * budget (the authors' integer steps do not). The authors' code, which knows the length of
the prompt, gives short ones uniform budgets and no layer more than the prompt has; a stream has no known length, and layers
that first held the same and then lent to each other would together hold more bytes than the budget.
"""

from __future__ import annotations

from typing_extensions import Unpack

from learnevict.config import AnyBudget
from learnevict.methods import Paper
from learnevict.methods.snapkv import observer
from learnevict.parts.allocators import Pyramid
from learnevict.parts.options import ScheduleOptions, compose
from learnevict.policy import Policy

PAPER = Paper(
    "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
    "2406.02069",
    2024,
    decides=("allocation", "score"),
)


def policy(
    budget: AnyBudget,
    *,
    beta: float = 20.0,
    variant: str = "paper",
    window: int | None = None,
    recent: int | None = None,
    **options: Unpack[ScheduleOptions],
) -> Policy:
    """Keep what the last queries attend to, more of it in early layers.

    Args:
        beta: steepness; 1 is uniform.
        variant: of SnapKV.
        window: queries that vote, see snapkv.
        recent: last tokens that stay, see snapkv.
    """
    scorer, recent = observer(variant, window, recent)
    return compose("pyramidkv", budget, scorer, recent=recent, allocator=Pyramid(beta), **options)
