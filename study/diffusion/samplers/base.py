"""What all samplers share: per-sample random numbers, the loop, the precision."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from study.ahead import Ahead
from study.spec.samplers import SamplerOptions

LATENTS = -1
"""Draw number of the latents; the draws along the way count from 0."""


class NoiseSource:
    """Standard normal numbers that are a function of (seed, sample's own seed number, draw number).

    Row i of every draw depends on ``seed``, ``seeds[i]``, the draw number and the shape alone, so
    neither batch size nor order nor processes change an image. Numbers are drawn on the CPU in
    float32 and only when asked for.

    ``seeds``: one whole number per sample, [B]; ``shape``: (C, H, W); ``seed``: the study's
    sampling seed; ``device``: where the draws are put; ``ahead``: make the next draw in a thread
    as soon as one along the way is asked for, for a sampler that waits for another device then.
    """

    def __init__(
        self,
        seeds: Sequence[int] | Tensor,
        shape: Sequence[int],
        seed: int = 0,
        device: torch.device | str = "cpu",
        ahead: bool = False,
    ) -> None:
        self.seeds = [int(number) for number in seeds]
        self.shape = tuple(int(size) for size in shape)
        self.seed = int(seed)
        self.device = torch.device(device)
        self._draw = partial(_normal, self.seeds, self.shape, self.seed)
        self._next = Ahead(self._draw, math.inf) if ahead else self._draw

    def __len__(self) -> int:
        return len(self.seeds)

    def latents(self) -> Tensor:
        """Standard normal latents [B, C, H, W], float32."""
        return self._draw(LATENTS).to(self.device)

    def draw(self, k: int) -> Tensor:
        """Standard normal draw number ``k`` [B, C, H, W], float32."""
        return self._next(k).to(self.device)


def _normal(seeds: Sequence[int], shape: Sequence[int], seed: int, k: int) -> Tensor:
    """What `NoiseSource` draws; no method, so that a source and its thread go when it is left."""
    generator = torch.Generator()
    rows = torch.empty((len(seeds), *shape), dtype=torch.float32)
    for row, number in zip(rows, seeds, strict=True):
        text = f"{seed}/{number}/{k}".encode()
        key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
        generator.manual_seed(key)
        row.normal_(generator=generator)
    return rows


@dataclass(frozen=True)
class StoredNoise:
    """Draws that were made elsewhere: ``draws`` [K, B, C, H, W], used in order."""

    draws: Tensor

    def draw(self, k: int) -> Tensor:
        """Draw number ``k`` [B, C, H, W]."""
        return self.draws[k]


@dataclass(frozen=True)
class State:
    """Where a sampler stands after a step.

    ``x`` [B, C, H, W] is the state in the sampler's own scaling; ``denoised`` the last estimate of
    the clean image of that step; ``evaluations`` the denoiser evaluations so far.
    """

    x: Tensor
    denoised: Tensor
    evaluations: int


Denoiser = Callable[..., Tensor]
"""D(x [B,C,H,W], sigma, label=None) -> clean image [B,C,H,W]; see ``study.diffusion.base``."""


class Sampler(ABC):
    """A sampler with its options; subclasses say what one step is.

    Arithmetic is float64 (float32 on devices without it); the denoiser casts what its network gets.
    """

    def __init__(self, options: SamplerOptions) -> None:
        self.options: Any = options

    @property
    def nfe(self) -> int:
        """Denoiser evaluations per image (guidance doubles the network's)."""
        return self.options.evaluations()

    @abstractmethod
    def states(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        labels: Tensor | None = None,
        noise: NoiseSource | StoredNoise | None = None,
    ) -> Iterator[State]:
        """Yield the state after every step; the last one's ``x`` is the sample."""

    def sample(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        labels: Tensor | None = None,
        noise: NoiseSource | StoredNoise | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Images [B, C, H, W], float32, nominally in [-1, 1], not clipped.

        ``latents`` [B, C, H, W] are standard normal; ``labels`` [B] int64 class indices or
        ``None``; ``noise`` gives the draws along the way, which deterministic samplers never ask
        for; ``progress(done, all)`` is called after each step with denoiser evaluations.
        """
        state = None
        with torch.no_grad():
            for state in self.states(denoiser, latents, labels, noise):
                if progress is not None:
                    progress(state.evaluations, max(self.nfe, state.evaluations))
        if state is None:
            raise ValueError("a sampler without steps")
        return state.x.to(torch.float32)


def precise(tensor: Tensor) -> Tensor:
    """The tensor in the sampler's arithmetic: float64, or float32 where the device has no other."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def drawn(noise: NoiseSource | StoredNoise | None, k: int, like: Tensor) -> Tensor:
    """Draw number ``k`` with dtype and device of ``like``; ``ValueError`` without a source."""
    if noise is None:
        raise ValueError("this sampler adds noise: give it a NoiseSource")
    return noise.draw(k).to(dtype=like.dtype, device=like.device)


def sigma_range(denoiser: Denoiser) -> tuple[float, float]:
    """Noise levels that the denoiser supports; (0, inf) where it does not say."""
    low = getattr(denoiser, "sigma_min", None)
    high = getattr(denoiser, "sigma_max", None)
    return (0.0 if low is None else float(low), float("inf") if high is None else float(high))


def round_sigma(denoiser: Denoiser, sigma: Tensor) -> Tensor:
    """The nearest noise levels that the denoiser supports, with dtype and device of ``sigma``."""
    rounding = getattr(denoiser, "round_sigma", None)
    if rounding is None:
        return sigma
    return torch.as_tensor(rounding(sigma)).to(dtype=sigma.dtype, device=sigma.device)


def evaluate(denoiser: Denoiser, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
    """D(x; sigma) in the sampler's arithmetic; ``sigma`` is a scalar."""
    return denoiser(x, sigma.to(x.device, x.dtype), labels).to(x.dtype)
