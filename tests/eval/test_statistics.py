"""Intervals: by hand, at the borders, and how often they hold the truth in simulated data."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from eval.statistics import Interval, mean_interval, paired_interval, t_quantile, wilson

SETS = 400  # simulated data sets: a coverage of 0.95 is measured as 0.95 +- 0.02


def alone(count: int) -> list[str | None]:
    return [None] * count


def ends(interval: Interval | None) -> tuple[float, float]:
    assert interval is not None
    return interval.low, interval.high


# -- by hand ------------------------------------------------------------------------------------


def test_wilson_by_hand() -> None:
    # p = 0.5, n = 100: 0.5 +- 1.96 * sqrt(0.0025 + z^2 / 40000) / (1 + z^2 / 100)
    assert wilson(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    # None right: 0 to z^2 / (n + z^2) = 3.8415 / 13.8415.
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)


def test_students_t_is_the_tabled_one() -> None:
    tabled = {1: 12.7062, 2: 4.3027, 5: 2.5706, 29: 2.0452, 100: 1.9840, 10_000: 1.9602}
    for degrees, value in tabled.items():
        assert t_quantile(degrees) == pytest.approx(value, abs=2e-4)
    assert t_quantile(0.5) == t_quantile(1)


def test_right_or_wrong_alone_is_wilson() -> None:
    interval = mean_interval([1.0] * 8 + [0.0] * 2, alone(10))
    assert interval == Interval(*wilson(8, 10), "wilson")
    # Clusters of one are no clusters.
    assert mean_interval([1.0] * 8 + [0.0] * 2, [str(one) for one in range(10)]) == interval


def test_values_of_another_range_have_students_interval() -> None:
    # Mean 3, standard deviation sqrt(2.5), n = 5: 3 +- 2.7764 * sqrt(2.5 / 5).
    interval = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0], alone(5))
    assert interval is not None
    assert interval.kind == "t"
    assert ends(interval) == pytest.approx((1.0367, 4.9633), abs=1e-3)
    # Clusters (0, 4), (6, 10), (5, 11): mean 6, sums of residuals -8, 4, 4; shares of a third, so
    # that the variance is (64 + 16 + 16) / (2 / 3) / 36 = 4, and t of 2 degrees is 4.3027.
    interval = mean_interval([0, 4, 6, 10, 5, 11], ["a", "a", "b", "b", "c", "c"])
    assert interval is not None
    assert interval.kind == "t, clustered"
    assert ends(interval) == pytest.approx((6 - 8.6053, 6 + 8.6053), abs=1e-3)


def test_a_cluster_of_copies_counts_once() -> None:
    rng = np.random.default_rng(0)
    values = (rng.random(200) < 0.6).astype(float)
    single = mean_interval(list(values), alone(200))
    copied = mean_interval(
        list(np.repeat(values, 5)), [str(one) for one in np.repeat(np.arange(200), 5)]
    )
    assert copied is not None
    assert copied.kind == "wilson, clustered"
    assert ends(copied) == pytest.approx(ends(single), abs=0.002)


def test_names_of_clusters_and_the_order_of_samples_do_not_matter() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.5]
    clusters = ["a", "a", "b", None, None, "b", "0"]
    there = mean_interval(values, clusters)
    renamed = {"a": "7", "b": "6", "0": "z", None: None}
    back = mean_interval(values[::-1], [renamed[one] for one in clusters[::-1]])
    assert ends(there) == pytest.approx(ends(back))


def test_nothing_is_said_of_too_little() -> None:
    assert mean_interval([], []) is None
    assert mean_interval([1.0], [None]) is None
    assert mean_interval([1.0, 0.0, 1.0], ["a"] * 3) is None
    assert mean_interval([0.7] * 9, alone(9)) is None
    assert mean_interval([4.0] * 9, alone(9)) is None
    assert paired_interval([1.0], [0.0], [None]).interval is None
    assert paired_interval([1.0, 0.0], [0.0, 1.0], ["a", "a"]).interval is None
    assert paired_interval([4.0] * 9, [4.0] * 9, alone(9)).interval is None


def test_all_right_leaves_room_for_an_error() -> None:
    assert ends(mean_interval([1.0] * 20, alone(20))) == pytest.approx(wilson(20, 20))
    # Clusters may be of one piece: 20 of 5 tell as much as 20 answers.
    clustered = mean_interval([1.0] * 100, [str(one // 5) for one in range(100)])
    assert ends(clustered) == pytest.approx(wilson(20, 20, t_quantile(19)), abs=0.01)


def test_tangos_interval_by_hand() -> None:
    # No pair differs: +- z^2 / (n + z^2).
    same = paired_interval([1.0, 0.0] * 20, [1.0, 0.0] * 20, alone(40))
    assert same.difference == 0
    assert ends(same.interval) == pytest.approx((-0.08762, 0.08762), abs=1e-5)
    # Airway reactivity of 21 children, 1 gain and 7 losses: Fagerland, Lydersen and Laake (2014)
    # give -0.517 to -0.026 by Tango's method.
    found = paired_interval([1] + [0] * 20, [0] + [1] * 7 + [0] * 13, alone(21))
    assert ends(found.interval) == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize(("gained", "lost", "pairs"), [(0, 1, 44), (2, 9, 60), (5, 1, 30)])
def test_tangos_ends_are_where_a_score_test_just_rejects(
    gained: int, lost: int, pairs: int
) -> None:
    """The likelihood is maximised on a grid here, by a formula there."""
    base = [0.0] * gained + [1.0] * (pairs - gained)
    values = [1.0] * (pairs - lost) + [0.0] * lost
    found = paired_interval(values, base, alone(pairs))
    assert found.difference == pytest.approx((gained - lost) / pairs)
    assert found.interval is not None
    assert found.interval.kind == "tango"
    for end, sign in zip(ends(found.interval), (1, -1), strict=True):
        loss = np.linspace(max(0.0, -end) + 1e-9, (1 - end) / 2 - 1e-9, 200_001)
        likelihood = (
            gained * np.log(loss + end)
            + lost * np.log(loss)
            + (pairs - gained - lost) * np.log(1 - 2 * loss - end)
        )
        best = loss[likelihood.argmax()]
        statistic = (gained - lost - pairs * end) / np.sqrt(pairs * (2 * best + end - end**2))
        assert statistic == pytest.approx(sign * 1.959964, abs=1e-3)


def test_a_difference_the_other_way_has_the_mirrored_interval() -> None:
    rng = np.random.default_rng(3)
    first, second = (list((rng.random(90) < share).astype(float)) for share in (0.8, 0.6))
    clusters = [str(one // 3) for one in range(90)]
    there, back = (paired_interval(*pair, clusters) for pair in ((first, second), (second, first)))
    assert there.difference == pytest.approx(sum(first) / 90 - sum(second) / 90)
    low, high = ends(there.interval)
    assert ends(back.interval) == pytest.approx((-high, -low))
    assert low < there.difference < high


def test_pairs_that_agree_make_the_difference_surer() -> None:
    rng = np.random.default_rng(4)
    base = list((rng.random(400) < 0.7).astype(float))
    values = [0.0] * 8 + base[8:]
    paired = paired_interval(values, base, alone(400))
    low, high = ends(paired.interval)
    assert high - low < 0.06  # two independent accuracies of 400: 0.127


# -- against lmms-eval --------------------------------------------------------------------------


def test_lmms_evals_clustered_error_agrees() -> None:
    metrics = pytest.importorskip("lmms_eval.api.metrics")
    values, clusters = clustered_answers(np.random.default_rng(5), 200, 0.6, 0.3, equal)
    low, high = ends(mean_interval(values, clusters))
    theirs = metrics.clustered_stderr(values, clusters)
    assert (high - low) / (2 * t_quantile(199)) == pytest.approx(theirs, rel=0.03)
    numbers = list(np.random.default_rng(6).normal(size=300))
    low, high = ends(mean_interval(numbers, alone(300)))
    assert (high - low) / (2 * t_quantile(299)) == pytest.approx(metrics.mean_stderr(numbers))


# -- by simulation ------------------------------------------------------------------------------


def equal(rng: np.random.Generator, clusters: int) -> Any:
    return np.full(clusters, 6)


def unequal(rng: np.random.Generator, clusters: int) -> Any:
    """Sizes from 2 up, mean 7.7, now and then 30."""
    return 1 + rng.geometric(0.15, clusters)


Sizes = Callable[[np.random.Generator, int], Any]
Answers = tuple[list[float], list[str | None]]


def clustered_answers(
    rng: np.random.Generator, clusters: int, share: float, correlation: float, sizes: Sizes
) -> Answers:
    """Right and wrong answers whose chance is another in every cluster (beta-binomial)."""
    spread = (1 - correlation) / correlation
    chances = rng.beta(share * spread, (1 - share) * spread, clusters)
    of = np.repeat(np.arange(clusters), sizes(rng, clusters))
    return list((rng.random(len(of)) < chances[of]).astype(float)), [str(one) for one in of]


def coverage(draw: Callable[[np.random.Generator], Interval | None], truth: float) -> float:
    """How often the interval of simulated data holds the truth."""
    rng = np.random.default_rng(11)
    held = 0
    for _ in range(SETS):
        low, high = ends(draw(rng))
        held += low <= truth <= high
    return held / SETS


@pytest.mark.parametrize("share", [0.5, 0.9, 0.98])
@pytest.mark.parametrize("count", [50, 400])
def test_coverage_of_independent_answers(count: int, share: float) -> None:
    def draw(rng: np.random.Generator) -> Interval | None:
        return mean_interval(list((rng.random(count) < share).astype(float)), alone(count))

    assert 0.92 <= coverage(draw, share) <= 0.985


@pytest.mark.parametrize("count", [30, 200])
@pytest.mark.parametrize("below", [0.02, 0.1, 0.4])
def test_coverage_of_scores_mostly_one(count: int, below: float) -> None:
    """Such as text similarity: Student's interval covers 0.3 to 0.9 of these."""

    def draw(rng: np.random.Generator) -> Interval | None:
        values = np.where(rng.random(count) < below, rng.random(count), 1.0)
        return mean_interval(list(values), alone(count))

    assert 0.92 <= coverage(draw, 1 - below / 2) <= 0.985


