"""Intervals and tests for few seeds: bootstrap, paired differences, Holm, verdicts.

Everything is deterministic: the bootstrap draws from a generator with a fixed seed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 10_000


def bootstrap_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; (nan, nan) for fewer than two values.

    With fewer than about five values it is narrower than its level promises: resampling cannot
    show a spread that the sample does not hold.
    """
    data = np.asarray(values, dtype=float)
    if len(data) < 2:
        return math.nan, math.nan
    draws = np.random.default_rng(0).integers(0, len(data), (RESAMPLES, len(data)))
    low, high = np.quantile(data[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """Paired comparison of two arms over common seeds; nan where it cannot be computed.

    ``detectable`` is the smallest true difference that a paired t-test at 5 % would find with
    80 % power, given the spread of the differences seen here.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float
    detectable: float
    note: str


def paired(differences: Sequence[float], level: float = LEVEL) -> Paired:
    """Two-sided paired t-test and Student interval of the mean difference."""
    data = np.asarray(differences, dtype=float)
    n = len(data)
    nan = math.nan
    if n == 0:
        return Paired(0, nan, nan, nan, nan, nan, "no common seed finished: no comparison")
    mean = float(data.mean())
    if n == 1:
        return Paired(1, mean, nan, nan, nan, nan, "one pair: no test is possible")
    error = float(data.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        return Paired(n, mean, mean, mean, nan, nan, "identical differences: no spread to test")
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    power = float(stats.t.ppf(0.8, n - 1)) * error
    return Paired(n, mean, mean - half, mean + half, p, half + power, "")


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values; nan stays nan and does not count as a test."""
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

    The line takes out the trend, which would otherwise count as oscillation.
    """
    x = np.asarray(steps, dtype=float)
    x = x - x.mean()
    centred = values - values.mean(axis=0)
    slope = x @ centred / (x @ x)
    return np.sqrt(((centred - np.outer(x, slope)) ** 2).sum(axis=0) / (len(x) - 2))


@dataclass(frozen=True)
class Verdict:
    """What a study says about a published claim: one word and its reason in numbers."""

    word: str  # "reproduced" | "not reproduced" | "not testable at this budget"
    reason: str
    evidence: Paired | None = None

    def __str__(self) -> str:
        return f"**{self.word.capitalize()}**: {self.reason}"


def verdict(differences: Sequence[float], claim: str, *, positive: bool) -> Verdict:
    """Judge the claim that the paired ``differences`` are positive (or negative).

    Reproduced: the 95 % interval of the mean difference lies on the claimed side of zero. Not
    reproduced: it lies on the other. Not testable at this budget: it holds zero, or there are
    fewer than two pairs.
    """
    result = paired(differences)
    if result.n < 2 or math.isnan(result.p):
        seen = "" if result.n == 0 else f", seen {result.mean:+.3g}"
        reason = f"{claim}: {result.note} (n = {result.n}{seen})."
        return Verdict("not testable at this budget", reason, result)
    numbers = (
        f"mean difference {result.mean:+.3g} [{result.low:+.3g}, {result.high:+.3g}], "
        f"n = {result.n} pairs, p = {result.p:.2g}"
    )
    if result.low > 0 if positive else result.high < 0:
        return Verdict("reproduced", f"{claim}: {numbers}.", result)
    if result.high < 0 if positive else result.low > 0:
        reason = f"{claim}: the difference has the other sign; {numbers}."
        return Verdict("not reproduced", reason, result)
    reason = (
        f"{claim}: the interval holds zero; {numbers}; a true difference below "
        f"{result.detectable:.3g} would mostly have gone unseen."
    )
    return Verdict("not testable at this budget", reason, result)
