"""Figures of several methods on the same samples: paired tests, and recovery from the best heuristic to golden."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from learnevict.evals.metrics import DRAWS, Estimate, estimate, resamples

TEST_DRAWS = 10_000
"""Of a test: with 2000, a p-value of 0.01 would rest on 20 of them."""
SMALLEST_GAP = 0.03
"""Below this much step accuracy between golden and the best heuristic, a cell is reported but not scored."""


@dataclass(frozen=True)
class RecoveryCell:
    """One (family, budget): tokens right per sample under a method, the best heuristic and golden, of `seen` checked.

    The samples are the same, in the same order, in all four.
    """

    method: Sequence[float]
    best: Sequence[float]
    golden: Sequence[float]
    seen: Sequence[float]

    @property
    def gap(self) -> float:
        """Returns step accuracy of golden minus that of the best heuristic."""
        return (sum(self.golden) - sum(self.best)) / sum(self.seen)

    @property
    def scored(self) -> bool:
        """Returns whether the gap is wide enough to divide by."""
        return self.gap >= SMALLEST_GAP


Pairs = tuple[Sequence[float], Sequence[float], Sequence[float]]
"""One family: what a method got right, what another did, and of how many, by sample."""


def paired_test(
    strata: Sequence[Pairs], *, pooled: bool = False, seed: int = 0, draws: int = TEST_DRAWS
) -> tuple[Estimate, float]:
    """Returns how much better a method is than another on the same samples, and the chance of seeing that if it were not.

    Of one family: sum(one - other) / sum(seen). Of several: the mean of their differences, families counting alike; `pooled`:
    both sums run over the samples of all, tokens counting alike. Samples are resampled in pairs within their family.

    Returns:
        The difference with its interval, and the one-sided p: (k + 1) / (draws + 1), with k draws in which it is not above 0.
    """
    above, below = np.zeros((2, len(strata), draws + 1))
    for stratum, (one, other, seen) in enumerate(strata):
        apart, checked = np.subtract(one, other).astype(np.float64), np.asarray(seen, dtype=np.float64)
        drawn = resamples(len(checked), draws, seed, stratum)
        above[stratum] = [apart.sum(), *apart[drawn].sum(-1)]
        below[stratum] = [checked.sum(), *checked[drawn].sum(-1)]
    found = above.sum(0) / below.sum(0) if pooled else (above / below).mean(0)
    apart = estimate(float(found[0]), found[1:], np.ones(draws))
    return apart, float(((found[1:] <= 1e-12).sum() + 1) / (draws + 1))


def recovery(cells: Sequence[RecoveryCell], *, seed: int = 0, draws: int = DRAWS) -> Estimate:
    """Returns the recovery from the best training-free method (0) to golden (1).

    Of one cell: sum(method - best) / sum(golden - best). Of several (the families at one budget) both sums run over
    the cells' accuracy differences: how many tokens a family checks does not matter, but one with a wide gap weighs
    more than one with a narrow gap. Samples are resampled within their cell. Cells with a gap below SMALLEST_GAP are
    left out; NaN if none is left. More than 1 is possible: golden is a reference, not a bound.
    """
    scored = [cell for cell in cells if cell.scored]
    if not scored:
        return Estimate(math.nan, math.nan, math.nan)
    sums = np.zeros((2, draws + 1))
    for stratum, cell in enumerate(scored):
        best, seen = np.asarray(cell.best, dtype=np.float64), np.asarray(cell.seen, dtype=np.float64)
        whole = np.arange(len(seen))[None]
        index = np.concatenate([whole, resamples(len(seen), draws, seed, stratum)])
        checked = seen[index].sum(-1)
        sums[0] += (np.asarray(cell.method) - best)[index].sum(-1) / checked
        sums[1] += (np.asarray(cell.golden) - best)[index].sum(-1) / checked
    return estimate(float(sums[0, 0] / sums[1, 0]), sums[0, 1:], sums[1, 1:])
