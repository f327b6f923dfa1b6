"""The full cache: nothing is ever evicted. The reference every other method is measured against.

The budget and all options are accepted, so that a table can treat it like any method, and mean nothing here.
"""

from __future__ import annotations

from dataclasses import replace

from typing_extensions import Unpack

from learnevict.config import AnyBudget, Budget
from learnevict.methods import Paper
from learnevict.parts.options import Options, compose
from learnevict.policy import Policy, Unscored

PAPER = Paper("Full cache", None, 2017, kind="reference", decides=("score", "allocation", "schedule"))


def policy(budget: AnyBudget = "100%", **options: Unpack[Options]) -> Policy:
    """Never evict; not bounded."""
    checked = compose("full", Budget.parse("100%"), Unscored(), **options)
    return replace(checked, budget=Budget.parse(budget), schedule=replace(checked.schedule, active=False))
