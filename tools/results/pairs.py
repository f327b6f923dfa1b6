"""Paired tests of two methods on the same samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from learnevict.evals.metrics import Estimate, estimate, resamples

TEST_DRAWS = 10_000
"""Of a test: with 2000, a p-value of 0.01 would rest on 20 of them."""
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
