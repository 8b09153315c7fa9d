"""Intervals and tests against closed forms, hand counts and simulated coverage; every edge says what is wrong."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsm_support.statistics import (
    Estimate,
    bootstrap_interval,
    crossed_interval,
    mean_interval,
    paired_difference,
    permutation_null,
    share_interval,
    t_interval,
)

pytestmark = pytest.mark.filterwarnings("error")
INTERVALS = (t_interval, bootstrap_interval, mean_interval)


def test_an_estimate_writes_itself_out():
    one = Estimate(0.1234, -0.1, -0.0001, 3)
    assert f"{one:.2f}" == "0.12 [−0.10, 0.00]" and f"{one:+.3f}" == "+0.123 [−0.100, 0.000]"
    assert f"{one:.1%}" == "12.3 [−10.0, 0.0] %" and f"{one}" == repr(one)


def test_t_interval_by_hand():
    # 1, 2, 3: mean 2, s = 1, t(0.975, 2) = 4.302653 (any table), so 2 ± 4.302653/√3
    estimate = t_interval([1, 2, 3])
    assert estimate == pytest.approx((2, 2 - 2.484138, 2 + 2.484138, 3), abs=1e-6)
    assert t_interval(torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(estimate)
    assert t_interval([0, 1]) == pytest.approx((0.5, 0.5 - 6.353102, 0.5 + 6.353102, 2), abs=1e-6)


def test_the_bootstrap_agrees_with_the_normal_interval_where_both_are_right():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    half = 1.959964 * values.std() / 20
    estimate = bootstrap_interval(values)
    assert estimate.estimate == values.mean() and estimate.n == 400
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03 * half)
    assert estimate == bootstrap_interval(values) != bootstrap_interval(values, seed=1)


def test_units_of_several_samples_are_drawn_together():
    # Each unit's loss is exactly twice its tokens: the rate is 2 in every resample of whole units, and only there.
    tokens = np.random.default_rng(2).integers(1, 50, size=30)
    rate = lambda a, b, axis=-1: a.sum(axis) / b.sum(axis)  # noqa: E731
    assert bootstrap_interval(2.0 * tokens, tokens, statistic=rate) == (2, 2, 2, 30)
    noisy = bootstrap_interval(2.0 * tokens + np.sin(tokens), tokens, statistic=rate)
    assert 1.9 < noisy.low < noisy.estimate < noisy.high < 2.1


def test_few_runs_get_student_because_the_bootstrap_covers_too_little():
    generator = np.random.default_rng(3)
    draws = generator.normal(size=(150, 3))
    student = np.mean([t.low <= 0 <= t.high for t in map(t_interval, draws)])
    resampled = np.mean([b.low <= 0 <= b.high for b in map(bootstrap_interval, draws[:60])])
    assert 0.90 < student < 0.99
    assert resampled < 0.85
    assert mean_interval(draws[0]) == t_interval(draws[0])
    nine, ten = generator.normal(size=9), generator.normal(size=10)
    assert mean_interval(nine) == t_interval(nine)
    assert mean_interval(ten) == bootstrap_interval(ten) != t_interval(ten)


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("values", ([0.3] * 3, [0.1] * 20, [1e300, 1e300]))
def test_equal_units_have_an_interval_of_width_zero(interval, values):
    estimate = interval(values)
    assert estimate.low == estimate.estimate == estimate.high == pytest.approx(values[0])
    assert estimate.n == len(values)


def test_a_statistic_that_hardly_changes_falls_back_on_percentiles():
    # The median of 0, …, 0, 1 is 0 in the sample and its jackknife: the BCa correction is 0/0.
    assert bootstrap_interval([0.0] * 19 + [1.0], statistic=np.median) == (0, 0, 0, 20)
    assert all(type(x) in (float, int) for x in bootstrap_interval([0.0, 1.0, 1.0]))


def test_paired_difference_takes_out_what_the_pairs_share():
    generator = np.random.default_rng(4)
    shared = generator.normal(scale=100, size=200)
    first, second = shared + 1 + generator.normal(size=200), shared + generator.normal(size=200)
    difference = paired_difference(first, second)
    assert difference == bootstrap_interval(first - second)
    assert 0.6 < difference.low < 1 < difference.high < 1.4
    assert paired_difference([3, 5, 4], [2, 4, 3]) == (1, 1, 1, 3)


def test_permutation_null_knows_chance():
    generator = np.random.default_rng(6)
    labels = generator.integers(0, 2, 100)
    match = lambda values, labels: float(np.mean(values == labels))  # noqa: E731
    told = permutation_null(match, labels, labels)
    assert (told.observed, told.p_value) == (1, 1 / 200)
    assert told.null.shape == (199,) and abs(told.null.mean() - 0.5) < 0.03
    same = permutation_null(match, labels, np.ones(100))
    assert same.p_value == 1 and set(same.null) == {same.observed}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12))
def test_any_sample_has_a_finite_ordered_interval_without_a_warning(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for interval in INTERVALS:
            estimate = interval(values)
            assert np.isfinite(estimate).all() and estimate.low <= estimate.estimate <= estimate.high


def test_permutation_null_shuffles_whole_units():
    # Rows of labels stay rows: with labels [2 units, 3 tokens] only two arrangements exist.
    seen, labels = set(), torch.tensor([[0, 0, 0], [1, 1, 1]])
    permutation_null(lambda _, rows: float(seen.add(tuple(rows.flatten().tolist())) or 0), None, labels, permutations=30)
    assert seen == {(0, 0, 0, 1, 1, 1), (1, 1, 1, 0, 0, 0)}


def test_crossed_interval_covers_the_truth():
    """Bases, chapters and noise vary: at least 19 times in 20."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        values = 0.3 * rng.normal(size=(3, 1, 1)) + rng.normal(size=(1, 1, 40)) + rng.normal(size=(3, 2, 40))
        found = crossed_interval(values)
        hits += found.low <= 0 <= found.high
    assert hits / 1000 > 0.94


