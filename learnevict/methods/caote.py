"""CAOTE: evict the token whose loss moves attention's output least, by another method's attention (arXiv 2504.14051).

c_j = |o - o without j| = A_j / (1 - A_j) |o - v_j|, exact for one token that goes while the rest is renormalised;
A is the base method's score divided by its sum, o = sum of A_i v_i. A wrapper: base="snapkv", "h2o", ...

Variants: "paper" is that; "fast" (FastCAOTE) takes the plain mean of the values held for o.

Departures: as in the paper's block form, all tokens of an event are ranked by the loss of each alone (they may cancel);
slots that the base keeps whatever happens, SnapKV's window, take no part in o; 1 - A is at least 1e-6. Scores of a group are
joined by the base before, so A is one distribution per kv head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from learnevict.config import AnyBudget
from learnevict.errors import UsageError
from learnevict.methods import Paper, load
from learnevict.parts.options import unknown_variant
from learnevict.parts.output_error import OutputChange, OutputChangeOfMean
from learnevict.policy import Policy

PAPER = Paper(
    "CAOTE: KV Cache Selection for LLMs via Attention Output Error-Based Token Eviction",
    "2504.14051",
    2025,
    decides=("wrapper",),
)
VARIANTS = {"paper": OutputChange, "fast": OutputChangeOfMean}
BASES = ("snapkv", "h2o", "adakv", "pyramidkv", "keyformer", "defensivekv")
"""Methods whose scores are attention: not negative, and comparable within a head."""


def policy(budget: AnyBudget, *, base: str = "snapkv", variant: str = "paper", **options: Any) -> Policy:
    """Keep what moves the output of attention.

    Args:
        base: whose attention it is, one of BASES.
        variant: see above; a variant of the base is not chosen here.
        **options: of the base.

    Raises:
        UsageError: the base scores by something else than attention.
    """
    if variant not in VARIANTS:
        raise unknown_variant("caote", variant, VARIANTS)
    if base not in BASES:
        raise UsageError(
            f"caote needs scores that are attention, which {base} has not; base is one of {', '.join(BASES)}"
        )
    inner = load(base).policy(budget, **options)
    return replace(inner, scorer=VARIANTS[variant](inner.scorer), name="caote")
