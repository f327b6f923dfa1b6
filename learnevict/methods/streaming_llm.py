"""StreamingLLM: attention sinks and a sliding window (arXiv 2309.17453).

Keep the first 4 tokens and the newest of the rest (section 3.2): the score is recency.

Departures: keys keep their true positions, as in kvpress, KVCache-Factory and R-KV; the paper caches keys before RoPE
and rotates by slot index, so that distances never exceed the budget. The window slides once per event, not at every
step, unless slack=0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from typing_extensions import Unpack

from learnevict.config import AnyBudget
from learnevict.errors import UsageError
from learnevict.methods import Paper
from learnevict.parts.options import Options, compose
from learnevict.policy import Policy, Scorer
from learnevict.signals import Signals

PAPER = Paper("Efficient Streaming Language Models with Attention Sinks", "2309.17453", 2023)


@dataclass(frozen=True)
class Recency(Scorer):
    """Minus the age in tokens."""

    def score(self, signals: Signals) -> Tensor:
        return -signals.age.float()


def policy(budget: AnyBudget, *, positions: Literal["true", "slot"] = "true", **options: Unpack[Options]) -> Policy:
    """Keep sinks (4: section 3.2, table 2) and the most recent tokens; "true" keeps every key's own position.

    Raises:
        UsageError: positions="slot".
    """
    if positions != "true":
        raise UsageError(
            f"streaming_llm keeps true positions; positions={positions!r} (the paper's re-numbering by slot) would rotate "
            "every stored key at every event and is not available: drop the option"
        )
    return compose("streaming_llm", budget, Recency(), **options)
