"""The smallest policy as a method: sinks and the newest tokens, by `keep(signals)` alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from learnevict.methods import Paper
from learnevict.policy import Schedule
from learnevict.signals import Signals

PAPER = Paper("Sinks and the newest tokens", None, 2026)


class KeepOnly:
    """Of all parts of a Governor it has a budget and a schedule."""

    def __init__(self, budget: int, slack: int, sinks: int) -> None:
        self.budget, self.schedule, self.sinks = budget, Schedule(slack), sinks

    def keep(self, signals: Signals) -> Tensor:
        newest = signals.budget.view(-1, 1, 1) - self.sinks
        return (signals.place < self.sinks) | (signals.age < newest)


def policy(budget: int, *, slack: int, sinks: int, **options: Any) -> KeepOnly:
    return KeepOnly(budget, slack, sinks)
