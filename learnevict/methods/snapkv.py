"""SnapKV: keep what the last queries attend to, and its neighbourhood (arXiv 2404.14469).

The last W queries vote: s = pool(sum over W of softmax) over the tokens before them (section 4); the window itself
stays. By default votes are taken at every event ("SnapKV-D" in papers on reasoning), from a ring of the last W queries;
schedule="prefill_only" is the paper's single vote at the end of the prompt.

Variants (parts/window.py has the fields):
    paper    W=32, max-pool 7, sum over W, softmax over all tokens; query heads pooled apart, then averaged over the
             group (the paper keeps one set per query head, which would store shared keys several times)
    kvpress  W=64, avg-pool 5, mean over W, mean over the group
    rkv      W=8, max-pool 7, mean over W, largest logit of the group, softmax over the tokens before the window
"""

from __future__ import annotations

from dataclasses import replace

from typing_extensions import Unpack

from learnevict.config import Budget
from learnevict.methods import Paper
from learnevict.parts.options import ScheduleOptions, compose, unknown_variant
from learnevict.parts.window import WindowAttention
from learnevict.policy import Policy

PAPER = Paper("SnapKV: LLM Knows What You are Looking for Before Generation", "2404.14469", 2024)
VARIANTS = {
    "paper": WindowAttention(32),  # section 5.2: window 32, kernel 7
    "kvpress": WindowAttention(64, group="prob_mean", reduce="mean", pool="avg", kernel=5),
    "rkv": WindowAttention(8, support="candidates", group="logit_max", reduce="mean"),
}


def observer(variant: str, window: int | None, recent: int | None) -> tuple[WindowAttention, int]:
    """The scorer of a variant and the recent window: one length, unless both are given."""
    if variant not in VARIANTS:
        raise unknown_variant("snapkv", variant, VARIANTS)
    scorer = VARIANTS[variant]
    if window is None:
        window = scorer.window if recent is None else max(recent, 1)
    return replace(scorer, window=window), window if recent is None else recent


def policy(
    budget: int | str | Budget,
    *,
    variant: str = "paper",
    window: int | None = None,
    recent: int | None = None,
    **options: Unpack[ScheduleOptions],
) -> Policy:
    """Keep what the last `window` queries attend to.

    Args:
        budget: tokens, "25%" or "64MiB".
        variant: see above.
        window: queries that vote; None: `recent` if given, else the variant's.
        recent: last tokens that stay; None: the window, as in the paper.
        **options: see ScheduleOptions.
    """
    scorer, recent = observer(variant, window, recent)
    return compose("snapkv", budget, scorer, recent=recent, **options)
