"""MiKV: tokens that would be evicted are demoted to low precision, important ones keep theirs (arXiv 2402.18096).

A share of the budget's bytes is held in full precision, ranked by an eviction method (paper: H2O); what loses its place there
stays in 2, 4 or 8 bits. x is stored as round((x - min) / step), step = (max - min) / (2^bits - 1) of its token.

Departures: the budget holds for both tiers, so the least important tokens go in the end, where the paper keeps all; a budget in
shares of the text that is large enough keeps all too. Channels of keys are balanced by their own reach among the first tokens
(infer/store/tiers.py), where the paper takes sqrt(max |q| / max |k|): every channel then uses all levels, and no queries are
remembered. No public code was read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from learnevict.config import AnyBudget
from learnevict.methods import Paper, load
from learnevict.policy import Demote, Policy

PAPER = Paper(
    "No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision Quantization",
    "2402.18096",
    2024,
    decides=("store", "allocation"),  # heads hold equally many slots
)


def policy(budget: AnyBudget, *, base: str = "h2o", bits: int = 4, full: float = 0.5, **options: Any) -> Policy:
    """Demote what loses.

    Args:
        base: the method that ranks tokens.
        bits: of demoted tokens, 8, 4 or 2.
        full: share of the budget's bytes that stays in full precision.
        **options: of the base.

    Raises:
        UsageError: other bits or shares, or a base whose heads hold different numbers of slots.
    """
    return replace(load(base).policy(budget, **options), store=Demote(bits, full), name="mikv")
