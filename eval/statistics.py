"""Confidence intervals (95 %) of means, and of differences of two means on the same samples.

All are closed forms or roots of one equation: deterministic, without a random draw, and as fast on
100,000 samples as a sum over them. Questions about one picture or video are not independent, their
clusters are; the variance of a clustered mean is the cluster-robust one of Miller, "Adding Error
Bars to Evals" (arXiv:2411.00640, equation 4), corrected for few clusters as the CR2 of Bell and
McCaffrey (2002), and never below the variance of independent values.

- Scores from 0 to 1, such as right or wrong: Wilson's score interval (1927), which stays in range
  and has a width even if every answer is right. Clustered or fractional scores enter it by their
  effective sample size, mean (1 - mean) / variance, as in Korn and Graubard (1998) and Dean and
  Pacheco (2015); clustered ones with the quantile of Student's t.
- Paired differences of such scores: Tango's score interval (1998) of the gains and losses, with
  an effective sample size likewise. With no gain and no loss among n pairs it is
  +-z^2 / (n + z^2), about +-3.8 / n: a difference of that size could have been missed.
- Values of any other range: mean +- t standard errors.

Why not a bootstrap over clusters: with 30 clusters and a share of 0.98 it covered the truth in 55
to 90 % of simulated cases, and it has no width when all answers are right. These intervals cover it
in 92 % or more (`tests/eval/test_statistics.py` simulates), and are on the wide side where few
clusters, or few samples that are not all alike, say little. Means of skewed values without bounds
are covered in 90 % only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Z_95 = 1.959964
# Of the variance's estimate, see `_effective_size`. Among 0, 1/4, 1/2 and 1 the smallest with which
# clustered shares near 0 and 1 are covered.
ADDED_CLUSTERS = 0.25
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A 95 % interval and how it was made.

    Attributes:
        low: lower end, not rounded.
        high: upper end.
        kind: "wilson", "t" or "tango", with ", clustered" where samples share clusters.
    """

    low: float
    high: float
    kind: str


@dataclass(frozen=True)
class Paired:
    """A difference of two means on the same samples.

    Attributes:
        difference: mean of the values less mean of the base.
        interval: of the difference; None if there is too little to tell.
    """

    difference: float
    interval: Interval | None


def wilson(right: float, asked: float, quantile: float = Z_95) -> tuple[float, float]:
    """Wilson's interval of a share of independent answers, not rounded.

    Args:
        right: answers that count, from 0 to `asked`; need not be whole.
        asked: answers, above 0.
        quantile: of the normal distribution, or of Student's t.

    Example:
        >>> low, high = wilson(8, 10)
        >>> round(low, 4), round(high, 4)
        (0.4902, 0.9433)
    """
    share, spread = right / asked, quantile**2 / asked
    middle = share + spread / 2
    half = quantile * math.sqrt(share * (1 - share) / asked + spread / (4 * asked))
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return max(0.0, low), min(1.0, high)


def mean_interval(values: Sequence[float], clusters: Sequence[str | None]) -> Interval | None:
    """95 % interval of the mean of a task's scores.

    Args:
        values: one finite number per sample.
        clusters: of each sample; None for a sample that stands alone.

    Returns:
        None for fewer than 2 values or clusters, and for equal values other than all 0 or all 1:
        how they would spread is then unknown.

    Example:
        >>> interval = mean_interval([1.0] * 20, [None] * 20)
        >>> round(interval.low, 3), interval.high, interval.kind
        (0.839, 1.0, 'wilson')
    """
    scores = np.asarray(values, np.float64)
    sums = _Clusters.of(scores, clusters)
    if sums.count < 2:
        return None
    if scores.min() < 0 or scores.max() > 1:
        return _t_interval(scores, sums)
    mean = float(scores.mean())
    if scores.min() == scores.max() and mean not in (0.0, 1.0):
        return None
    effective = _effective_size(scores, sums, (0.0, 1.0))
    return Interval(*wilson(mean * effective, effective, sums.quantile), sums.kind("wilson"))


def paired_interval(
    values: Sequence[float], base: Sequence[float], clusters: Sequence[str | None]
) -> Paired:
    """Difference of two means on the same samples, at least one, with its 95 % interval.

    Args:
        values: one finite number per sample.
        base: what is compared with, in the same order.
        clusters: of each sample; None for a sample that stands alone.

    Example:
        >>> same = paired_interval([1, 0, 1, 1], [1, 0, 1, 1], [None] * 4)
        >>> same.difference, round(same.interval.low, 2), round(same.interval.high, 2)
        (0.0, -0.49, 0.49)
    """
    first, second = np.asarray(values, np.float64), np.asarray(base, np.float64)
    gains = first - second
    sums = _Clusters.of(gains, clusters)
    difference = float(gains.mean())
    if sums.count < 2:
        return Paired(difference, None)
    if min(first.min(), second.min()) < 0 or max(first.max(), second.max()) > 1:
        return Paired(difference, _t_interval(gains, sums))
    effective = _effective_size(gains, sums, (-1.0, 1.0))
    gained, lost = float(gains.clip(min=0).mean()), float((-gains).clip(min=0).mean())
    low, high = _tango(gained, lost, effective, sums.quantile)
    return Paired(difference, Interval(low, high, sums.kind("tango")))


