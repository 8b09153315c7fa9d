"""Intervals and tests behind every number of the book, through SciPy.

Which interval for what: `t_interval` for a handful of runs (3 to 9 seeds), `bootstrap_interval` for held-out units
(digits, chapters), `mean_interval` and `paired_difference` choose between the two by the number of units. Every
interval is a 95 % one. A unit is what was drawn independently: a digit and not its patches, a chapter and not its
letters; intervals over dependent parts are too narrow.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
RESAMPLES = 9_999
FEW = 10  #: below so many units a mean gets Student's interval: the bootstrap's is far too narrow there
MANY = 2_000  #: above so many units the bootstrap is a percentile one: BCa needs n² steps and no longer matters
CHUNK = 2**22  #: values resampled at once, so that memory does not grow with the number of units


class Estimate(NamedTuple):
    """A number, its 95 % interval, and the number of independent units behind it.

    A format writes it out: `f"{one:.2f}"` is "0.12 [−0.10, 0.34]", and `f"{one:.0%}"` is "12 [−10, 34] %".
    """

    estimate: float
    low: float
    high: float
    n: int

    def __format__(self, spec: str) -> str:
        if not spec:
            return str(self)
        numbers = [f"{value:{spec}}".removesuffix("%") for value in self[:3]]
        # A minus is one, and what is rounded to nothing has none.
        estimate, low, high = (text.replace("-", "−" if text.strip("-0.,") else "") for text in numbers)
        return f"{estimate} [{low}, {high}]" + (" %" if spec.endswith("%") else "")


class PermutationNull(NamedTuple):
    """A statistic, its values under shuffled labels [permutations], and the share of those that reach it."""

    observed: float
    null: NDArray[np.float64]
    p_value: float


def _sample(values: ArrayLike, function: str, name: str = "values") -> NDArray[np.float64]:
    """One sample as float64 [n], or an error that says what is wrong with it."""
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1:
        raise ValueError(f"{function}: {name} has shape {sample.shape}; one dimension is accepted, a number a unit")
    if len(sample) < 2:
        raise ValueError(f"{function}: {name} has n = {len(sample)}; an interval or a test needs at least 2 units")
    if not np.isfinite(sample).all():
        bad = np.flatnonzero(~np.isfinite(sample))
        raise ValueError(f"{function}: {len(bad)} of {len(sample)} {name} are NaN or infinite, the first at {bad[0]}")
    return sample


def t_interval(values: ArrayLike) -> Estimate:
    """Mean of values [n], one a run, and Student's 95 % interval, mean ± t(0.975, n−1)·s/√n: the one for a few runs.

    Right for normally distributed values at any n ≥ 2. Over 3 seeds it is wide, and has to be: a bootstrap over 3 values, which
    can only draw these three again, covers the true mean about 3 times in 4 instead of 19 in 20. Raises ValueError if n < 2, or
    a value is NaN or infinite.
    """
    from scipy.special import stdtrit

    sample = _sample(values, "t_interval")
    mean, n = float(sample.mean()), len(sample)
    if np.ptp(sample) == 0:
        return Estimate(float(sample[0]), float(sample[0]), float(sample[0]), n)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2) * sample.std(ddof=1) / np.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def share_interval(hits: ArrayLike) -> Estimate:
    """Share of units [n] that hit, and Wilson's 95 % interval (Wilson 1927): it has a width also where all or none do.

    Raises ValueError if there is none, or a value that is neither 0 nor 1.
    """
    from scipy.stats import binomtest

    sample = np.asarray(hits)
    if sample.ndim != 1 or not len(sample) or not np.isin(sample, (0, 1)).all():
        raise ValueError(f"share_interval: takes truth values [n], n at least 1; got {sample.tolist()!r:.80}")
    count, n = int(sample.sum()), len(sample)
    low, high = binomtest(count, n).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(count / n, min(float(low), count / n), max(float(high), count / n), n)  # rounding may pass the ends


def bootstrap_interval(*samples: ArrayLike, statistic: Callable[..., Any] = np.mean, seed: int = 0) -> Estimate:
    """A statistic over independent units and its 95 % bootstrap interval (`scipy.stats.bootstrap`, 9,999 resamples).

    Bias-corrected and accelerated (Efron 1987) up to 2,000 units, percentile above, and percentile also where the correction is
    undefined (a statistic that hardly changes over the resamples). Equal units give an interval of width zero. The interval
    always holds the estimate. Below 10 units prefer `t_interval`.

    Args:
        samples: one or more [n]; several samples belong together unit by unit and are drawn together, so that
            `bootstrap_interval(loss, tokens, statistic=lambda a, b, axis: a.sum(axis) / b.sum(axis))` is a rate.
        statistic: takes the samples and, to be fast, `axis`.
        seed: of the resampling.

    Raises ValueError if n < 2, the samples differ in length, a value is NaN or infinite, or the statistic becomes so.
    """
    import warnings

    if not samples:
        raise ValueError("bootstrap_interval: no sample was given; at least one is needed")
    data = [_sample(sample, "bootstrap_interval", f"sample {i}") for i, sample in enumerate(samples)]
    n = len(data[0])
    if any(len(sample) != n for sample in data):
        raise ValueError(f"bootstrap_interval: the samples have {[len(s) for s in data]} units; one length is accepted")
    estimate = float(statistic(*data))
    if not np.isfinite(estimate):
        raise ValueError(f"bootstrap_interval: the statistic of the samples is {estimate}")
    if all(np.ptp(sample) == 0 for sample in data):
        return Estimate(estimate, estimate, estimate, n)

    from scipy.stats import bootstrap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a degenerate resample is told from its interval, below
        for method in ("BCa", "percentile") if n <= MANY else ("percentile",):
            options = {"method": method, "confidence_level": CONFIDENCE, "rng": np.random.default_rng(seed), "paired": True}
            resampled = bootstrap(data, statistic, n_resamples=RESAMPLES, batch=max(1, CHUNK // n), **options)
            low, high = (float(end) for end in resampled.confidence_interval)
            if np.isfinite([low, high]).all():
                return Estimate(estimate, min(low, estimate), max(high, estimate), n)
    raise ValueError("bootstrap_interval: the statistic is NaN or infinite on some resamples of the units")


def mean_interval(values: ArrayLike, *, seed: int = 0) -> Estimate:
    """Mean of values [n], one a unit, and 95 % interval: Student's below 10 units, from 10 on the bootstrap's by the seed.

    Raises ValueError as `t_interval` and `bootstrap_interval`.
    """
    sample = _sample(values, "mean_interval")
    return t_interval(sample) if len(sample) < FEW else bootstrap_interval(sample, seed=seed)


def paired_difference(first: ArrayLike, second: ArrayLike, *, seed: int = 0) -> Estimate:
    """Mean of first − second [n] over pairs (same unit, same seed, same fold), with the interval of `mean_interval`.

    Raises ValueError if the lengths differ, n < 2, or a value is NaN or infinite.
    """
    pair = _sample(first, "paired_difference", "first"), _sample(second, "paired_difference", "second")
    if len(pair[0]) != len(pair[1]):
        raise ValueError(f"paired_difference: pairs need two samples of one length, got {len(pair[0])} and {len(pair[1])}")
    return mean_interval(pair[0] - pair[1], seed=seed)


def crossed_interval(differences: ArrayLike) -> Estimate:
    """Mean and a cautious 95 % interval of paired differences [bases, seeds, C], of which C chapters are the same for all.

    Two things vary: which base models were trained, and which chapters were held out. The variance of the mean is taken as that
    of the bases' means over their number plus that of the chapters' means over theirs (what both share is counted twice), and the
    interval is Student's with as many degrees of freedom as there are bases, less one: too wide rather than too narrow. Seeds of
    one base are not independent and are averaged first; with a single base the seeds take the place of the bases, and the
    interval says nothing about other base models. Its n is the number of runs, bases times seeds. Raises ValueError for
    another shape, fewer than 2 runs or chapters, or values that are not finite.
    """
    from scipy.special import stdtrit

    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 3 or values.shape[0] * values.shape[1] < 2 or values.shape[2] < 2 or not np.isfinite(values).all():
        raise ValueError(f"differences are finite, [bases, seeds, chapters], 2 runs and chapters at least; got {values.shape}")
    units = values.mean((1, 2)) if len(values) > 1 else values[0].mean(1)
    chapters = values.mean((0, 1))
    variance = units.var(ddof=1) / len(units) + chapters.var(ddof=1) / len(chapters)
    mean, half = float(values.mean()), float(stdtrit(len(units) - 1, 0.975) * np.sqrt(variance))
    return Estimate(mean, mean - half, mean + half, values.shape[0] * values.shape[1])


def permutation_null(
    statistic: Callable[[Any, Any], float], values: Any, labels: Any, *, permutations: int = 199, seed: int = 0
) -> PermutationNull:
    """What a statistic of (values, labels) would be if the labels said nothing: its values under shuffled labels.

    Chance level for mutual information, purity and the like, which are above zero by chance alone. The labels are shuffled along
    their first axis, so that axis has to be the independent units: give labels [digits] and weights [digits, patches, states],
    not one row a patch, or the null comes out too narrow.

    Args:
        statistic: takes `values` and shuffled `labels` (an array or tensor [n, …]), returns a number; more means more related.
        permutations: how many shuffles by the seed; the least p-value is 1/(permutations + 1).

    Returns the observed statistic, the null [permutations], and p = (1 + #(null ≥ observed))/(1 + permutations). Raises
    ValueError if there are fewer than 2 labels or 1 permutation, or the statistic is NaN or infinite.
    """
    n = len(labels)
    if n < 2 or permutations < 1:
        raise ValueError(f"permutation_null: got {n} labels and {permutations} permutations; at least 2 and 1 are needed")
    if not hasattr(labels, "shape"):
        labels = np.asarray(labels)
    generator = np.random.default_rng(seed)
    observed = float(statistic(values, labels))
    null = np.array([float(statistic(values, labels[generator.permutation(n)])) for _ in range(permutations)])
    if not (np.isfinite(observed) and np.isfinite(null).all()):
        raise ValueError("permutation_null: the statistic is NaN or infinite for these values and labels")
    # A relative tolerance, as rounding alone must not tell a shuffle from the data that it leaves as they are.
    reached = null >= observed - 1e-12 * max(1.0, abs(observed))
    return PermutationNull(observed, null, float((1 + reached.sum()) / (1 + permutations)))
