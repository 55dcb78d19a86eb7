"""The generalised sampler of Karras et al. 2022 (Appendices B and C): any noise levels, any time
schedule sigma(t), any scaling s(t), any second-order rule.

The ODE is dx/dt = (sigma'/sigma + s'/s) x - (sigma' s / sigma) D(x / s; sigma).

Two things differ from the released code, both below 1e-5 and shown in the tests: a step without
churn adds no noise (there, rounding of t -> sigma -> t leaves noise of 1e-7 to 1e-6 with schedule
vp), and its time is not sent through sigma and back. The default range of the vp discretisation
uses beta_d = 19.9; an early version of that code, still copied in STF's, has 19.1.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from study.diffusion.iddpm import noise_table
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
from study.diffusion.samplers.edm import churn_factor, karras_sigmas
from study.spec.samplers import EDMAblationOptions

VP_BETA_D = 19.9
VP_BETA_MIN = 0.1


@dataclass(frozen=True)
class TimeSchedule:
    """sigma(t), its derivative and its inverse, on float64 tensors of any shape."""

    sigma: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    time: Callable[[Tensor], Tensor]


def vp_schedule(beta_d: float, beta_min: float) -> TimeSchedule:
    """sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1 (Karras et al., Table 1, VP)."""

    def sigma(t: Tensor) -> Tensor:
        return torch.expm1(beta_d * t**2 / 2 + beta_min * t).sqrt()

    def slope(t: Tensor) -> Tensor:
        level = sigma(t)
        return (beta_min + beta_d * t) * (level + 1 / level) / 2

    def time(level: Tensor) -> Tensor:
        return ((beta_min**2 + 2 * beta_d * torch.log1p(level**2)).sqrt() - beta_min) / beta_d

    return TimeSchedule(sigma, slope, time)


VE_SCHEDULE = TimeSchedule(torch.sqrt, lambda t: 0.5 / t.sqrt(), torch.square)
"""sigma(t) = sqrt(t)."""

LINEAR_SCHEDULE = TimeSchedule(lambda t: t, torch.ones_like, lambda sigma: sigma)
"""sigma(t) = t."""


def default_range(discretization: str, epsilon_s: float) -> tuple[float, float]:
    """(sigma_min, sigma_max) of a discretisation where the user gives none."""
    vp = vp_schedule(VP_BETA_D, VP_BETA_MIN).sigma(
        torch.tensor([epsilon_s, 1.0], dtype=torch.float64)
    )
    return {
        "vp": (float(vp[0]), float(vp[1])),
        "ve": (0.02, 100.0),
        "iddpm": (0.002, 81.0),
        "edm": (0.002, 80.0),
    }[discretization]


def vp_betas(sigma_min: float, sigma_max: float, epsilon_s: float) -> tuple[float, float]:
    """(beta_d, beta_min) for which sigma(epsilon_s) = sigma_min and sigma(1) = sigma_max."""
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
    return beta_d, high - beta_d / 2


class EDMAblation(Sampler):
    """The generalised sampler. Noise draw i belongs to step i; without churn nothing is drawn."""

    options: EDMAblationOptions

    def range(self, denoiser: Denoiser) -> tuple[float, float]:
        """(sigma_min, sigma_max) of the noise levels on this denoiser."""
        chosen = self.options
        low, high = default_range(chosen.discretization, chosen.epsilon_s)
        low = low if chosen.sigma_min is None else chosen.sigma_min
        high = high if chosen.sigma_max is None else chosen.sigma_max
        supported = sigma_range(denoiser)
        return max(low, supported[0]), min(high, supported[1])

    def sigmas(self, denoiser: Denoiser) -> Tensor:
        """The noise levels [steps + 1] as discretised and rounded, the last one 0, float64."""
        chosen = self.options
        low, high = self.range(denoiser)
        ramp = torch.arange(chosen.steps, dtype=torch.float64) / max(chosen.steps - 1, 1)
        if chosen.discretization == "vp":
            betas = vp_betas(low, high, chosen.epsilon_s)
            levels = vp_schedule(*betas).sigma(1 + ramp * (chosen.epsilon_s - 1))
        elif chosen.discretization == "ve":
            levels = (high**2 * (low**2 / high**2) ** ramp).sqrt()
        elif chosen.discretization == "iddpm":
            table = noise_table(chosen.M, chosen.C_1, chosen.C_2)[:-1]
            table = table[(table >= low) & (table <= high)]
            # In this order of operations, because halves are rounded.
            stride = (len(table) - 1) / max(chosen.steps - 1, 1)
            levels = table[(stride * torch.arange(chosen.steps).double()).round().long()]
        else:
            levels = karras_sigmas(chosen.steps, low, high, chosen.rho)
        return torch.cat([round_sigma(denoiser, levels), levels.new_zeros(1)])

    def schedule(self, denoiser: Denoiser) -> TimeSchedule:
        """sigma(t); that of vp passes through the ends of this denoiser's range."""
        if self.options.schedule == "vp":
            return vp_schedule(*vp_betas(*self.range(denoiser), self.options.epsilon_s))
        return VE_SCHEDULE if self.options.schedule == "ve" else LINEAR_SCHEDULE

    def states(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        labels: Tensor | None = None,
        noise: NoiseSource | StoredNoise | None = None,
    ) -> Iterator[State]:
        chosen = self.options
        schedule = self.schedule(denoiser)
        scaled = chosen.scaling == "vp"

        def scale(sigma: Tensor) -> Tensor:
            return (1 + sigma**2).rsqrt() if scaled else torch.ones_like(sigma)

        def slope(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            """dx/dt and the clean image."""
            sigma, rise = schedule.sigma(t), schedule.slope(t)
            s = scale(sigma)
            s_slope_over_s = -sigma * rise * s**2 if scaled else torch.zeros_like(s)
            denoised = evaluate(denoiser, x / float(s), sigma, labels)
            linear = float(rise / sigma + s_slope_over_s)
            return linear * x - float(rise * s / sigma) * denoised, denoised

        times = schedule.time(self.sigmas(denoiser))
        first = schedule.sigma(times[0])
        x = precise(latents) * float(first * scale(first))
        evaluations = 0
        for step, (t, following) in enumerate(pairwise(times)):
            sigma = schedule.sigma(t)
            gamma = churn_factor(
                float(sigma), chosen.steps, chosen.S_churn, chosen.S_min, chosen.S_max
            )
            if gamma > 0:
                t = schedule.time(round_sigma(denoiser, sigma + gamma * sigma))
                raised = schedule.sigma(t)
                spread = math.sqrt(max(float(raised**2 - sigma**2), 0.0)) * chosen.S_noise
                x = float(scale(raised) / scale(sigma)) * x
                x = x + float(scale(raised)) * spread * drawn(noise, step, x)
            length = following - t
            first_slope, denoised = slope(x, t)
            evaluations += 1
            if chosen.solver == "euler" or step == chosen.steps - 1:
                x = x + float(length) * first_slope
            else:
                inner = t + chosen.alpha * length
                second_slope, denoised = slope(
                    x + chosen.alpha * float(length) * first_slope, inner
                )
                evaluations += 1
                share = 1 / (2 * chosen.alpha)
                x = x + float(length) * ((1 - share) * first_slope + share * second_slope)
            yield State(x, denoised, evaluations)
