"""What every formulation offers: `Formulation`, its `Loss`, and the `Denoiser` made from a network.

Words: `level` is the native noise level of a formulation (sigma for the EDM family, time in [0, 1]
or an integer step for the others), [B]; `sigma` is the noise level in EDM terms, the standard
deviation of the noise relative to the signal, s / a for a noisy image x_t = a y + s n.
`network` is any callable (x [B,C,H,W] float32, noise [B] float32, label, **conditioning) ->
[B, output_multiplier * C, H, W].
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Network = Callable[..., Tensor]
Target = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t [B,C,H,W], scale a [B], standard deviation s [B]) -> stable clean image [B,C,H,W]."""


@dataclass
class Loss:
    """The loss of one batch.

    per_sample: [B], reduced over the image as published for the formulation (sum for the EDM
        family, mean for the others); the mean over the batch is what is back-propagated.
    elements: [B,C,H,W], the same before reduction.
    level, sigma: [B], native noise level and noise level in EDM terms.
    target, prediction: [B,C,H,W], in the space in which the error is taken.
    clean: [B,C,H,W], the target in x0 space: the clean image, or the stable one.
    noisy: [B,C,H,W], x_t.
    terms: further per-sample terms [B] by name (e.g. "mse", "vb").
    """

    per_sample: Tensor
    level: Tensor
    sigma: Tensor
    elements: Tensor
    target: Tensor
    prediction: Tensor
    clean: Tensor
    noisy: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


class Denoiser(Protocol):
    """D(x; sigma): estimate of the clean image from x = y + sigma n (EDM terms)."""

    sigma_min: float
    sigma_max: float
    sigma_data: float | None
    network: Network

    def __call__(
        self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None, **conditioning: Any
    ) -> Tensor:
        """x [B,C,H,W] of any float type, sigma scalar or [B] -> clean image, float32."""
        ...

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The nearest noise level that the network knows, same shape; often the identity."""
        ...


class Formulation(ABC):
    """How noise levels are drawn, how a network becomes a denoiser, how the loss is weighted."""

    kind: str
    draw: Literal["normal", "uniform"] = "uniform"
    """Distribution of the number per sample that selects its noise level."""

    def __init__(self, options: Any, noise_scale: float = 1.0) -> None:
        self.options = options
        self.noise_scale = noise_scale

    @property
    def output_multiplier(self) -> int:
        """Output channels that the network needs for each image channel."""
        return self.options.output_multiplier

    @abstractmethod
    def levels(self, draw: Tensor) -> Tensor:
        """Noise level [B] selected by `draw` [B]."""

    @abstractmethod
    def sigma(self, level: Tensor) -> Tensor:
        """Noise level in EDM terms, same shape."""

    @abstractmethod
    def scales(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s) of x_t = a y + s n, same shape as `level`."""

    @abstractmethod
    def noise_number(self, level: Tensor) -> Tensor:
        """What the network is told about the noise, float32, `noise_scale` included."""

    @abstractmethod
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
        """Training loss for `images` [B,C,H,W], with the given random numbers.

        `draw` [B] selects the noise levels, `noise` [B,C,H,W] is standard normal. The target is
        the clean image (denoising score matching) unless `stable_target` gives another one.
        """

    @abstractmethod
    def denoiser(self, network: Network) -> Denoiser:
        """The denoiser D(x; sigma) made of a raw network."""


def wide(device: torch.device) -> torch.dtype:
    """The widest float type of a device: float64, but float32 on Apple's."""
    return torch.float32 if device.type == "mps" else torch.float64


def perturb(images: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """x_t = a y + s n in the precision of the images; a, s [B]."""
    return column(a, images) * images + column(s, images) * noise


def column(values: Tensor, like: Tensor) -> Tensor:
    """`values` [B] or scalar as [B,1,1,1] in the type and on the device of `like` [B,C,H,W]."""
    values = torch.as_tensor(values).to(like)
    return values.reshape(-1, *[1] * (like.ndim - 1))


def clean_target(
    images: Tensor, noisy: Tensor, a: Tensor, s: Tensor, stable_target: Target | None
) -> Tensor:
    """The x0 that the network is to learn: the image itself, or the stable one (no gradient)."""
    if stable_target is None:
        return images
    return stable_target(noisy, a, s).to(images).detach()


def noise_target(images: Tensor, noise: Tensor, clean: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """The noise that belongs to the clean image `clean`, (x_t - a clean) / s.

    Written as n + a (y - clean) / s, which equals n exactly where the stable image is the image
    itself, instead of losing digits in x_t - a y at little noise.
    """
    if clean is images:
        return noise
    ratio = column(a / s, images)
    return noise + ratio * (images - clean)
