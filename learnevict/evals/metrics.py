"""Numbers from per-sample counts, each with an interval over samples.

Nearly every figure is a ratio of two sums over samples, so one bootstrap serves them. Exact match is a share: of 200 right
samples every resample says 1, so a bootstrap would promise [1, 1], and a share has Wilson's interval instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
COVERAGE = 95.0
NORMAL_QUANTILE = 1.959964
"""Of the standard normal distribution, for that coverage."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval, 95 % unless said otherwise: bootstrap percentiles, or Wilson's of a share."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def signed(apart: Estimate) -> str:
    """Returns a difference with its interval."""
    return f"{apart.value:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}]"


def resamples(num_samples: int, draws: int, seed: int = 0, stratum: int = 0) -> np.ndarray:
    """Returns indices of bootstrap draws, int64 [draws, num_samples]; same arguments, same draws, so figures stay paired."""
    return np.random.default_rng([seed, stratum]).integers(0, num_samples, (draws, num_samples))


def ratio(above: Sequence[float], below: Sequence[float], *, draws: int = DRAWS) -> Estimate:
    """Returns sum(above) / sum(below), samples resampled in pairs.

    Draws whose denominator is not positive are left out of the interval. NaN where nothing can be divided.
    """
    top, bottom = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    if len(top) != len(bottom):
        raise ValueError(f"{len(top)} numerators and {len(bottom)} denominators are no pairs")
    if bottom.sum() <= 0:
        return Estimate(math.nan, math.nan, math.nan)
    index = resamples(len(top), draws)
    return estimate(float(top.sum() / bottom.sum()), top[index].sum(-1), bottom[index].sum(-1))


def step_accuracy(right: Sequence[float], seen: Sequence[float]) -> Estimate:
    """Returns share of answer-mask tokens predicted right (micro-average)."""
    return ratio(right, seen)


def mean(values: Sequence[float]) -> Estimate:
    """Returns the plain mean over samples."""
    return ratio(values, [1.0] * len(values))


def share(values: Sequence[float]) -> Estimate:
    """Returns the mean over samples that are right (1) or wrong (0), with Wilson's interval; see `mean_of_shares`."""
    return mean_of_shares([values]) if values else mean(values)


def mean_of_shares(strata: Sequence[Sequence[float]]) -> Estimate:
    """Returns the mean over families of the share of right samples (1), families counting alike, with Wilson's interval.

    The interval is that of one share of as many samples as the families would have together if all were of the smallest
    size, K * min(n). It is no narrower than it should be: the variance of the mean, sum p_k (1 - p_k) / n_k / K^2, is at most
    p (1 - p) / (K min(n)), as p (1 - p) is concave. Where tries are averaged (avg@k) and values lie between 0 and 1, samples
    are resampled within their family instead.
    """
    if not all({0.0, 1.0}.issuperset(values) for values in strata):
        return mean_share([(values, [1.0] * len(values)) for values in strata])
    value = sum(sum(values) / len(values) for values in strata) / len(strata)
    return wilson(value, len(strata) * min(map(len, strata)))


def wilson(value: float, num: int) -> Estimate:
    """Returns a share of `num` samples with its score interval, which is never of no width.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    square = NORMAL_QUANTILE**2
    middle = (value + square / (2 * num)) / (1 + square / num)
    half = NORMAL_QUANTILE / (1 + square / num) * math.sqrt(value * (1 - value) / num + square / (4 * num * num))
    return Estimate(value, max(middle - half, 0.0), min(middle + half, 1.0))


def mean_share(strata: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Estimate:
    """Returns the mean over families of sum(right) / sum(seen), families counting alike; samples are resampled within each."""
    sums = np.zeros(DRAWS + 1)
    for stratum, (right, seen) in enumerate(strata):
        index = resamples(len(seen), DRAWS, stratum=stratum)
        above, below = np.asarray(right, dtype=np.float64), np.asarray(seen, dtype=np.float64)
        sums[0] += above.sum() / below.sum()
        sums[1:] += above[index].sum(-1) / below[index].sum(-1)
    sums /= len(strata)
    return estimate(float(sums[0]), sums[1:], np.ones(DRAWS))


def paired_difference(one: Sequence[float], other: Sequence[float], seen: Sequence[float]) -> Estimate:
    """Returns step accuracy of `one` minus that of `other` on the same samples; an interval above zero: really better."""
    return ratio(np.subtract(one, other).tolist(), seen)


SMALLEST_GAP = 0.03
"""Below this much accuracy between the reference and the best training-free method, a cell is reported but not scored."""


@dataclass(frozen=True)
class RecoveryCell:
    """One (family, budget): tokens right per sample under a method, the best heuristic and golden, of `seen` checked.

    The samples are the same, in the same order, in all four. Losses are negative, higher is better; `least` is the smallest
    gap that is scored.
    """

    method: Sequence[float]
    best: Sequence[float]
    golden: Sequence[float]
    seen: Sequence[float]
    least: float = SMALLEST_GAP

    @property
    def gap(self) -> float:
        """Returns accuracy of golden minus that of the best heuristic."""
        return (sum(self.golden) - sum(self.best)) / sum(self.seen)

    @property
    def scored(self) -> bool:
        """Returns whether the gap is wide enough to divide by."""
        return self.gap >= self.least


def recovery(cells: Sequence[RecoveryCell], *, seed: int = 0, draws: int = DRAWS) -> Estimate:
    """Returns the recovery from the best training-free method (0) to golden (1).

    Of one cell: sum(method - best) / sum(golden - best). Of several (the families at one budget) both sums run over
    the cells' accuracy differences: how many tokens a family checks does not matter, but one with a wide gap weighs
    more than one with a narrow gap. Samples are resampled within their cell. Cells with too narrow a gap are
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


def estimate(value: float, above: np.ndarray, below: np.ndarray) -> Estimate:
    """Returns a figure with the percentiles of its bootstrap draws; those whose denominator is not positive are left out."""
    usable = below > 0
    drawn = above[usable] / below[usable]
    edge = (100.0 - COVERAGE) / 2
    low, high = np.percentile(drawn, [edge, 100.0 - edge])
    return Estimate(value, float(low), float(high))
