"""The exact posterior p(x_0 | x) over a finite set of points, for noisy versions of some of them.

With x = x_i + sigma n (a point of the set plus noise) and the empirical distribution of the points
x_j as the prior, the posterior weights are

    w_j = softmax_j(-||x - x_j||^2 / (2 sigma^2))
        = softmax_j(n.(x_j - x_i) / sigma - ||x_j - x_i||^2 / (2 sigma^2)),

sums of squares over all pixels. The second form asks for two products, x_i.x_j and n.x_j, that
serve every noise level, and its exponents do not lose digits where sigma is small: that of the
point itself is zero exactly.

A variance-preserving z = sqrt(abar) x_0 + sqrt(1 - abar) n has the same posterior as
x = z / sqrt(abar) with sigma = sqrt((1 - abar) / abar) = SNR^(-1/2).

All sums are in double precision about the mean of the points. There is no tensor of noisy points x
points x pixels: products with the points are made part by part.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from study.data import Archive, order

NUMBERS = 2**23
"""Numbers in a working tensor: 64 MiB in double precision."""


class Points:
    """Points [M, D] of a finite distribution; uint8 values v mean the pixel v / 127.5 - 1.

    They are kept as given, so that an image of bytes takes a byte for every value; ``chunk`` of
    them at a time are in double precision. ``centre`` [D] is their mean.
    """

    def __init__(self, values: Tensor, chunk: int | None = None) -> None:
        if values.ndim != 2 or not values.numel():
            raise ValueError("points are [M, D] with M, D >= 1")
        self.values = values
        self.chunk = chunk or max(1, min(4096, NUMBERS // values.shape[1]))
        parts = values.split(self.chunk)
        self.centre = torch.stack([_decoded(part).sum(0) for part in parts]).sum(0) / len(values)

    @classmethod
    def of(
        cls, archive: Archive, device: torch.device, count: int | None = None, seed: int = 0
    ) -> "Points":
        """All entries of an archive, flattened from [C, H, W], or ``count`` of them.

        Of latents that are stored as moments, their means.
        """
        size = len(archive)
        chosen = order(seed, 0, size if count is None else min(count, size), size)
        chosen.sort()
        values = None
        for start in range(0, len(chosen), 1024):
            part = chosen[start : start + 1024]
            if archive.latents:
                rows = archive.batch(part)[0].flatten(1)
            else:
                rows = torch.from_numpy(archive.images(part)).permute(0, 3, 1, 2).flatten(1)
            if values is None:
                values = torch.empty(len(chosen), rows.shape[1], dtype=rows.dtype, device=device)
            values[start : start + len(part)] = rows.to(device)
        return cls(values)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def dimension(self) -> int:
        return self.values.shape[1]

    def rows(self, indices: Tensor) -> Tensor:
        """Some points less the mean, [..., D] float64 for indices [...]."""
        return _decoded(self.values[indices]) - self.centre

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """All points less the mean, part by part, with their places."""
        for start in range(0, len(self), self.chunk):
            place = slice(start, min(start + self.chunk, len(self)))
            yield place, _decoded(self.values[place]) - self.centre

    def at_once(self, levels: int) -> int:
        """How many noisy points to look at together, at so many noise levels."""
        return max(1, min(NUMBERS // len(self), NUMBERS // (levels * self.dimension)))

    def noisy(self, own: Tensor, noise: Tensor) -> "Noisy":
        """The noisy points x_i + sigma n for i = ``own`` [B] int64 and n = ``noise`` [B, D]."""
        origin, noise = self.rows(own), noise.to(torch.float64)
        squares = origin.new_empty(len(own), len(self))
        along = torch.empty_like(squares)
        for place, rows in self.parts():
            squares[:, place] = torch.addmm(rows.square().sum(1), origin, rows.T, alpha=-2)
            along[:, place] = noise @ rows.T
        squares += origin.square().sum(1, keepdim=True)
        squares.clamp_(min=0)
        along -= (noise * origin).sum(1, keepdim=True)
        # What rounding left of these zeros would be magnified by 1 / sigma^2.
        squares.scatter_(1, own[:, None], 0.0)
        along.scatter_(1, own[:, None], 0.0)
        return Noisy(self, own, origin, squares, along)


def _decoded(values: Tensor) -> Tensor:
    if values.dtype == torch.uint8:
        return values.to(torch.float64).div_(127.5).sub_(1)
    return values.to(torch.float64)


@dataclass(frozen=True)
class Posterior:
    """Moments at S noise levels of B noisy points.

    mean : [S, B, D] float64
        Posterior mean E[x_0 | x], less the mean of all points.
    variance : [S, B] float64
        Trace of Cov(x_0 | x), in units of x_0 squared.
    own : [S, B] float64
        Posterior weight of the point that was noised.
    """

    mean: Tensor
    variance: Tensor
    own: Tensor


@dataclass(frozen=True)
class Noisy:
    """Noisy points and where all points lie from them.

    squares, along : [B, M] float64
        ||x_j - x_i||^2 and n.(x_j - x_i).
    """

    points: Points
    own: Tensor
    origin: Tensor
    squares: Tensor
    along: Tensor

    def log_weights(self, sigma: float) -> Tensor:
        """Exponents of the posterior weights, before normalisation, [B, M]; 0 for x_i itself."""
        return _exponents(self.squares, self.along, sigma)

    def posterior(self, sigmas: Sequence[float]) -> Posterior:
        """Mean and trace of the covariance of x_0 given x, exact, at every noise level.

        Tr Cov = sum_j w_j ||x_j - x_i||^2 - ||sum_j w_j x_j - x_i||^2: about x_i, so that nothing
        cancels where the posterior is x_i alone.
        """
        totals = torch.stack([self.log_weights(sigma).logsumexp(1) for sigma in sigmas])
        mean = self.origin.new_zeros(len(sigmas), *self.origin.shape)
        second = torch.zeros_like(totals)
        for place, rows in self.points.parts():
            squares, along = self.squares[:, place], self.along[:, place]
            for level, sigma in enumerate(sigmas):
                weights = (_exponents(squares, along, sigma) - totals[level][:, None]).exp_()
                mean[level].addmm_(weights, rows)
                second[level] += (weights * squares).sum(1)
        variance = (second - (mean - self.origin).square().sum(2)).clamp_(min=0)
        return Posterior(mean, variance, (-totals).exp())

    def sources(self, sigma: float, uniform: Tensor) -> Tensor:
        """Indices [B, K] drawn from the posterior by ``uniform`` [B, K] float64 in [0, 1)."""
        cumulative = self.log_weights(sigma).softmax(1).cumsum(1)
        drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        return drawn.clamp_(max=len(self.points) - 1)


def _exponents(squares: Tensor, along: Tensor, sigma: float) -> Tensor:
    return torch.add(along / sigma, squares, alpha=-0.5 / sigma**2)
