"""EDM preconditioning and loss, and the frame that the `vp`, `ve` and `iddpm` kinds share.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", table 1:
D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), loss lambda(sigma) ||D(y + n; sigma) - y||^2.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from study.diffusion.base import (
    Denoiser,
    Formulation,
    Loss,
    Network,
    Target,
    clean_target,
    column,
    perturb,
)


class Coefficients(NamedTuple):
    """Preconditioning of a noise level: skip, output and input scale, and the noise number."""

    skip: Tensor
    out: Tensor
    input: Tensor
    noise: Tensor


class PreconditionedDenoiser:
    """D(x; sigma) of a network under a preconditioning of the EDM family."""

    def __init__(self, formulation: "Preconditioned", network: Network) -> None:
        self.formulation = formulation
        self.network = network
        self.sigma_min = formulation.sigma_min
        self.sigma_max = formulation.sigma_max
        self.sigma_data = formulation.sigma_data

    def __call__(
        self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None, **conditioning: Any
    ) -> Tensor:
        """x = y + sigma n [B,C,H,W], sigma scalar or [B] -> clean image [B,C,H,W], float32."""
        x = x.to(torch.float32)
        sigma = torch.as_tensor(sigma).to(x.device, torch.float32).reshape(-1)
        sigma = sigma.expand(len(x))
        c = self.formulation.coefficients(sigma)
        noise = c.noise.to(torch.float32) * self.formulation.noise_scale
        raw = self.network(column(c.input, x) * x, noise, label, **conditioning)
        raw = raw[:, : x.shape[1]].to(torch.float32)
        return column(c.skip, x) * x + column(c.out, x) * raw

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The nearest noise level that the network knows, same shape."""
        return self.formulation.round_sigma(sigma)


class Preconditioned(Formulation):
    """A formulation of the EDM family: x = y + sigma n, and D from F by four coefficients."""

    sigma_min: float
    sigma_max: float
    sigma_data: float | None = None

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Preconditioning coefficients, each [B], of noise levels [B]."""

    @abstractmethod
    def weight(self, sigma: Tensor) -> Tensor:
        """Loss weight lambda(sigma), same shape."""

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The nearest noise level that the network knows; the identity unless overridden."""
        return torch.as_tensor(sigma)

    def sigma(self, level: Tensor) -> Tensor:
        """The level itself."""
        return level

    def scales(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """(1, sigma)."""
        return torch.ones_like(level), level

    def noise_number(self, level: Tensor) -> Tensor:
        """c_noise(sigma) * noise_scale, float32."""
        return self.coefficients(level).noise.to(torch.float32) * self.noise_scale

    def denoiser(self, network: Network) -> Denoiser:
        """The preconditioned network."""
        return PreconditionedDenoiser(self, network)

    def loss(
        self,
        network: Network,
        images: Tensor,
        draw: Tensor,
        noise: Tensor,
        label: Tensor | None = None,
        stable_target: Target | None = None,
        **conditioning: Any,
    ) -> Loss:
        """lambda(sigma) (D(y + sigma n; sigma) - target)^2, summed over the image.

        The stable target field replaces the clean image in x0 space with the weight unchanged
        (Xu et al. 2023); it does so for every member of the family, where the authors' code has
        it for EDM only (their VE loss ignores it, their VP loss cannot be called with it).
        """
        denoise = self.denoiser(network)
        return self.denoiser_loss(
            denoise, images, draw, noise, label, stable_target, **conditioning
        )

    def denoiser_loss(
        self,
        denoise: Callable[..., Tensor],
        images: Tensor,
        draw: Tensor,
        noise: Tensor,
        label: Tensor | None = None,
        stable_target: Target | None = None,
        **conditioning: Any,
    ) -> Loss:
        """`loss` of a denoiser (x, sigma [B], label, **conditioning) -> clean image."""
        sigma = self.levels(draw)
        a, s = self.scales(sigma)
        noisy = perturb(images, noise, a, s)
        clean = clean_target(images, noisy, a, s, stable_target)
        prediction = denoise(noisy, sigma, label, **conditioning)
        elements = column(self.weight(sigma), images) * (prediction - clean).square()
        return Loss(
            per_sample=elements.flatten(1).sum(1),
            level=sigma,
            sigma=sigma,
            elements=elements,
            target=clean,
            prediction=prediction,
            clean=clean,
            noisy=noisy,
        )


class EDM(Preconditioned):
    """EDM: ln(sigma) normal, unit-variance inputs and targets, weight 1 / c_out^2."""

    kind = "edm"
    draw = "normal"

    def __init__(self, options: Any, noise_scale: float = 1.0) -> None:
        super().__init__(options, noise_scale)
        self.sigma_min = options.sigma_min
        self.sigma_max = math.inf if options.sigma_max is None else options.sigma_max
        self.sigma_data = options.sigma_data

    def levels(self, draw: Tensor) -> Tensor:
        """sigma = exp(P_mean + P_std z), z standard normal."""
        return (draw * self.options.P_std + self.options.P_mean).exp()

    def weight(self, sigma: Tensor) -> Tensor:
        """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2."""
        return (sigma.square() + self.sigma_data**2) / (sigma * self.sigma_data).square()

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Table 1, column "Ours"."""
        total = sigma.square() + self.sigma_data**2
        return Coefficients(
            skip=self.sigma_data**2 / total,
            out=sigma * self.sigma_data / total.sqrt(),
            input=1 / total.sqrt(),
            noise=sigma.log() / 4,
        )
