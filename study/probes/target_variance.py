"""Variance and bias of training targets without a network: DSM against the stable target field.

After Xu, Tong & Jaakkola 2023, "Stable Target Field for Reduced Variance Score Estimation in
Diffusion Models", whose target is equation 6 there. Noise is added as x = x_0 + sigma n, the EDM
or variance-exploding form; the data are a finite set of M points.

V_DSM(sigma) = E_x Tr Cov(x_0 | x)
    exact, from the posterior over all M points (`study.probes.posterior`).
V_STF(sigma, n) = E_x Tr Cov(T | x),   T = sum_k u_k x_k / sum_k u_k,
    u_k = exp(-||x - x_k||^2 / (2 sigma^2)), over a reference of n points: the source
    x_1 ~ p(x_0 | x), drawn exactly, and x_2 ... x_n, drawn from the data independently and with
    replacement. By Monte Carlo: ``draws`` references for every x, whose sample covariance (divided
    by draws - 1) has an expected trace of Tr Cov(T | x).
squared bias = E_x ||E[T | x] - E[x_0 | x]||^2
    as ||mean of T over the draws - posterior mean||^2 less V_STF / draws of the same x: the mean
    of K draws is off by V / K even without a bias, so the difference is an unbiased estimate. It
    can therefore be negative; ``bias_standard_error`` says how far from zero means anything.

What to expect. Given x and the reference as a set, the probability that x_k is the source is
u_k / sum u, so T is the mean of the source given both. Such a conditional mean has no more
variance than the source itself (V_STF <= V_DSM, equal at n = 1 and falling with n) and the same
expectation. The bias is thus zero at every n, not only in the limit, as long as the rest of the
reference is drawn from the same distribution as the source.

Where noise is so low that few x have neighbours within reach, V is the mean of rare events; a
standard error about as large as the variance itself says so.

Units: targets of x_0 as they are ("x0", pixels in [-1, 1], sums over all pixels); of the noise
(x - x_0) / sigma ("noise", divided by sigma^2); of the score (x_0 - x) / sigma^2 ("score", divided
by sigma^4).

Averages are over ``points`` x's: data points in the order of a seeded permutation, plus noise.
Points, noise and the uniform numbers behind sources and references are the same at every noise
level, and a smaller reference is the beginning of a larger one, so that curves may be compared
point by point. Some x's share their references (a block, of which there are at most 25); standard
errors are over blocks.

Cost: O(points M D (2 + levels) + points draws levels n D) operations with D pixels. Memory: a byte
(images) or four (latents) per value of the data set, and a few tensors of 64 MiB.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from study.data import order
from study.probes.base import DatasetSubject, Measured
from study.probes.posterior import NUMBERS, Noisy, Points
from study.randomness import generator
from study.spec.probes import TargetVariance

UNITS = {"x0": 0, "noise": 2, "score": 4}
"""Powers of sigma by which a variance of x_0 is divided."""

BLOCKS = 25
"""Blocks of noisy points that share their references."""

ROUNDING = 1e-12
"""Differences of pixels that rounding alone explains."""

NOTICED = 1e-9
"""Variance per pixel (of x_0) below which no reference that is drawn differs from the source: the
ratio of two such variances is not given."""

TWO_MODES = {"points": 2048, "dimension": 64, "centre": 0.5, "std": 0.05}
"""The toy: a mode about +centre and one about -centre (in every coordinate), half the points each,
with independent normal coordinates of standard deviation ``std`` within a mode."""


def measure(subject: DatasetSubject, options: TargetVariance) -> Measured:
    """Rows for every distribution, noise level, reference size (0 = DSM) and unit.

    Columns: ``distribution`` (the data set's name, or "two modes"), ``sigma``, ``reference``,
    ``unit``, ``variance`` and ``squared_bias`` in that unit with ``standard_error`` and
    ``bias_standard_error``; ``ratio`` = V_STF / V_DSM with its ``ratio_standard_error`` (missing
    where V_DSM is next to nothing); ``points`` = number of x; ``draws`` = references for each.
    """
    archive, seed = subject.archive, options.seed
    distributions = {archive.name: Points.of(archive, subject.device, options.images, seed)}
    if options.toy:
        distributions["two modes"] = Points(two_modes(seed).to(subject.device))
    rows: list[dict[str, Any]] = []
    for position, (name, points) in enumerate(distributions.items()):
        own = torch.from_numpy(order(seed, 0, options.points, len(points))).to(subject.device)
        shape = (options.points, points.dimension)
        noise = subject.noise(shape, "target_variance", seed, position, "noise")
        sizes = sorted({min(n, len(points)) for n in options.reference})
        sigmas = sorted(set(options.sigma))
        names = ("target_variance", seed, position)
        dsm, stf, bias = variances(points, own, noise, sigmas, sizes, options.draws, names)
        least = NOTICED * points.dimension
        rows += _rows(name, sigmas, sizes, dsm.cpu(), stf.cpu(), bias.cpu(), options.draws, least)
    return Measured.of_rows(
        rows,
        dimensions={name: points.dimension for name, points in distributions.items()},
        sizes={name: len(points) for name, points in distributions.items()},
        two_modes=TWO_MODES if options.toy else None,
    )


def two_modes(seed: int = 0) -> Tensor:
    """The points of the toy, [2048, 64] float32."""
    count, dimension = TWO_MODES["points"], TWO_MODES["dimension"]
    noise = torch.randn(count, dimension, generator=generator("two modes", seed))
    centre = torch.full((count, 1), TWO_MODES["centre"])
    centre[1::2] *= -1
    return centre + TWO_MODES["std"] * noise


def variances(
    points: Points,
    own: Tensor,
    noise: Tensor,
    sigmas: Sequence[float],
    sizes: Sequence[int],
    draws: int,
    names: Sequence[int | str],
) -> tuple[Tensor, Tensor, Tensor]:
    """For every x = points[own] + sigma noise, float64: Tr Cov(x_0 | x) [S, P]; estimates of
    Tr Cov(T | x) [S, N, P] and of the squared bias of T [S, N, P], for S noise levels, P noisy
    points and N ascending reference sizes. All random numbers are functions of ``names``.
    """
    count, block = len(own), _block(len(own))
    dsm = noise.new_empty(len(sigmas), count, dtype=torch.float64)
    stf = dsm.new_empty(len(sigmas), len(sizes), count)
    bias = torch.empty_like(stf)
    together = max(block, points.at_once(len(sigmas)) // block * block)
    for start in range(0, count, together):
        group = slice(start, min(start + together, count))
        noisy = points.noisy(own[group], noise[group])
        posterior = noisy.posterior(sigmas)
        dsm[:, group] = posterior.variance
        blocks = [
            slice(first, min(first + block, group.stop))
            for first in range(start, group.stop, block)
        ]
        uniform = torch.cat([_uniform(draws, place, block, names) for place in blocks])
        uniform = uniform.to(noise.device)
        sources = torch.stack([noisy.sources(sigma, uniform) for sigma in sigmas])
        for place in blocks:
            here = slice(place.start - start, place.stop - start)
            made = generator(*names, "references", place.start // block)
            others = torch.randint(len(points), (draws, sizes[-1] - 1), generator=made)
            stf[:, :, place], bias[:, :, place] = _stable(
                noisy,
                here,
                posterior.mean[:, here],
                sources[:, here],
                others.to(noise.device),
                sigmas,
                sizes,
            )
    return dsm, stf, bias


def _block(count: int) -> int:
    return math.ceil(count / BLOCKS)


def _uniform(draws: int, place: slice, block: int, names: Sequence[int | str]) -> Tensor:
    """Numbers [B, K] that choose the sources of a block."""
    made = generator(*names, "sources", place.start // block)
    return torch.rand(block, draws, generator=made, dtype=torch.float64)[: place.stop - place.start]


def _stable(
    noisy: Noisy,
    here: slice,
    mean: Tensor,
    sources: Tensor,
    others: Tensor,
    sigmas: Sequence[float],
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Variance and squared bias [S, N, B] over references that a block's x's share but for the
    source: ``sources`` [S, B, K], ``others`` [K, largest - 1], posterior ``mean`` [S, B, D].
    """
    squares, along = noisy.squares[here], noisy.along[here]
    sigma = torch.tensor(sigmas, dtype=torch.float64, device=squares.device)[:, None, None]
    levels, count, draws = sources.shape
    first = mean.new_zeros(len(sizes), *mean.shape)
    second = mean.new_zeros(len(sizes), levels, count)
    rows = torch.arange(count, device=squares.device)
    # Exponents at several levels of many columns at once: in parts, for the sake of memory.
    step = max(1, NUMBERS // (levels * count))
    for draw in range(draws):
        source = sources[:, :, draw]
        # A source is never so improbable that the others' weights relative to it overflow.
        base = along[rows, source] / sigma[:, :, 0]
        base -= squares[rows, source] / (2 * sigma[:, :, 0].square())
        weighted = noisy.points.rows(source)
        total = torch.ones_like(base)
        done = 0
        for position, size in enumerate(sizes):
            while done < size - 1:
                columns = others[draw, done : min(done + step, size - 1)]
                weights = along[:, columns] / sigma
                weights -= squares[:, columns] / (2 * sigma.square())
                weights = weights.sub_(base[:, :, None]).exp_()
                total += weights.sum(2)
                weighted += weights @ noisy.points.rows(columns)
                done += len(columns)
            error = weighted / total[:, :, None] - mean
            error[error.abs() < ROUNDING] = 0
            first[position] += error
            second[position] += error.square().sum(2)
    square = (first / draws).square().sum(3)
    variance = (second - draws * square) / (draws - 1)
    answer = variance, square - variance / draws
    return answer[0].transpose(0, 1), answer[1].transpose(0, 1)


def _rows(
    name: str,
    sigmas: Sequence[float],
    sizes: Sequence[int],
    dsm: Tensor,
    stf: Tensor,
    bias: Tensor,
    draws: int,
    least: float,
) -> list[dict[str, Any]]:
    rows = []
    for level, sigma in enumerate(sigmas):
        exact = dsm[level]
        for reference in (0, *sizes):
            if reference == 0:
                variance, squared, made = exact, torch.zeros_like(exact), 0
            else:
                position = sizes.index(reference)
                variance, squared, made = stf[level, position], bias[level, position], draws
            ratio = ratio_error = None
            if (whole := exact.mean().item()) > least:
                ratio = variance.mean().item() / whole
                ratio_error = standard_error((variance - ratio * exact) / whole)
            for unit, power in UNITS.items():
                scale = sigma**-power
                rows.append(
                    {
                        "distribution": name,
                        "sigma": sigma,
                        "reference": reference,
                        "unit": unit,
                        "variance": variance.mean().item() * scale,
                        "standard_error": standard_error(variance * scale),
                        "squared_bias": squared.mean().item() * scale,
                        "bias_standard_error": standard_error(squared * scale),
                        "ratio": ratio,
                        "ratio_standard_error": ratio_error,
                        "points": len(exact),
                        "draws": made,
                    }
                )
    return rows


def standard_error(values: Tensor) -> float | None:
    """Standard error of the mean of values [P] whose blocks are independent, but not the values
    within a block; missing with a single block.
    """
    sums = torch.stack([part.sum() for part in (values - values.mean()).split(_block(len(values)))])
    if len(sums) < 2:
        return None
    return (sums.square().sum() * len(sums) / (len(sums) - 1)).sqrt().item() / len(values)
