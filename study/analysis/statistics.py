"""Intervals and tests for few seeds: bootstrap, paired differences, factors, signs, counts, Holm.

The unit is the run: one number per run, runs of two arms paired by their seeds. Everything is
deterministic: the bootstrap draws from a generator with a fixed seed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy import optimize, stats

LEVEL = 0.95
POWER = 0.8
RESAMPLES = 10_000


def bootstrap_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; (nan, nan) for fewer than two values.

    The means of ``RESAMPLES`` samples of n values, drawn from the n values with replacement; the
    ends are their (1 - level)/2 and (1 + level)/2 quantiles. With fewer than about five values it
    is narrower than its level promises: resampling cannot show a spread that the sample does not
    hold.
    """
    data = np.asarray(values, dtype=float)
    if len(data) < 2:
        return math.nan, math.nan
    draws = np.random.default_rng(0).integers(0, len(data), (RESAMPLES, len(data)))
    low, high = np.quantile(data[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def geometric_mean(values: Sequence[float]) -> float:
    """exp(mean(ln x)) of positive values; nan where there is none."""
    return float(stats.gmean(values)) if len(values) else math.nan


def geometric_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Student's interval of the mean logarithm of positive values, given back as values."""
    result = paired_factor(np.log(np.asarray(values, dtype=float)), level)
    return result.low, result.high


@dataclass(frozen=True)
class Paired:
    """Paired comparison of two arms over common seeds; nan where it cannot be computed.

    ``detectable`` is the smallest true difference that a two-sided paired t-test at 5 % would
    find with 80 % power, given the spread of the differences seen here: delta = lambda s/sqrt(n),
    where the noncentral t distribution with n - 1 degrees of freedom and noncentrality lambda
    exceeds the critical value with that power. It counts one test: Holm's correction for m tests
    makes it larger.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float
    detectable: float
    note: str


@cache
def _noncentrality(freedom: int, level: float) -> float:
    """The true mean, in standard errors, that a two-sided t-test finds with power ``POWER``."""
    critical = float(stats.t.ppf((1 + level) / 2, freedom))

    def power(noncentrality: float) -> float:
        # P(T > c) with T = (Z + noncentrality)/sqrt(V/freedom); the other tail is far away.
        return float(stats.nct.sf(critical, freedom, noncentrality)) - POWER

    return float(optimize.brentq(power, 0.0, 3 * critical + 5))


def paired(differences: Sequence[float], level: float = LEVEL) -> Paired:
    """Two-sided paired t-test and Student interval of the mean difference.

    With differences d_1..d_n, their mean m and standard deviation s (n - 1 in the denominator):
    t = m / (s/sqrt(n)), p = 2 P(T > abs(t)) for Student's T with n - 1 degrees of freedom, and
    the interval m ± t* s/sqrt(n), t* being T's (1 + level)/2 quantile. Equal differences, up to
    rounding, have no spread to test against.
    """
    data = np.asarray(differences, dtype=float)
    n = len(data)
    nan = math.nan
    if n == 0:
        return Paired(0, nan, nan, nan, nan, nan, "no common seed finished: no comparison")
    mean = float(data.mean())
    if n == 1:
        return Paired(1, mean, nan, nan, nan, nan, "one pair: no test is possible")
    error = float(data.std(ddof=1)) / math.sqrt(n)
    if error <= 1e-12 * float(np.abs(data).max()):
        return Paired(n, mean, mean, mean, nan, nan, "identical differences: no spread to test")
    test = stats.ttest_1samp(data, 0.0)
    low, high = map(float, test.confidence_interval(level))
    detectable = _noncentrality(n - 1, level) * error
    return Paired(n, mean, low, high, float(test.pvalue), detectable, "")


def paired_factor(logarithms: Sequence[float], level: float = LEVEL) -> Paired:
    """:func:`paired` on log ratios ln(a_i/b_i), with its numbers given back as factors.

    ``mean`` is exp of the mean log ratio: the geometric mean of the ratios; ``low`` and ``high``
    are exp of the Student interval's ends. 1 is no difference. ``detectable`` is above 1 and
    holds both ways: that factor up, or its inverse down.
    """
    result = paired(logarithms, level)
    names = ("mean", "low", "high", "detectable")
    with np.errstate(over="ignore"):
        return replace(result, **{name: float(np.exp(getattr(result, name))) for name in names})


def sign_test(more: int, fewer: int) -> float:
    """Exact two-sided sign test: ``more`` pairs one way, ``fewer`` the other, ties left out.

    Under equal chances the count is binomial with n = more + fewer and 1/2:
    p = min(1, 2 P(count <= min(more, fewer))). It needs no spread, so uneven steps between the
    values that can occur do no harm. nan without a pair.
    """
    if more + fewer == 0:
        return math.nan
    return float(stats.binomtest(more, more + fewer).pvalue)


def least_pairs(level: float = LEVEL) -> int:
    """How many pairs that all agree the sign test needs for p < 1 - level.

    >>> least_pairs()
    6
    """
    return next(n for n in range(1, 1000) if sign_test(n, 0) < 1 - level)


def fisher(first: int, runs: int, second: int, others: int) -> float:
    """Fisher's exact test, two-sided: ``first`` of ``runs`` against ``second`` of ``others``.

    Given the total k of both counts, the first one is hypergeometric under equal chances:
    P(i) = C(runs, i) C(others, k - i) / C(runs + others, k). p is the sum of P(i) over all i that
    are no more likely than what was seen.
    """
    table = [[first, runs - first], [second, others - second]]
    return float(stats.fisher_exact(table).pvalue)


def least_count(runs: int, others: int, level: float = LEVEL) -> int | None:
    """The smallest k for which k of ``runs`` against 0 of ``others`` has p < 1 - level, or None.

    >>> least_count(4, 4), least_count(3, 3)
    (4, None)
    """
    for count in range(1, runs + 1):
        if fisher(count, runs, 0, others) < 1 - level:
            return count
    return None


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values; nan stays nan and does not count as a test.

    With p_(1) <= ... <= p_(m): adjusted p_(k) = max over j <= k of min(1, (m - j + 1) p_(j)).
    Rejecting where it is below 5 % keeps the chance of any false rejection in the family at 5 %.
    """
    p = np.asarray(p_values, dtype=float)
    adjusted = np.full(len(p), math.nan)
    tested = np.flatnonzero(np.isfinite(p))
    ordered = tested[np.argsort(p[tested], kind="stable")]
    running = 0.0
    for rank, index in enumerate(ordered):
        running = max(running, min(1.0, (len(ordered) - rank) * p[index]))
        adjusted[index] = running
    return adjusted.tolist()


def smooth(values: np.ndarray, half: int) -> np.ndarray:
    """Mean over the ``half`` points on either side of each point of a curve.

    Towards the ends the window shrinks on both sides, so that a trend is not pulled back.
    """
    data = np.asarray(values, dtype=float)
    place = np.arange(len(data))
    reach = np.minimum(half, np.minimum(place, place[::-1]))
    total = np.concatenate([[0.0], np.cumsum(data)])
    return (total[place + reach + 1] - total[place - reach]) / (2 * reach + 1)


def wobble(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Standard deviation of each column of ``values`` [n, curves] about a straight line in steps.

    The line takes out the trend, which would otherwise count as oscillation: with residuals r of
    the least-squares line, sqrt(sum r^2 / (n - 2)).
    """
    x = np.asarray(steps, dtype=float)
    x = x - x.mean()
    centred = values - values.mean(axis=0)
    slope = x @ centred / (x @ x)
    return np.sqrt(((centred - np.outer(x, slope)) ** 2).sum(axis=0) / (len(x) - 2))
