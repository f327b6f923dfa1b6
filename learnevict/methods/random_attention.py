"""Random Attention: the prompt stays, and of what follows a random subset, another in every head (arXiv 2609.03430).

Whoever is random about the prompt loses the question; with the prompt kept, random eviction of the chain of thought matches
strong scorers in the paper. A table that reports a learned policy needs this row, at equal bytes.

Every event draws anew among the slots held, so a token's chance falls geometrically with its age: with C slots and a period of
W tokens by C / (C + W) per event. redraw=False gives each token one number for life (as `random`): the subset is then uniform
over the whole past.

Departures: no public code could be read, and which of the two the paper means is not certain; sinks and recent tokens are
protected as everywhere. The budget is counted beside the prompt; give it in bytes for a hard total.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import Unpack

from learnevict.config import AnyBudget
from learnevict.methods import Paper
from learnevict.methods.random import Hashed
from learnevict.ops.random import uniform
from learnevict.parts.draws import slot_keys
from learnevict.parts.options import Options, compose
from learnevict.policy import Policy, Scorer
from learnevict.signals import Signals

PAPER = Paper("Random Attention", "2609.03430", 2026)


@dataclass(frozen=True)
class Redrawn(Scorer):
    """Uniform in [0, 1), another number for each token at every event."""

    seed: int = 0

    def score(self, signals: Signals) -> Tensor:
        return uniform(slot_keys(signals, self.seed))


def policy(budget: AnyBudget, *, seed: int = 0, redraw: bool = True, **options: Unpack[Options]) -> Policy:
    """Keep the prompt and a random subset of the rest; prompt=False makes it `random`, drawn at every event.

    Args:
        seed: another seed, another subset.
        redraw: at every event, or once for each token.
    """
    options.setdefault("prompt", True)
    return compose("random_attention", budget, Redrawn(seed) if redraw else Hashed(seed), **options)