@pytest.mark.parametrize("sizes", [equal, unequal])
@pytest.mark.parametrize("correlation", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.98])
@pytest.mark.parametrize("clusters", [30, 100])
def test_coverage_of_clustered_answers(
    clusters: int, share: float, correlation: float, sizes: Sizes
) -> None:
    def draw(rng: np.random.Generator) -> Interval | None:
        return mean_interval(*clustered_answers(rng, clusters, share, correlation, sizes))

    assert 0.91 <= coverage(draw, share) <= 0.998


def test_forgetting_the_clusters_would_not_cover() -> None:
    def draw(rng: np.random.Generator) -> Interval | None:
        values, _ = clustered_answers(rng, 100, 0.5, 0.3, equal)
        return mean_interval(values, alone(len(values)))

    assert coverage(draw, 0.5) < 0.85


@pytest.mark.parametrize("degrees", [10, 60])
def test_coverage_of_unbounded_clustered_values(degrees: int) -> None:
    def draw(rng: np.random.Generator) -> Interval | None:
        of = np.repeat(np.arange(degrees), unequal(rng, degrees))
        values = 0.7 * rng.normal(size=degrees)[of] + rng.normal(size=len(of))
        return mean_interval(list(values), [str(one) for one in of])

    assert 0.92 <= coverage(draw, 0.0) <= 0.98


