"""SnapKV: keep what the last queries attend to, and its neighbourhood (arXiv 2404.14469).

The last W queries vote: s = pool(sum over W of softmax) over the tokens before them (section 4); the window itself
stays. By default votes are taken at every event ("SnapKV-D" in papers on reasoning), from a ring of the last W queries;
schedule="prefill_only" is the paper's single vote at the end of the prompt.

Variants:
    paper    W=32, max-pool 7, sum over W, softmax over all tokens; query heads pooled apart, then averaged over the
             group (the paper keeps one set per query head, which would store shared keys several times): SnapAttention
    kvpress  W=64, avg-pool 5, mean over W, mean over the group
    rkv      W=8, max-pool 7, mean over W, largest logit of the group, softmax over the tokens before the window
The last two are fields of parts.window.WindowAttention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Unpack

from learnevict.config import AnyBudget
from learnevict.methods import Paper
from learnevict.parts.options import ScheduleOptions, compose, unknown_variant
from learnevict.parts.window import HIGHEST, WindowAttention, before_window, max_pool, voting_window
from learnevict.policy import Policy, Scorer
from learnevict.signals import Signals

PAPER = Paper("SnapKV: LLM Knows What You are Looking for Before Generation", "2404.14469", 2024)


@dataclass(frozen=True)
class SnapAttention(Scorer):
    """Attention from the last `window` queries, max-pooled over `kernel` neighbours (section 5.2: 32 and 7)."""

    window: int = 32
    kernel: int = 7

    def score(self, signals: Signals) -> Tensor:
        before = before_window(signals)
        attention = torch.zeros(())
        for weights, _ in signals.window(
            self.window
        ):  # softmax over all tokens, [B, H, G, w, N], a few queries at a time
            attention = attention + weights.sum(3)  # over the window
        pooled = [max_pool(signals, head, before, self.kernel) for head in attention.unbind(2)]
        return torch.stack(pooled).mean(0).masked_fill(~before, HIGHEST)  # over the group


VARIANTS: dict[str, SnapAttention | WindowAttention] = {
    "paper": SnapAttention(),
    "kvpress": WindowAttention(64, group="prob_mean", reduce="mean", pool="avg", kernel=5),
    "rkv": WindowAttention(8, support="candidates", group="logit_max", reduce="mean"),
}


def observer(variant: str, window: int | None, recent: int | None) -> tuple[Scorer, int]:
    """Returns the scorer of a variant and the recent window: one length, unless both are given."""
    if variant not in VARIANTS:
        raise unknown_variant("snapkv", variant, VARIANTS)
    scorer = VARIANTS[variant]
    window, recent = voting_window(window, recent, scorer.window)
    return replace(scorer, window=window), recent


def policy(
    budget: AnyBudget,
    *,
    variant: str = "paper",
    window: int | None = None,
    recent: int | None = None,
    **options: Unpack[ScheduleOptions],
) -> Policy:
    """Keep what the last `window` queries attend to.

    Args:
        variant: see above.
        window: queries that vote; None: `recent` if given, else the variant's.
        recent: last tokens that stay; None: the window, as in the paper.
    """
    scorer, recent = observer(variant, window, recent)
    return compose("snapkv", budget, scorer, recent=recent, **options)
