"""The stochastic sampler of Karras et al. 2022 ("Elucidating the Design Space of Diffusion-Based
Generative Models"), Algorithm 2: Heun's method, or Euler's, with churn."""

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
    round_sigma,
    sigma_range,
)
from study.spec.samplers import EDMHeunOptions


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """``steps`` noise levels from sigma_max down to sigma_min, float64 (Karras et al., Eq. 5)."""
    ramp = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def churn_factor(sigma: float, steps: int, S_churn: float, S_min: float, S_max: float) -> float:
    """gamma_i: the relative rise of the noise level before a step (Algorithm 2, line 5)."""
    return min(S_churn / steps, math.sqrt(2) - 1) if S_min <= sigma <= S_max else 0.0


class EDMHeun(Sampler):
    """EDM's sampler. Noise draw i belongs to step i; without churn nothing is drawn."""

    options: EDMHeunOptions

    def sigmas(self, denoiser: Denoiser) -> Tensor:
        """The noise levels [steps + 1] that are visited on this denoiser, the last one 0, float64.

        The range is clipped to the denoiser's, and levels are rounded to those it supports.
        """
        chosen = self.options
        low, high = sigma_range(denoiser)
        levels = karras_sigmas(
            chosen.steps, max(chosen.sigma_min, low), min(chosen.sigma_max, high), chosen.rho
        )
        return torch.cat([round_sigma(denoiser, levels), levels.new_zeros(1)])

    def states(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        labels: Tensor | None = None,
        noise: NoiseSource | StoredNoise | None = None,
    ) -> Iterator[State]:
        chosen = self.options
        sigmas = self.sigmas(denoiser)
        x = precise(latents)
        x = x * float(sigmas[0])
        evaluations = 0
        for step, (sigma, following) in enumerate(pairwise(sigmas)):
            gamma = churn_factor(
                float(sigma), chosen.steps, chosen.S_churn, chosen.S_min, chosen.S_max
            )
            if gamma > 0:
                raised = round_sigma(denoiser, sigma + gamma * sigma)
                spread = math.sqrt(max(float(raised**2 - sigma**2), 0.0)) * chosen.S_noise
                x = x + spread * drawn(noise, step, x)
                sigma = raised
            length = float(following - sigma)
            denoised = evaluate(denoiser, x, sigma, labels)
            slope = (x - denoised) / float(sigma)
            stepped = x + length * slope
            evaluations += 1
            if chosen.solver == "heun" and step < chosen.steps - 1:
                denoised = evaluate(denoiser, stepped, following, labels)
                slope = (slope + (stepped - denoised) / float(following)) / 2
                stepped = x + length * slope
                evaluations += 1
            x = stepped
            yield State(x, denoised, evaluations)