def test_crossed_interval_by_hand():
    values = np.array([[[1.0, 3.0], [2.0, 4.0]], [[0.0, 1.0], [1.0, 0.0]], [[2.0, 2.0], [0.0, 2.0]]])  # (3, 2, 2)
    found = crossed_interval(values)
    variance = np.var([2.5, 0.5, 1.5], ddof=1) / 3 + np.var([1.0, 2.0], ddof=1) / 2
    half = 4.302652729911275 * variance**0.5  # Student's with 2 degrees of freedom
    assert found.estimate == pytest.approx(1.5) and found.n == 6
    assert (found.low, found.high) == pytest.approx((1.5 - half, 1.5 + half))
    alone = crossed_interval(values[:1])  # the seeds in the place of the bases
    variance = np.var([2.0, 3.0], ddof=1) / 2 + np.var([1.5, 3.5], ddof=1) / 2
    assert alone.n == 2 and alone.high - alone.estimate == pytest.approx(12.706204736432095 * variance**0.5)


def test_a_share_has_wilsons_interval_which_holds_it_at_the_ends_too():
    z = 1.959963984540054
    for count, n in ((0, 6), (6, 6), (2, 7), (1, 1)):
        found, p = share_interval(np.arange(n) < count), count / n
        half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        assert found == pytest.approx((p, middle - half, middle + half, n), abs=1e-12) and found.low <= p <= found.high
    for wrong in ([], [0.5], [[True]], [True, 2]):
        with pytest.raises(ValueError, match="takes truth values"):
            share_interval(wrong)


@pytest.mark.parametrize("interval", [*INTERVALS, lambda values: paired_difference([1, 2], values)])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "n = 1"),
        ([], "n = 0"),
        ([1, np.nan, 2], "1 of 3 .* NaN or infinite, the first at 1"),
        ([[1, 2], [3, 4]], r"shape \(2, 2\)"),
    ],
)
def test_wrong_samples_are_refused(interval, values, message):
    with pytest.raises(ValueError, match=message):
        interval(values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (bootstrap_interval, "no sample"),
        (lambda: bootstrap_interval([1, 2], [1, 2, 3], statistic=lambda a, b: 0), r"\[2, 3\] units"),
        (lambda: paired_difference([1, 2, 3], [1, 2]), "one length, got 3 and 2"),
        (lambda: bootstrap_interval([1.0, 2.0], statistic=lambda x: np.nan), "statistic of the samples is nan"),
        (lambda: bootstrap_interval([1.0, 2.0], statistic=lambda x, axis=-1: 1 / x.var(axis)), "on some resamples"),
        (lambda: crossed_interval(np.zeros((3, 4))), "bases, seeds, chapters"),
        (lambda: crossed_interval(np.zeros((1, 1, 9))), "bases, seeds, chapters"),
        (lambda: crossed_interval(np.zeros((3, 2, 1))), "bases, seeds, chapters"),
        (lambda: crossed_interval(np.full((3, 2, 4), np.nan)), "bases, seeds, chapters"),
        (lambda: permutation_null(min, None, [0]), "1 labels and 199 permutations"),
        (lambda: permutation_null(lambda v, y: float("nan"), None, [0, 1]), "NaN or infinite"),
    ],
)
def test_other_misuse_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
