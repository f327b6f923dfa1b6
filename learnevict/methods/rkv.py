"""R-KV: attended and not redundant (arXiv 2505.24133).

s = lambda * I - (1 - lambda) * R (section 3.4): I is the attention of the last 8 queries, the largest logit of the
group, softmax over the tokens before the window, mean over queries, max-pool 7; R is the redundancy of keys
(parts/redundancy.py).

Variants: "paper" has lambda = 0.1, "code" the authors' class default 0.07.

Departures: neighbours and "latest" go by position, not by a slot order that was shuffled by the last event; every row
of a batch has its own R (the authors' code uses row 0's for all); events also inside the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import Unpack

from learnevict.config import Budget
from learnevict.methods import Paper
from learnevict.parts.options import ScheduleOptions, compose, unknown_variant
from learnevict.parts.redundancy import redundancy
from learnevict.parts.window import HIGHEST, WindowAttention, before_window
from learnevict.policy import Policy, Scorer
from learnevict.signals import Signals

PAPER = Paper("R-KV: Redundancy-aware KV Cache Compression for Reasoning Models", "2505.24133", 2025)
MIX = {"paper": 0.1, "code": 0.07}


@dataclass(frozen=True)
class ImportantAndNew(Scorer):
    """Attention of the last queries less redundancy of the key."""

    mix: float = 0.1
    threshold: float = 0.5
    window: int = 8

    def score(self, signals: Signals) -> Tensor:
        """float32 [B, H, N]."""
        attention = WindowAttention(self.window, "candidates", "logit_max", "mean")
        score = self.mix * attention.importance(signals)
        if self.mix < 1:
            score = score - (1 - self.mix) * redundancy(signals, self.threshold)
        return score.masked_fill(~before_window(signals), HIGHEST)


def policy(
    budget: int | str | Budget,
    *,
    variant: str = "paper",
    mix: float | None = None,
    threshold: float = 0.5,
    window: int = 8,
    recent: int | None = None,
    **options: Unpack[ScheduleOptions],
) -> Policy:
    """Keep what is attended to and not said elsewhere.

    Args:
        budget: tokens, "25%" or "64MiB".
        variant: see above.
        mix: lambda, 1 is attention alone; None: the variant's.
        threshold: cosine above which keys are alike (0.5: the authors' code).
        window: queries that vote (alpha = 8: section 4.1).
        recent: last tokens that stay; None: the window.
        **options: see ScheduleOptions.
    """
    if variant not in MIX:
        raise unknown_variant("rkv", variant, MIX)
    scorer = ImportantAndNew(MIX[variant] if mix is None else mix, threshold, window)
    return compose("rkv", budget, scorer, recent=window if recent is None else recent, **options)
