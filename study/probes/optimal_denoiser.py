"""The optimal denoiser of a data set: posterior-mean images, and how much detail they have.

Luhman & Luhman 2022, "Improving Diffusion Model Efficiency Through Patching", put a network on a
grid of patches because the optimal prediction of x is blurry at most noise levels, and split the
schedule at SNR 0.25. Here is that prediction itself, over the finite data set:

    x*(z) = E[x | z] = sum_i softmax_i(-||z - sqrt(abar) x_i||^2 / (2 (1 - abar))) x_i,
    z = sqrt(abar) x + sqrt(1 - abar) n,   SNR = abar / (1 - abar),   sigma = SNR^(-1/2),

where sigma is the noise level of the same image in EDM's terms (z / sqrt(abar) = x + sigma n).
The image x that was noised is one of the x_i, as for a network that is tested on what it was
trained on: with rising SNR x* becomes x itself, and at which SNR depends on how many images there
are and on how many pixels they have. The quantity "own_weight" says how far that has gone; where it
is near one, sharpness says nothing about images that are not in the set.

Energy above patch size P: every channel of an image, less its mean over the pixels, is transformed
(2-D FFT); the band has all frequencies that exceed Nyquist / P = 1 / (2 P) cycles per pixel in
either axis, which are those that a grid of one value per P x P pixels cannot represent. A
frequency exactly at the limit counts as represented.

Quantities
----------
energy_above : ratio of the mean energy in the band of x* to that of x: 0 = nothing of it is left,
    1 = all of it. Standard error of a ratio of means, over samples. ``share`` is the band's part
    of all energy of x* (means over samples, the images' mean removed), ``share_of_original`` that
    of x; neither is defined for images without any energy.
own_weight : mean posterior weight of x among the x_i, 0 to 1.
image : x* of some samples as bytes, clipped to [-1, 1]; SNR inf (sigma 0) is the image x. A sample
    has the same noise n at every SNR. Not for latents, which are no pictures; images beyond 64
    pixels are shown at a lower resolution.
"""

import math
from typing import Any

import torch
from torch import Tensor

from study.data import order
from study.probes.base import DatasetSubject, Measured
from study.probes.posterior import Points
from study.spec.probes import OptimalDenoiser

SHOWN_SIDE = 64
"""Pixels of a side that are kept of an image to be looked at."""


def measure(subject: DatasetSubject, options: OptimalDenoiser) -> Measured:
    """Rows for every quantity and SNR; columns that do not apply to a row hold ``None``."""
    archive, seed = subject.archive, options.seed
    points = Points.of(archive, subject.device, options.images, seed)
    shape = (archive.channels, archive.resolution, archive.resolution)
    patches = sorted({patch for patch in options.patch if 1 < patch <= archive.resolution})
    levels = sorted(set(options.snr))
    sigmas = [snr**-0.5 for snr in levels]
    count = max(options.samples, options.shown)
    own = torch.from_numpy(order(seed, 0, count, len(points))).to(subject.device)
    noise = subject.noise((count, points.dimension), "optimal_denoiser", seed, "noise")

    optimal: list[Tensor] = []  # energies of x* [S, B, 1 + patches] of one group after another
    original: list[Tensor] = []  # of x [B, 1 + patches]
    weights: list[Tensor] = []  # [S, B]
    rows: list[dict[str, Any]] = []
    together = points.at_once(len(levels))
    for start in range(0, count, together):
        group = slice(start, start + together)
        posterior = points.noisy(own[group], noise[group]).posterior(sigmas)
        best = (posterior.mean + points.centre).unflatten(2, shape)
        images = (points.rows(own[group]) + points.centre).unflatten(1, shape)
        optimal.append(torch.stack([energies(level, patches) for level in best]).cpu())
        original.append(energies(images, patches).cpu())
        weights.append(posterior.own.cpu())
        for sample in range(start, min(start + together, 0 if archive.latents else options.shown)):
            seen = [*best[:, sample - start], images[sample - start]]
            for snr, sigma, image in zip([*levels, math.inf], [*sigmas, 0.0], seen):
                rows.append(_row("image", snr, sigma, sample=sample, **_picture(image)))

    part = slice(options.samples)
    above, reference = torch.cat(optimal, 1)[:, part], torch.cat(original)[part]
    own_weight = torch.cat(weights, 1)[:, part]
    numbers = []
    for level, (snr, sigma) in enumerate(zip(levels, sigmas)):
        value, error = _mean(own_weight[level])
        numbers.append(_row("own_weight", snr, sigma, value=value, standard_error=error))
        for position, patch in enumerate(patches, 1):
            value, error = _ratio(above[level, :, position], reference[:, position])
            numbers.append(
                _row(
                    "energy_above",
                    snr,
                    sigma,
                    patch=patch,
                    value=value,
                    standard_error=error,
                    share=_ratio(above[level, :, position], above[level, :, 0])[0],
                    share_of_original=_ratio(reference[:, position], reference[:, 0])[0],
                )
            )
    for row in numbers:
        row["samples"] = options.samples
    return Measured.of_rows(
        numbers + rows, size=len(points), dimensions=points.dimension, samples=options.samples
    )


def energies(images: Tensor, patches: list[int]) -> Tensor:
    """Spectral energy of images [B, C, H, W], summed over channels: [B, 1 + patches], of all
    frequencies but zero, then of those above the Nyquist limit of every patch size.
    """
    height, width = images.shape[-2:]
    power = torch.fft.fft2(images - images.mean((-2, -1), keepdim=True)).abs().square().sum(1)
    # Whole numbers of cycles per image, so that a frequency at the limit is exactly there.
    down = torch.fft.fftfreq(height, 1 / height, device=images.device).abs().round()
    across = torch.fft.fftfreq(width, 1 / width, device=images.device).abs().round()
    bands = [power.sum((1, 2))]
    for patch in patches:
        band = (2 * patch * down > height)[:, None] | (2 * patch * across > width)
        bands.append((power * band).sum((1, 2)))
    return torch.stack(bands, 1)


def _mean(values: Tensor) -> tuple[float, float | None]:
    error = (values.var() / len(values)).sqrt().item() if len(values) > 1 else None
    return values.mean().item(), error


def _ratio(upper: Tensor, lower: Tensor) -> tuple[float | None, float | None]:
    """Mean of ``upper`` by mean of ``lower``, and its standard error to first order."""
    # An image without detail has a spectrum of rounding errors (1e-32), not of zeros.
    if (below := lower.mean().item()) < 1e-20:
        return None, None
    value = upper.mean().item() / below
    return value, _mean((upper - value * lower) / below)[1]


def _picture(image: Tensor) -> dict[str, Any]:
    """A float image [C, H, W] as bytes, row by row, its channels last."""
    if image.shape[-1] > SHOWN_SIDE:
        image = torch.nn.functional.adaptive_avg_pool2d(image, SHOWN_SIDE)
    pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    channels, side = image.shape[:2]
    return {
        "pixels": pixels.permute(1, 2, 0).flatten().tolist(),
        "side": side,
        "channels": channels,
    }


def _row(quantity: str, snr: float, sigma: float, **others: Any) -> dict[str, Any]:
    row = {"quantity": quantity, "snr": snr, "sigma": sigma, "patch": None, "sample": None}
    row |= {"value": None, "standard_error": None, "share": None, "share_of_original": None}
    return row | {"samples": None, "pixels": None, "side": None, "channels": None} | others
