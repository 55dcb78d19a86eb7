"""DPM-Solver "fast" (Lu et al. 2022, "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic
Model Sampling in Around 10 Steps", Algorithms 1-3 and Appendix D) and DPM-Solver++ (Lu et al.
2022b, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models").

The solver steps in lambda = ln(alpha / s), half the logarithm of the signal-to-noise ratio, which
is -ln(sigma) in EDM terms; so any denoiser serves. The sample is x at the last time, without a
final denoising step, as U-ViT's scripts have it.

U-ViT's released code computes its schedule in float32, where s at t = 1e-4 is good to 0.3 percent
only; that moves a sample by up to 5e-4 (shown in the tests). ``precision: float32`` has its
schedule, for comparisons with published samples; the default is exact.
"""

import math
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from study.diffusion.samplers.base import (
    Denoiser,
    NoiseSource,
    Sampler,
    State,
    StoredNoise,
    evaluate,
    precise,
)
from study.diffusion.samplers.process import Walk, walk
from study.spec.samplers import DPMSolverOptions


def fast_orders(steps: int) -> list[int]:
    """Orders of the outer steps that spend ``steps`` evaluations: 3, 3, ... and a lower tail."""
    whole, rest = divmod(steps, 3)
    return [3] * (whole - 1) + [2, 1] if rest == 0 else [3] * whole + [rest]


class Point(NamedTuple):
    """A point of an outer step: the network's noise level, alpha and s there, lambda relative to
    the step's start."""

    sigma: Tensor
    alpha: float
    s: float
    h: float


def advance(
    x: Tensor, prediction: Tensor, slope: Tensor | None, start: Point, end: Point, data: bool
) -> Tensor:
    """The exact solution from ``start`` to ``end`` where the prediction is a line in lambda.

    Noise prediction p(l) = prediction + slope (l - start):
    x' = (alpha'/alpha) x - s' (expm1(h) prediction + (expm1(h) - h) slope), h = end - start.
    Data prediction is the same with alpha and s swapped and lambda reversed.
    """
    if data:
        carry, other, h = end.s / start.s, end.alpha, -end.h
    else:
        carry, other, h = end.alpha / start.alpha, end.s, end.h
    x = (carry * x).sub_(prediction, alpha=other * math.expm1(h))
    return x if slope is None else x.sub_(slope, alpha=other * (math.expm1(h) - h))


class DPMSolver(Sampler):
    """DPM-Solver (noise prediction) or DPM-Solver++ (data prediction), singlestep, order 3.

    With spacing "logsnr" the outer steps are even in lambda and so are the points inside each;
    with "time" the whole grid of ``steps`` intervals is even in time and a step of order k jumps
    over k of them.
    """

    options: DPMSolverOptions

    def orders(self) -> list[int]:
        """Order, which is also the number of evaluations, of every outer step."""
        return fast_orders(self.options.steps)

    def times(self, denoiser: Denoiser) -> Tensor:
        """The grid in time: outer steps [K + 1] for "logsnr", all points [steps + 1] for "time".

        Its ends are clipped to the denoiser's noise levels; dtype is that of the precision.
        """
        chosen = self.options
        dtype = getattr(torch, chosen.precision)
        process = walk(denoiser, chosen.schedule)
        ends = torch.tensor([chosen.t_start, chosen.t_end], dtype=torch.float64)
        ends = process.clipped(ends, denoiser).to(dtype)
        if chosen.spacing == "time":
            return torch.linspace(*ends.tolist(), chosen.steps + 1, dtype=dtype)
        first, last = process.half_logsnr(ends).tolist()
        lambdas = torch.linspace(first, last, len(self.orders()) + 1, dtype=dtype)
        return process.time((-lambdas).exp())

    def steps(self, process: Walk, times: Tensor) -> Iterator[tuple[Point, list[Point], Point]]:
        """Start, inner points and end of every outer step over the grid ``times``."""
        orders = self.orders()
        even = self.options.spacing == "time"
        starts = list(accumulate(orders, initial=0)) if even else range(len(orders) + 1)
        for i, order in enumerate(orders):
            begin, end = times[starts[i]], times[starts[i + 1]]
            low, high = process.half_logsnr(begin), process.half_logsnr(end)
            if even:
                inner = times[starts[i] + 1 : starts[i + 1]]
                offsets = process.half_logsnr(inner) - low
            else:
                offsets = torch.arange(1, order, dtype=times.dtype) / order * (high - low)
                inner = process.time((-(low + offsets)).exp())
            ts = torch.cat([begin[None], inner, end[None]])
            hs = torch.cat([torch.zeros_like(low)[None], offsets, (high - low)[None]])
            alphas, s = process.scales(ts)
            # The network's own noise, whatever the precision of the solver's schedule.
            sigmas = process.sigma(ts.double()).unbind()
            first, *middle, last = map(Point, sigmas, alphas.tolist(), s.tolist(), hs.tolist())
            yield first, middle, last

    def states(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        labels: Tensor | None = None,
        noise: NoiseSource | StoredNoise | None = None,
    ) -> Iterator[State]:
        data = self.options.prediction == "data"
        sign = -1 if data else 1
        process = walk(denoiser, self.options.schedule)
        x = precise(latents)
        evaluations = 0

        def predict(x: Tensor, point: Point) -> tuple[Tensor, Tensor]:
            """The prediction that the solver works with, and the clean image."""
            sigma = float(point.sigma)
            scaled = x * math.sqrt(1 + sigma**2)
            denoised = evaluate(denoiser, scaled, point.sigma, labels)
            eps = (scaled - denoised).div_(sigma)
            if data:
                eps = torch.sub(x, eps, alpha=point.s).div_(point.alpha)
            return eps, denoised

        for start, inner, end in self.steps(process, self.times(denoiser)):
            first, denoised = predict(x, start)
            prediction, slope = first, None
            for point in inner:
                there = advance(x, first, slope, start, point, data)
                second, denoised = predict(there, point)
                slope = second.sub_(first).div_(sign * point.h)
            if len(inner) == 1:
                # The published second-order step takes the prediction half-way up the line for
                # the whole step; the exact integral of the line differs in the third order.
                prediction, slope = first + slope * (sign * end.h / 2), None
            x = advance(x, prediction, slope, start, end, data)
            evaluations += 1 + len(inner)
            yield State(x, denoised, evaluations)