@pytest.mark.parametrize(
    ("gained", "lost"), [(0.01, 0.01), (0.05, 0.05), (0.01, 0.05), (0.02, 0.2), (0.2, 0.3)]
)
@pytest.mark.parametrize("pairs", [100, 400])
def test_coverage_of_paired_differences(pairs: int, gained: float, lost: float) -> None:
    def draw(rng: np.random.Generator) -> Interval | None:
        chance = rng.random(pairs)
        gain, loss = chance < gained, chance > 1 - lost
        base = np.where(gain, 0.0, np.where(loss, 1.0, rng.random(pairs) < 0.6))
        return paired_interval(list(base + gain - loss), list(base), alone(pairs)).interval

    # On the safe side where hardly a pair differs.
    assert 0.92 <= coverage(draw, gained - lost) <= 0.998


@pytest.mark.parametrize("sizes", [equal, unequal])
@pytest.mark.parametrize("correlation", [0.1, 0.5])
@pytest.mark.parametrize(("gained", "lost"), [(0.02, 0.1), (0.1, 0.1), (0.01, 0.05)])
@pytest.mark.parametrize("clusters", [30, 100])
def test_coverage_of_clustered_paired_differences(
    clusters: int, gained: float, lost: float, correlation: float, sizes: Sizes
) -> None:
    """Few pairs differ and few clusters: on the safe side."""

    def draw(rng: np.random.Generator) -> Interval | None:
        weights = np.array([gained, lost, 1 - gained - lost]) * (1 - correlation) / correlation
        chances = rng.dirichlet(weights, clusters)
        of = np.repeat(np.arange(clusters), sizes(rng, clusters))
        chance = rng.random(len(of))
        gain, loss = chance < chances[of, 0], chance > 1 - chances[of, 1]
        base = np.where(gain, 0.0, 1.0)
        names: list[str | None] = [str(one) for one in of]
        return paired_interval(list(base + gain - loss), list(base), names).interval

    assert coverage(draw, gained - lost) >= 0.92


def test_a_hundred_thousand_samples_take_no_time() -> None:
    rng = np.random.default_rng(8)
    values, base = (list((rng.random(100_000) < 0.9).astype(float)) for _ in range(2))
    clusters: list[str | None] = [str(one // 3) for one in range(100_000)]
    start = time.perf_counter()
    assert mean_interval(values, clusters) is not None
    assert paired_interval(values, base, clusters).interval is not None
    assert time.perf_counter() - start < 1.0
