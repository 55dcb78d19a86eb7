"""What the blocks of a trained network represent: how alike they are, and at which frequencies.

**Similarity** (quantity ``cka``): linear centred kernel alignment (Kornblith et al. 2019,
"Similarity of Neural Network Representations Revisited") between what every two blocks give, as in
U-ViT's figure 7 (Bao et al. 2023, "All are Worth Words"). With the features X [n, p] of a block,
one row per sample (all positions and channels behind one another), the Gram matrix K = X X^T and
its centred form K' = H K H, H = I - 1/n,

    CKA(K, L) = <K', L'> / (||K'|| ||L'||)      (Frobenius; 0 to 1)

which equals ||Y^T X||^2 / (||X^T X|| ||Y^T Y||) of centred features: it does not change under
rotations and isotropic scaling of either. The samples are noisy images x_t with noise levels in
training's proportions, one level per sample, so ``sigma`` is empty; ``similarity_sigmas`` asks for
single levels as well. All pairs are there, both ways round. ``long_skip`` is the long skip that
runs from one of the two blocks to the other (0 = none). Of tokens only those of the image count:
the time token of a U-ViT tells the noise level, which differs between samples, and with it all
blocks look nearly the same. (The paper does not say what it does.)
With fewer samples than features this estimate is too high (features that have nothing in common
approach 1 with n / p, not 0); ``debiased`` takes the unbiased products instead (Song et al. 2012,
"Feature Selection via Dependence Maximization"), which may be slightly negative.

**Spectra** (quantity ``spectrum``): radial amplitude of feature maps, for the premise of U-DiT
(Tian et al. 2024) that these networks work at low frequencies; there is no such figure in the
paper, the measure is ours, in the manner of Park & Kim 2022, "How Do Vision Transformers Work?",
and of FreeU (Si et al. 2023). All images have noise level ``sigma``. Tokens are laid back on their
grid, those of time, label and text are dropped. With F the discrete Fourier transform of a channel
and P(r) the mean of |F|^2 over the ring of frequencies whose length rounds to r cycles per side,
over channels and samples:

    value = log10 sqrt(P(r) / P(0)),      frequency = 2 r / grid   (1 = the map's own Nyquist)

relative to the mean of the map (r = 0), so that white noise is 0 everywhere. What a layer adds
to whole channels (biases, the noise level) is at r = 0 as well. Corners beyond the
Nyquist circle are left out, maps of one pixel have no row, frequencies without any energy neither.
``grid`` is the side of the map. Block "input" (position -1) is the noisy image itself.

Of split networks every part is measured at the noise levels it is trained for (``part``, with
positions of its own; spectra only where sigma is among its levels).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from study.backbones.base import Backbone
from study.diffusion import formulations
from study.network import networks_of
from study.probes.base import Measured, RunSubject
from study.probes.levels import even_draws, pieces, take
from study.spec.probes import Representation

INPUT = "input"
"""Name of the noisy image among the blocks."""


class Recorder:
    """The outputs of all blocks in the last forward pass, while it is attached.

    ``outputs`` is in order of execution; ``joined`` maps (source, consumer), both positions, to
    the long skip that runs between them: from the block whose output it is to the block that runs
    next. Where a network changes that output on the way, long skip i comes from block i - 1, if
    that has given something of the same shape.
    ``extras`` is how many tokens do not belong to the image.
    """

    def __init__(self, network: Backbone) -> None:
        self.network = network
        self.names = list(network.blocks())
        self.extras = getattr(network, "extras", 0)
        self.outputs: list[Tensor] = []
        self.joined: dict[tuple[int, int], int] = {}
        self._waiting: list[tuple[int, int]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "Recorder":
        self.network.long_skips.observer = self._fusion
        for position, block in enumerate(self.network.blocks().values()):
            self._hooks.append(block.register_forward_pre_hook(self._before(position)))
            self._hooks.append(block.register_forward_hook(self._after(position)))
        return self

    def __exit__(self, *exception: object) -> None:
        self.network.long_skips.observer = None
        for hook in self._hooks:
            hook.remove()
        self.outputs = []

    def _fusion(self, index: int, _main: Tensor, skip: Tensor, *_: Any) -> None:
        found = [position for position, output in enumerate(self.outputs) if output is skip]
        if not found and self.outputs[index - 1].shape == skip.shape:
            found = [index - 1]
        self._waiting += [(source, index) for source in found[-1:]]

    def _before(self, position: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any) -> None:
            if position == 0:
                self.outputs, self._waiting = [], []
            for source, index in self._waiting:
                self.joined[source, position] = index
            self._waiting = []

        return hook

    def _after(self, position: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if position != len(self.outputs):
                raise RuntimeError(f"block {self.names[position]} ran out of order")
            self.outputs.append(output)

        return hook


# --- similarity ----------------------------------------------------------------------------------


def centred(gram: Tensor, debiased: bool = False) -> Tensor:
    """Centred Gram matrices [..., n, n], double precision.

    Debiased: without their diagonals and such that products divided by n (n - 3) are unbiased
    estimates of the independence criterion (HSIC); needs n > 3.
    """
    gram = gram.double()
    if not debiased:
        rows = gram.mean(-1, keepdim=True)
        return gram - rows - rows.mT + gram.mean((-2, -1), keepdim=True)
    count = gram.shape[-1]
    off = 1 - torch.eye(count, dtype=gram.dtype, device=gram.device)
    gram = gram * off
    rows = gram.sum(-1, keepdim=True) / (count - 2)
    whole = gram.sum((-2, -1), keepdim=True) / ((count - 1) * (count - 2))
    return (gram - rows - rows.mT + whole) * off


def cka(grams: Tensor, debiased: bool = False) -> Tensor:
    """Linear CKA [m, m] between m representations, from their Gram matrices [m, n, n].

    Not a number where a representation is the same for all samples.
    """
    flat = centred(grams, debiased).flatten(1)
    flat = flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    return flat @ flat.T


def _grams(features: Any, count: int, batch: int) -> Tensor:
    """Gram matrices [m, count, count] of m blocks; features(piece) gives their [b, p_m] features.

    Only two pieces of features are in memory at a time; for that the network sees a piece again
    for every other one.
    """
    grams: Tensor | None = None
    spans = list(pieces(count, batch))
    for first, rows in enumerate(spans):
        left = features(rows)
        if grams is None:
            shape = (len(left), count, count)
            grams = torch.zeros(shape, dtype=torch.float64, device=left[0].device)
        for columns in spans[first:]:
            right = left if columns == rows else features(columns)
            for block, (one, other) in enumerate(zip(left, right, strict=True)):
                tile = one.double() @ other.double().T
                grams[block, rows, columns] = tile
                grams[block, columns, rows] = tile.T
    return grams


# --- spectra -------------------------------------------------------------------------------------


def of_image(output: Tensor, extras: int) -> Tensor:
    """What belongs to the image: maps [B, C, S, S], or tokens [B, T, C] without the first
    ``extras``, which are those of time, label and text.
    """
    return output[:, extras:] if output.dim() == 3 else output


def on_grid(output: Tensor) -> Tensor:
    """Feature maps [B, C, S, S] of maps, or of an image's tokens [B, S^2, C] in row-major order."""
    if output.dim() == 4:
        return output
    side = math.isqrt(output.shape[1])
    return output.transpose(1, 2).unflatten(2, (side, side))