@dataclass(frozen=True)
class _Clusters:
    """Values summed by cluster.

    Attributes:
        values: float64 [clusters], their sums.
        sizes: float64 [clusters], samples in each.
    """

    values: Array
    sizes: Array

    @classmethod
    def of(cls, values: Array, clusters: Sequence[str | None]) -> _Clusters:
        """Sums of `values` by cluster; each None is a cluster of its own."""
        known: dict[str | int, int] = {}
        # A number never equals a name, so that a sample that stands alone has a key of its own.
        keys = (place if name is None else name for place, name in enumerate(clusters))
        numbers = np.array([known.setdefault(key, len(known)) for key in keys], np.int64)
        values = np.bincount(numbers, weights=values).astype(np.float64)
        return cls(values, np.bincount(numbers).astype(np.float64))

    @property
    def count(self) -> int:
        return len(self.sizes)

    @property
    def samples(self) -> float:
        return float(self.sizes.sum())

    @property
    def clustered(self) -> bool:
        return bool(self.sizes.max() > 1)

    @property
    def typical_size(self) -> float:
        """Samples in the cluster of a sample, mean over samples."""
        return float((self.sizes**2).sum()) / self.samples

    @property
    def quantile(self) -> float:
        """Of the normal distribution, or of Student's if there are clusters to learn from."""
        return self.t_quantile if self.clustered else Z_95

    @property
    def t_quantile(self) -> float:
        """Student's, with the degrees of freedom that as many equal clusters would give."""
        return t_quantile(self.samples / self.typical_size - 1)

    def kind(self, name: str) -> str:
        return f"{name}, clustered" if self.clustered else name

    def squares(self, values: Array, mean: float) -> float:
        """Sum of squares whose share of samples ** 2 is the variance of the mean of `values`."""
        independent = ((values - mean) ** 2).sum() * len(values) / (len(values) - 1)
        residuals = self.values - self.sizes * mean
        robust = (residuals**2 / (1 - self.sizes / self.samples)).sum()
        return max(float(independent), float(robust))


def _effective_size(values: Array, sums: _Clusters, ends: tuple[float, float]) -> float:
    """Independent values, each at 0 or at one of the ends, whose mean would vary as much.

    With few values off an end there is little to learn the variance from. So a quarter of a
    cluster of typical size is added to learn it from, half at one end and half at the other.
    """
    low, high = ends
    if not sums.clustered and bool(np.isin(values, (low, 0.0, high)).all()):
        return float(len(values))
    size = sums.typical_size
    each = ADDED_CLUSTERS / 2 * size
    samples = len(values) + 2 * each
    mean = (float(values.sum()) + each * (low + high)) / samples
    largest = (float(np.abs(values).sum()) + each * (abs(low) + abs(high))) / samples - mean**2
    added = each * size * ((low - mean) ** 2 + (high - mean) ** 2)
    variance = (sums.squares(values, mean) + added) / samples
    return len(values) * largest / variance


def _t_interval(values: Array, sums: _Clusters) -> Interval | None:
    if values.min() == values.max():
        return None
    mean = float(values.mean())
    half = sums.t_quantile * math.sqrt(sums.squares(values, mean)) / len(values)
    return Interval(mean - half, mean + half, sums.kind("t"))


def _tango(gained: float, lost: float, pairs: float, quantile: float) -> tuple[float, float]:
    """Tango's interval of gained - lost, the shares of pairs that gain and that lose.

    Its ends are the differences that a score test would just not reject.
    """

    def statistic(difference: float) -> float:
        linear = (2 - gained + lost) * difference - gained - lost
        constant = -lost * difference * (1 - difference)
        root = math.sqrt(max(0.0, linear**2 - 8 * constant))
        spread = (root - linear) / 2 + difference * (1 - difference)
        distance = gained - lost - difference
        if spread <= 0:
            return math.copysign(math.inf, distance)
        return distance * math.sqrt(pairs / spread)

    def end(outside: float) -> float:
        inside = gained - lost
        for _ in range(60):
            middle = (inside + outside) / 2
            if abs(statistic(middle)) > quantile:
                outside = middle
            else:
                inside = middle
        return inside

    return end(-1.0), end(1.0)


@lru_cache(maxsize=1024)
def t_quantile(degrees: float) -> float:
    """The 97.5 % quantile of Student's t.

    Args:
        degrees: of freedom, not necessarily whole; fewer than 1 count as 1.

    Example:
        >>> [round(t_quantile(degrees), 3) for degrees in (1, 9, 1e6)]
        [12.706, 2.262, 1.96]
    """
    degrees = max(1.0, degrees)
    # With t = sqrt(degrees) tan(angle), the density is cos(angle) ** (degrees - 1).
    angle = np.linspace(0.0, min(math.pi / 2, 10 / math.sqrt(degrees)), 20_001)
    density = np.cos(angle) ** (degrees - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return float(math.sqrt(degrees) * math.tan(np.interp(0.95 * mass[-1], mass, angle)))
