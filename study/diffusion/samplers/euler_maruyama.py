"""Euler-Maruyama on the reverse SDE, and Euler on its probability-flow ODE (Song et al. 2021,
"Score-Based Generative Modeling through Stochastic Differential Equations"), as U-ViT samples
CIFAR-10 and CelebA: dx = -beta x / 2 dt + sqrt(beta) dw, reversed."""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from study.diffusion.samplers.base import (
    Denoiser,
    NoiseSource,
    Sampler,
    State,
    StoredNoise,
    drawn,
    evaluate,
    precise,
)
from study.diffusion.samplers.process import walk
from study.spec.samplers import EulerMaruyamaOptions


class EulerMaruyama(Sampler):
    """``steps`` updates over an even time grid, the last one from ``t_end`` to 0 without noise.

    Noise draw i belongs to update i; the ODE form draws nothing.
    """

    options: EulerMaruyamaOptions

    def times(self, denoiser: Denoiser) -> Tensor:
        """The visited times [steps + 1], descending to 0, float64."""
        chosen = self.options
        process = walk(denoiser, chosen.schedule)
        ends = process.clipped(torch.tensor([chosen.t_start, chosen.t_end]).double(), denoiser)
        grid = torch.linspace(*ends.tolist(), chosen.steps, dtype=torch.float64)
        return torch.cat([grid, grid.new_zeros(1)])

    def states(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        labels: Tensor | None = None,
        noise: NoiseSource | StoredNoise | None = None,
    ) -> Iterator[State]:
        stochastic = self.options.form == "sde"
        process = walk(denoiser, self.options.schedule)
        times = self.times(denoiser)
        sigmas, betas = process.sigma(times[:-1]), process.beta(times[:-1]).tolist()
        x = precise(latents)
        for update, (t, following) in enumerate(pairwise(times.tolist())):
            sigma, beta = sigmas[update], betas[update]
            alpha = 1 / math.sqrt(1 + float(sigma) ** 2)
            denoised = evaluate(denoiser, x / alpha, sigma, labels)
            score = (alpha * denoised - x) / (alpha * float(sigma)) ** 2
            drift = -beta * x / 2 - beta * score * (1.0 if stochastic else 0.5)
            x = x + drift * (following - t)
            if stochastic and following > 0:
                x = x + math.sqrt(beta * (t - following)) * drawn(noise, update, x)
            yield State(x, denoised, update + 1)
