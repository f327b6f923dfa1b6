"""Pyramid-RKV: R-KV's scores, with budgets that shrink with depth (arXiv 2606.11164).

The baseline against which ReasonAlloc is measured: scores of `rkv`, layer budgets of `pyramidkv`. In that paper it loses to
budgets by measured demand, which does not fall with depth while a model reasons.

Departures: those of rkv and of pyramidkv.
"""

from __future__ import annotations

from typing_extensions import Unpack

from learnevict.config import AnyBudget
from learnevict.methods import Paper
from learnevict.methods.rkv import ImportantAndNew
from learnevict.parts.allocators import Pyramid
from learnevict.parts.options import ScheduleOptions, compose
from learnevict.policy import Policy

PAPER = Paper("Pyramid-RKV, a baseline of ReasonAlloc", "2606.11164", 2026, decides=("allocation", "score"))


def policy(
    budget: AnyBudget,
    *,
    beta: float = 20.0,
    mix: float = 0.1,
    window: int = 8,
    recent: int | None = None,
    **options: Unpack[ScheduleOptions],
) -> Policy:
    """Keep what is attended to and not said elsewhere, more of it in early layers.

    Args:
        beta: steepness, see pyramidkv; 1 is rkv.
        mix: lambda, see rkv.
        window: queries that vote.
        recent: last tokens that stay; None: the window.
    """
    recent = window if recent is None else recent
    scorer = ImportantAndNew(mix, window=window)
    return compose("pyramid_rkv", budget, scorer, recent=recent, allocator=Pyramid(beta), **options)
