"""Ada-KV: heads of a layer compete for its budget (arXiv 2407.11550).

SnapKV's votes of all kv heads are pooled; head h gets (1 - alpha) * (its slots among the best of all) + alpha * (equal
share), alpha = 0.2 (section 4.1; Algorithm 2 prints the weights swapped, appendix and code agree with this form).
Pooling minimises the paper's bound on the change of the layer's output. Storage is paged, so what a head gives up is
memory.

Departures: largest remainder instead of rounding, so a layer holds exactly H * budget; votes at every event, see
    snapkv.
"""

from __future__ import annotations

from typing_extensions import Unpack

from learnevict.config import AnyBudget
from learnevict.methods import Paper
from learnevict.parts.allocators import Ada
from learnevict.parts.options import ScheduleOptions, compose
from learnevict.parts.window import WindowAttention, voting_window
from learnevict.policy import Policy

PAPER = Paper(
    "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation",
    "2407.11550",
    2024,
    decides=("allocation", "score"),
)


def policy(
    budget: AnyBudget,
    *,
    alpha: float = 0.2,
    window: int | None = None,
    recent: int | None = None,
    **options: Unpack[ScheduleOptions],
) -> Policy:
    """Keep what the last queries attend to, more of it in heads that spread their attention.

    Args:
        alpha: share that heads divide equally; 1 is uniform.
        window: queries that vote (32: section 5.1); None: `recent` if given.
        recent: last tokens that stay; None: the window.
    """
    window, recent = voting_window(window, recent, 32)
    scorer = WindowAttention(window, group="prob_mean", reduce="mean")  # max-pool 7: section 5.1
    return compose("adakv", budget, scorer, recent=recent, allocator=Ada(alpha), **options)
