"""The variance-preserving process x_t = alpha(t) y + s(t) n that a sampler walks, t in [0, 1]."""

from typing import Any

import torch
from torch import Tensor

from study.diffusion.samplers.base import Denoiser, sigma_range
from study.diffusion.schedules import stable_diffusion_betas
from study.diffusion.vpsde import CosineSDE, DiscreteProcess, LinearSDE


class Walk:
    """A process in unit time: a list of N betas has step n at t = n / N.

    Methods take tensors of any shape and compute in their dtype.
    """

    def __init__(self, process: Any) -> None:
        self.process = process
        self.unit = float(process.steps) if isinstance(process, DiscreteProcess) else 1.0

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level in EDM terms, s / alpha, to all digits.

        0 where a list of betas, read below its first step, runs out of noise before t = 0.
        """
        return self.process.nsr(t * self.unit).clamp(min=0).sqrt().to(t.dtype)

    def time(self, sigma: Tensor) -> Tensor:
        """The time of a noise level in EDM terms."""
        return (self.process.time(sigma) / self.unit).to(sigma.dtype)

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, s) with s^2 = 1 - alpha^2, which loses digits at small t in float32."""
        alpha, s = self.process.cum_alpha(t * self.unit), self.process.cum_beta(t * self.unit)
        return alpha.sqrt().to(t.dtype), s.sqrt().to(t.dtype)

    def half_logsnr(self, t: Tensor) -> Tensor:
        """lambda = ln(alpha / s) from `scales`; it is -ln(sigma)."""
        alpha, s = self.scales(t)
        return alpha.log() - s.log()

    def beta(self, t: Tensor) -> Tensor:
        """-d ln(alpha^2) / dt. At a step of a discrete process, its value just below the step."""
        if not isinstance(self.process, DiscreteProcess):
            return self.process.diffusion(t).square()
        n = t * self.unit
        below = (n.ceil() - 1).clamp(1, self.process.steps - 1)
        table = self.process.log_cum_alpha
        return (table(below) - table(below + 1)) * self.unit

    def clipped(self, times: Tensor, denoiser: Denoiser) -> Tensor:
        """The times, moved inside the noise levels that the denoiser supports."""
        low, high = sigma_range(denoiser)
        sigma = self.sigma(times)
        inside = (sigma >= low * (1 - 1e-9)) & (sigma <= high * (1 + 1e-9))
        return torch.where(inside, times, self.time(sigma.clamp(low, high)))


def walk(denoiser: Denoiser, name: str) -> Walk:
    """The process called ``name``; "formulation" is the denoiser's own, or linear without one."""
    if name == "cosine":
        return Walk(CosineSDE())
    if name == "discrete":
        return Walk(DiscreteProcess(stable_diffusion_betas()))
    formulation = getattr(denoiser, "formulation", None)
    if name == "formulation" and formulation is not None:
        if hasattr(formulation, "process"):
            return Walk(formulation.process)
        if hasattr(formulation, "schedule"):
            return Walk(DiscreteProcess(formulation.schedule.betas))
        if formulation.kind == "vp":
            low = formulation.options.beta_min
            return Walk(LinearSDE(low, low + formulation.options.beta_d))
    return Walk(LinearSDE())