def ring_power(maps: Tensor) -> Tensor:
    """Sum over samples of the mean power in rings 0 .. S // 2, and over channels: float64 [rings].

    ``maps`` is [B, C, S, S]. Ring r holds the frequencies whose length rounds to r cycles a side.
    """
    side = maps.shape[-1]
    power = torch.fft.fft2(maps.float()).abs().square().mean(1).double().sum(0)
    cycles = torch.fft.fftfreq(side, d=1 / side, device=maps.device)
    radius = (cycles[:, None].square() + cycles[None].square()).sqrt().round().long().flatten()
    counts = torch.bincount(radius)
    sums = torch.zeros(len(counts), dtype=torch.float64, device=maps.device)
    sums.index_add_(0, radius, power.flatten())
    return (sums / counts)[: side // 2 + 1].cpu()


def relative_amplitude(power: Tensor, side: int) -> list[tuple[float, float]]:
    """(frequency, log10 amplitude relative to r = 0) of summed ring powers of maps of a side."""
    answer = []
    for ring, value in enumerate((power / power[0]).tolist()):
        if math.isfinite(value) and value > 0:
            answer.append((2 * ring / side, 0.5 * math.log10(value)))
    return answer


# --- the probe -----------------------------------------------------------------------------------


def _similarity(
    denoiser: Any,
    recorder: Recorder,
    x: Tensor,
    sigma: Tensor,
    labels: Tensor | None,
    options: Representation,
    level: float = math.nan,
) -> list[dict[str, Any]]:
    def features(piece: slice) -> list[Tensor]:
        denoiser(x[piece], sigma[piece], take(labels, piece))
        return [of_image(output, recorder.extras).flatten(1) for output in recorder.outputs]

    similar = cka(_grams(features, len(x), options.batch), options.debiased).tolist()
    rows = []
    for i, block in enumerate(recorder.names):
        for j, other in enumerate(recorder.names):
            rows.append(
                {
                    "quantity": "cka",
                    "block": block,
                    "other": other,
                    "position": i,
                    "other_position": j,
                    "long_skip": recorder.joined.get((min(i, j), max(i, j)), 0),
                    "frequency": math.nan,
                    "grid": None,
                    "sigma": level,
                    "value": similar[i][j],
                }
            )
    return rows


def _spectra(
    denoiser: Any,
    recorder: Recorder,
    images: Tensor,
    noise: Tensor,
    labels: Tensor | None,
    sigma: float,
    options: Representation,
) -> list[dict[str, Any]]:
    names = [INPUT, *recorder.names]
    powers: dict[str, Tensor] = {}
    sides: dict[str, int] = {}
    for piece in pieces(len(images), options.batch):
        x = images[piece] + sigma * noise[piece]
        denoiser(x, sigma, take(labels, piece))
        for name, output in zip(names, [x, *recorder.outputs], strict=True):
            maps = on_grid(of_image(output, recorder.extras))
            if maps.shape[-1] > 1:
                sides[name] = maps.shape[-1]
                powers[name] = powers.get(name, 0) + ring_power(maps)
    return [
        {
            "quantity": "spectrum",
            "block": name,
            "other": "",
            "position": position,
            "other_position": None,
            "long_skip": 0,
            "frequency": frequency,
            "grid": sides[name],
            "sigma": sigma,
            "value": value,
        }
        for position, name in enumerate(names, start=-1)
        if name in powers
        for frequency, value in relative_amplitude(powers[name], sides[name])
    ]


@torch.no_grad()
def measure(subject: RunSubject, options: Representation) -> Measured:
    """Similarity between all blocks, and spectra of their features; see the module's text."""
    network = subject.network()
    images, labels = subject.images(options.samples)
    noise = subject.noise(images.shape, "representation")
    whole = subject.denoiser(network)
    spec = subject.spec
    made = formulations(spec.formulation, noise_scale=spec.backbone.noise_scale)
    denoisers = getattr(whole, "denoisers", [whole])
    rows = []
    for number, part in enumerate(networks_of(network)):
        formulation, denoiser = made[number], denoisers[number]
        draws = even_draws(len(images), formulation.draw).to(images.device)
        levels = formulation.levels(draws)
        sigma = formulation.sigma(levels).float()
        with Recorder(part) as recorder:
            x = images + sigma[:, None, None, None] * noise
            found = _similarity(denoiser, recorder, x, sigma, labels, options)
            lowest, highest = _known(denoiser, sigma, len(denoisers))
            for level in options.similarity_sigmas:
                if lowest <= level <= highest:
                    same, x = torch.full_like(sigma, level), images + level * noise
                    found += _similarity(denoiser, recorder, x, same, labels, options, level)
            for level in options.sigmas:
                if lowest <= level <= highest:
                    found += _spectra(denoiser, recorder, images, noise, labels, level, options)
        prefix = "" if len(denoisers) == 1 else f"networks.{number}."
        for row in found:
            for column in ("block", "other"):
                if row[column] not in ("", INPUT):
                    row[column] = prefix + row[column]
            rows.append({**row, "part": number})
    return Measured.of_rows(rows)


def _known(denoiser: Any, sigma: Tensor, parts: int) -> tuple[float, float]:
    """The noise levels that a network is asked for: of a part, those that it is trained for."""
    if parts == 1:
        return denoiser.sigma_min, denoiser.sigma_max
    return sigma.min().item(), sigma.max().item()
