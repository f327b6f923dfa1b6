"""What governs a cache: `keep(signals)` names the slots to keep, or None for all.

A Policy composes it of when, who, how many, never, which: Policy(budget, scorer, allocator, schedule, guard, draw=...).
This package says what these components must offer; the library of components is `learnevict.parts`.
"""

from learnevict.policy.components import Above, Allocator, Draw, Guard, Schedule, TopK, Uniform
from learnevict.policy.policy import AnyPolicy, Governor, Keeps, Policy, Rule, Unscored, governor, keep_best
from learnevict.policy.scorer import DecayBias, Gate, Probe, Questions, Scorer, SoftGate, WrappedScorer
from learnevict.policy.stores import Demote, Drop, Store, read_store

__all__ = [
    "Policy", "Governor", "Keeps", "AnyPolicy", "Rule", "Unscored", "governor", "keep_best", "Scorer",
    "WrappedScorer", "Gate", "SoftGate", "DecayBias", "Probe", "Allocator", "Uniform", "Schedule", "Guard", "Draw", "TopK",
    "Questions", "Above", "Store", "Drop", "Demote", "read_store",
]  # fmt: skip
