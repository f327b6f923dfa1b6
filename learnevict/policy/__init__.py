"""A policy is one sentence: when, who, how many, never, which.

    Policy(budget, scorer, allocator, schedule, guard, draw)

Its one verb is `keep(signals)`: the slots to keep, or None for all. This package says what the words of that sentence must
offer; the library of words is `learnevict.parts`.
"""

from learnevict.policy.scorers import Fade, Gate, Probe, Scorer, SoftGate
from learnevict.policy.sentence import Assembly, Governor, Policy, keep_best
from learnevict.policy.words import Allocator, Draw, Guard, Schedule, TopK, Uniform

__all__ = [
    "Policy", "Governor", "Assembly", "keep_best", "Scorer", "Gate", "SoftGate", "Fade", "Probe",
    "Allocator", "Uniform", "Schedule", "Guard", "Draw", "TopK",
]  # fmt: skip
