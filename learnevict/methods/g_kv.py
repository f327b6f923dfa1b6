"""G-KV: what was attended to before is not forgotten when the last queries look elsewhere (arXiv 2512.00504).

Every event: l_j = mean over the last 16 queries of the largest attention of the group, divided by its maximum over j;
F_j <- max(alpha F_j, l_j), alpha = 0.8, for slots that have been scored before, l_j for new ones;
s_j = lambda F_j - (1 - lambda) R_j / max R, with R-KV's redundancy R (see rkv) and lambda = 0.5.

memory="mean" is alpha F + (1 - alpha) l, "sum" is alpha F + l (with alpha = 1 and one query per event: H2O).

Departures: F is kept up to date at the end of every period, also before the budget is full; an event off the grid (the end of
a prompt with schedule="prefill_end") is scored but not remembered. The authors' options for pooling and for
the spread of attention are left out, as in the paper's runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack

from learnevict.config import AnyBudget
from learnevict.errors import UsageError
from learnevict.methods import Paper
from learnevict.methods.rkv import redundancy
from learnevict.parts.options import ScheduleOptions, compose
from learnevict.parts.window import HIGHEST, WindowAttention, before_window
from learnevict.policy import Policy, Scorer
from learnevict.signals import Signals, StateColumn

PAPER = Paper("G-KV: Decoding-Time KV Cache Eviction with Global Attention", "2512.00504", 2025)
MEMORIES = ("max", "mean", "sum")


@dataclass(frozen=True)
class LocalAndGlobal(Scorer):
    """Attention of the last queries joined with what it was, less redundancy."""

    mix: float = 0.5
    alpha: float = 0.8
    window: int = 16
    memory: str = "max"
    columns = (StateColumn("global", fill=-1.0),)
    refreshes = True

    def refresh(self, signals: Signals) -> dict[str, Tensor]:
        signals.memo["joined"] = self._joined(signals)
        return {"global": signals.memo["joined"]}

    def score(self, signals: Signals) -> Tensor:
        before = before_window(signals)
        score = signals.memo["joined"] if "joined" in signals.memo else self._joined(signals)
        if self.mix < 1:
            same = redundancy(signals)
            score = self.mix * score - (1 - self.mix) * same / same.amax(-1, keepdim=True)
        return score.masked_fill(~before, HIGHEST)

    def _joined(self, signals: Signals) -> Tensor:
        before, old = before_window(signals), signals.state["global"]
        attention = WindowAttention(self.window, "all", "prob_max", "mean", "none")
        new = attention.importance(signals).masked_fill(~before, 0.0)
        if self.memory != "sum":
            new = new / new.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        if self.memory == "max":
            both = torch.maximum(self.alpha * old, new)
        else:
            both = self.alpha * old + (new if self.memory == "sum" else (1 - self.alpha) * new)
        return torch.where(before, torch.where(old < 0, new, both), old)


def policy(
    budget: AnyBudget,
    *,
    mix: float = 0.5,
    alpha: float = 0.8,
    memory: str = "max",
    window: int = 16,
    recent: int | None = None,
    **options: Unpack[ScheduleOptions],
) -> Policy:
    """Keep what is or was attended to and not said elsewhere.

    Args:
        mix: lambda, 1 is attention alone (0.5: the paper's runs).
        alpha: how much of an old score is left at the next event (0.8: the same).
        memory: see above.
        window: queries that vote (16: the same).
        recent: last tokens that stay; None: the window.
    """
    if memory not in MEMORIES:
        raise UsageError(f"g_kv joins old and new scores by {', '.join(MEMORIES)}, not by {memory!r}")
    scorer = LocalAndGlobal(mix, alpha, window, memory)
    return compose("g_kv", budget, scorer, recent=window if recent is None else recent, **options)
