"""Ancestral sampling (Ho et al. 2020) and DDIM (Song et al. 2021) on discrete steps, respaced
(Nichol & Dhariwal 2021), as U-DiT and Patch Diffusion sample.

One step: network, guidance, x0, thresholding, then the posterior mean (or DDIM's) plus noise. The
noise of a step is draw k, k = 0 at the noisiest; the last step adds none and draws none.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from study.diffusion.ddpm import eps_of_x0, posterior_mean
from study.diffusion.samplers.base import (
    Denoiser,
    NoiseSource,
    Sampler,
    State,
    StoredNoise,
    drawn,
    evaluate,
    precise,
    sigma_range,
)
from study.diffusion.schedules import Schedule, respace, schedule
from study.spec.samplers import AncestralOptions, DDIMOptions


def dynamic_threshold(x0: Tensor, quantile: float) -> Tensor:
    """Clip each image to its own quantile of |x0|, at least 1, and divide by it (Imagen).

    x0 [B, C, H, W]; the quantile is the nearest element's, as in Patch Diffusion's script.
    """
    magnitude = x0.abs().flatten(1)
    rank = round(quantile * (magnitude.shape[1] - 1)) + 1
    limit = magnitude.kthvalue(rank, dim=1).values.clamp(min=1).reshape(-1, 1, 1, 1)
    return x0.clamp(-limit, limit) / limit


class _Discrete(Sampler):
    """What both samplers share: the steps, and the clean image at each.

    A denoiser of the ``ddpm`` kind is asked at its own steps; any other one at the noise level of
    the step (moved into the range that it supports).
    """

    def table(self, denoiser: Denoiser) -> Schedule:
        """The respaced schedule that is walked on this denoiser."""
        chosen = self.options
        if chosen.schedule == "formulation":
            base = getattr(denoiser, "schedule", None)
            process = getattr(denoiser, "process", None)
            if base is None and hasattr(process, "betas"):
                base = Schedule(process.betas[1:])
            if base is None:
                base = schedule("linear", chosen.timesteps)
        else:
            base = schedule(chosen.schedule, chosen.timesteps)
        return respace(base, chosen.respacing)

    def native(self, denoiser: Denoiser) -> bool:
        """Whether the denoiser knows the walked steps as its own."""
        return self.options.schedule == "formulation" and hasattr(denoiser, "output")

    def predict(
        self, denoiser: Any, table: Schedule, x: Tensor, t: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Clean image before thresholding, and the network's variance part, at steps t [B]."""
        if self.native(denoiser):
            output = denoiser.output(x, table.at("timestep_map", t), labels).to(x.dtype)
            mean, variance = denoiser.formulation.split_output(output, x.shape[1])
            return denoiser.formulation.x0(mean, x, t, table), variance
        sigma = table.sigma[t[0].item()]
        clean = x / float(table.signal[t[0].item()])
        return evaluate(denoiser, clean, sigma.clamp(*sigma_range(denoiser)), labels), None

    def threshold(self, x0: Tensor) -> Tensor:
        """The clean image as the options restrict it."""
        if self.options.threshold == "dynamic":
            return dynamic_threshold(x0, self.options.quantile)
        return x0.clamp(-1, 1) if self.options.threshold == "clip" else x0

    @abstractmethod
    def moments(
        self,
        denoiser: Any,
        table: Schedule,
        x: Tensor,
        t: Tensor,
        x0: Tensor,
        variance: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mean of the next state, and the standard deviation of its noise or ``None``."""

    def states(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        labels: Tensor | None = None,
        noise: NoiseSource | StoredNoise | None = None,
    ) -> Iterator[State]:
        table = self.table(denoiser)
        x = precise(latents) if self.options.precision == "float64" else latents.float()
        for k, step in enumerate(reversed(range(table.steps))):
            t = torch.full((len(x),), step, dtype=torch.int64, device=x.device)
            x0, variance = self.predict(denoiser, table, x, t, labels)
            x0 = self.threshold(x0)
            x, deviation = self.moments(denoiser, table, x, t, x0, variance)
            if step > 0 and deviation is not None:
                x = x + deviation * drawn(noise, k, x)
            yield State(x, x0, k + 1)


class Ancestral(_Discrete):
    """DDPM's sampler with fixed or learned variance."""

    options: AncestralOptions

    def moments(
        self,
        denoiser: Any,
        table: Schedule,
        x: Tensor,
        t: Tensor,
        x0: Tensor,
        variance: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        chosen = self.options.variance
        if chosen == "formulation" and self.native(denoiser):
            log_variance = denoiser.formulation.log_variance(variance, x, t, table)
        else:
            name = "large_log_variance" if chosen == "large" else "posterior_log_variance_clipped"
            log_variance = table.at(name, t, x)
        return posterior_mean(table, x, t, x0), (log_variance / 2).exp()


class DDIM(_Discrete):
    """DDIM; the noise is derived anew from the thresholded clean image."""

    options: DDIMOptions

    def moments(
        self,
        denoiser: Any,
        table: Schedule,
        x: Tensor,
        t: Tensor,
        x0: Tensor,
        variance: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        eta = self.options.eta
        abar = table.at("alphas_cumprod", t, x)
        previous = table.at("alphas_cumprod_prev", t, x)
        eps = eps_of_x0(table, x, t, x0)
        deviation = eta * ((1 - previous) / (1 - abar)).sqrt() * (1 - abar / previous).sqrt()
        rest = (1 - previous - deviation.square()).clamp(min=0).sqrt()
        return previous.sqrt() * x0 + rest * eps, deviation if eta > 0 else None
