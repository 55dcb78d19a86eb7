"""How much a trained network's output changes with its input, by noise level and perturbation.

For a function f and an input x, a perturbation delta of a given size in a random direction gives

    gain = ||f(x + delta) - f(x)||_2 / ||delta||_2,    ||delta||_2 = relative * ||x||_2,

averaged over noisy images x. delta is standard normal noise, scaled. There are two functions:

- ``noise``: eps-hat = (x - D(x; sigma)) / sigma, the noise that the denoiser D sees, as a function
  of the variance-preserving input x / sqrt(1 + sigma^2); the same quantity under every formulation
  and preconditioning. At much noise it tends to 1 for any denoiser that settles on an image, for
  then eps-hat is the input up to a constant.
- ``network``: the raw network F as a function of the image that the formulation gives it, with
  the noise number and the class unchanged (channels of a learned variance left out). This is the
  quantity of ScaleLong's theorem on robustness, ||UNet(x + delta) - UNet(x)|| <= ||delta||
  (sum_i kappa_i M^i + c), which bounds the worst direction of the worst input from above; random
  directions lie far below it, so the gain can be compared between networks, not with the bound.

Images, noise and directions are functions of their number alone, the same in all runs of a data
set, at all noise levels and for all sizes, so that runs can be compared in pairs. The noisy images
are fresh, but the clean ones behind them are the data set's own, which training has seen: archives
hold no others.

Numbers are single precision, whatever training's was: half precision and TF32 round the output by
more than the smallest perturbations move it. Norms and differences are taken in double precision,
and the perturbation is measured as it arrives, after x + delta was rounded. What is left is the
rounding inside the network: beside double precision, trained U-ViT and U-DiT networks gave the gain
of a sample to within 5e-4 of itself at relative 1e-3 (1e-2 at 1e-4), and means over samples to
within 3e-5. The rounding of D, which is subtracted from x, adds at most about
6e-8 sqrt(1 + sigma^2) / (sigma * relative) to the gain of ``noise``, in quadrature.

Rows: ``sigma`` (noise level in EDM terms; a network with a table of levels is asked at the nearest
one), ``relative`` (||delta|| / ||x||), ``space`` ("noise" | "network"), ``gain`` (mean over
samples), ``standard_error`` (of that mean, over samples; None for a
single one), ``samples``.
"""

import math
from typing import Any

import torch
from torch import Tensor

from study.backbones.base import Backbone
from study.network import arithmetic, networks_of
from study.probes.base import Measured, RunSubject
from study.probes.levels import pieces, take
from study.spec.probes import Robustness
from study.trained import denoiser_of

SPACES = ("noise", "network")


class _Observed:
    """The last call of a run's network: which of its parts was asked, with what, and its answer."""

    def __init__(self, network: Backbone) -> None:
        for one in networks_of(network):
            one.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, part: Any, arguments: tuple, keywords: dict[str, Any], answer: Tensor) -> None:
        self.call = part, arguments, keywords, answer


def _norm(x: Tensor) -> Tensor:
    """L2 norm of every sample, [B,C,H,W] -> [B], in the precision of x."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def _scaled(direction: Tensor, relative: float, x: Tensor) -> Tensor:
    """The direction of every sample with the length ``relative`` ||x||, float32 as x."""
    length = relative * _norm(x.double()) / _norm(direction.double())
    return (direction.double() * length[:, None, None, None]).float()


def _gain(before: Tensor, after: Tensor, x: Tensor, perturbed: Tensor) -> Tensor:
    """||after - before|| / ||perturbed - x|| of every sample, [B] float64."""
    change = _norm(after.double() - before.double())
    return change / _norm(perturbed.double() - x.double())


@torch.no_grad()
def _gains(
    denoiser: Any,
    observed: _Observed,
    x: Tensor,
    sigma: float,
    labels: Tensor | None,
    direction: Tensor,
    relatives: tuple[float, ...],
) -> dict[tuple[float, str], Tensor]:
    """Gains [B] by size and space at the noisy images x = y + sigma n [B,C,H,W] float32."""
    channels, root = x.shape[1], math.sqrt(1 + sigma**2)

    def predicted_noise(noisy: Tensor) -> Tensor:
        clean = denoiser(noisy, sigma, labels)
        return (noisy.double() - clean.double()) / sigma

    prediction = predicted_noise(x)
    network, (given, *rest), keywords, raw = observed.call
    answer = {}
    for relative in relatives:
        perturbed = x + _scaled(direction, relative, x)
        after = predicted_noise(perturbed)
        # The gain in terms of x / root: its perturbation is that of x, divided by root.
        answer[relative, "noise"] = root * _gain(prediction, after, x, perturbed)
        perturbed = given + _scaled(direction, relative, given)
        after = network(perturbed, *rest, **keywords)
        answer[relative, "network"] = _gain(
            raw[:, :channels], after[:, :channels], given, perturbed
        )
    return answer


def _row(sigma: float, relative: float, space: str, gains: Tensor) -> dict[str, Any]:
    count = len(gains)
    return {
        "sigma": sigma,
        "relative": relative,
        "space": space,
        "gain": gains.mean().item(),
        "standard_error": (gains.std() / math.sqrt(count)).item() if count > 1 else None,
        "samples": count,
    }


def measure(subject: RunSubject, options: Robustness) -> Measured:
    """Gains of the trained network; noise levels that its formulation lacks are left out."""
    network = subject.network(weights=options.weights)
    observed = _Observed(network)
    single = subject.spec.changed(training={"precision": "fp32"})
    denoiser = denoiser_of(single, network, subject.device)
    images, labels = subject.images(options.samples)
    levels = {
        sigma: float(denoiser.round_sigma(sigma))
        for sigma in options.sigmas
        if denoiser.sigma_min <= sigma <= denoiser.sigma_max
    }
    found: dict[tuple[float, float, str], list[Tensor]] = {}

    def normal(name: str, piece: slice) -> Tensor:
        draws = [
            subject.noise(images.shape[1:], "robustness", name, number)
            for number in range(piece.start, piece.stop)
        ]
        return torch.stack(draws)

    with arithmetic("fp32"):
        for piece in pieces(len(images), options.batch):
            noise, direction = normal("noise", piece), normal("direction", piece)
            for sigma, level in levels.items():
                x = images[piece] + level * noise
                gains = _gains(
                    denoiser, observed, x, level, take(labels, piece), direction, options.relative
                )
                for key, values in gains.items():
                    found.setdefault((sigma, *key), []).append(values.cpu())
    rows = [
        _row(sigma, relative, space, torch.cat(found[sigma, relative, space]))
        for space in SPACES
        for sigma in levels
        for relative in dict.fromkeys(options.relative)
    ]
    left_out = [sigma for sigma in options.sigmas if sigma not in levels]
    return Measured.of_rows(rows, weights=options.weights, left_out=left_out)
