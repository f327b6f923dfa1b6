"""A policy is one sentence: when, who, how many, never, which.

    Policy(budget, scorer, allocator, schedule, guard, draw)

Its one verb is `keep(signals)`: the slots to keep, or None for all. This package says what the words of that sentence must
offer; the library of words is `learnevict.parts`.
"""

from learnevict.policy.components import Allocator, Draw, Guard, Schedule, TopK, Uniform
from learnevict.policy.policy import Assembly, Governor, Policy, keep_best
from learnevict.policy.scorer import DecayBias, Gate, Probe, Scorer, SoftGate, WrappedScorer

__all__ = [
    "Policy", "Governor", "Assembly", "keep_best", "Scorer", "WrappedScorer", "Gate", "SoftGate", "DecayBias", "Probe",
    "Allocator", "Uniform", "Schedule", "Guard", "Draw", "TopK",
]  # fmt: skip
