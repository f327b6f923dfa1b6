"""QPruningKV: more tokens at lower precision, for the same bytes, round any method (arXiv 2412.12706).

n tokens of b bits for n * b = const: prune by a base method to more tokens, and hold them in 8, 4 or 2 bits. The budget counts
slots in full precision; as many tokens stay as fit into its bytes, their scales included: about twice as many in 8 bits, nearly
four times in 4.

Departures: tokens go down to few bits while text is read and written, when they leave the guards and the fresh block, where the
authors' code quantises the prompt alone and never what is generated; keys are quantised token by token, in units of their
channels, where KIVI lets 64 tokens share the step of a channel, because tokens are evicted one by one (infer/store/tiers.py);
scales count. Post-RoPE keys; groups of at most 64 channels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from learnevict.config import AnyBudget
from learnevict.methods import Paper, load
from learnevict.policy import Demote, Policy

PAPER = Paper(
    "More Tokens, Lower Precision: Towards the Optimal Token-Precision Trade-off in KV Cache Compression",
    "2412.12706",
    2024,
    decides=("store", "allocation"),  # heads hold equally many slots
)


def policy(budget: AnyBudget, *, base: str = "snapkv", bits: int = 4, **options: Any) -> Policy:
    """Hold more tokens, in fewer bits.

    Args:
        base: the method that ranks tokens.
        bits: 8, 4 or 2 (4 is the paper's best at equal bytes; 2 collapses).
        **options: of the base.

    Raises:
        UsageError: other bits, or a base whose heads hold different numbers of slots.
    """
    return replace(load(base).policy(budget, **options), store=Demote(bits), name="qpruningkv")
