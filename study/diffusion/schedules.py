"""Discrete noise schedules: betas, posterior terms, signal-to-noise ratios, respacing.

Ho et al. 2020 ("DDPM") for the posterior; Nichol & Dhariwal 2021 ("Improved DDPM") for the cosine
schedule and respacing. All tables are float64 on the CPU; `Schedule.at` reads them at timesteps.
"""

import math

import numpy as np
import torch
from torch import Tensor

from study.diffusion.base import wide
from study.files import UserError
from study.spec.steps import check_betas, kept_steps, linear_end


class Schedule:
    """Tables over the steps 0..T-1 of a discrete diffusion, each [T] float64.

    betas, alphas (1 - beta), alphas_cumprod (abar), alphas_cumprod_prev (abar of the step before,
    1 at step 0), signal (sqrt(abar)), noise (sqrt(1 - abar)), inverse_signal, sigma (noise /
    signal: the noise level in EDM terms), snr (abar / (1 - abar)), posterior_variance (of
    q(x_{t-1} | x_t, x_0)), posterior_log_variance_clipped (its logarithm, entry 0 replaced by 1's),
    posterior_mean_coef1 (of x_0), posterior_mean_coef2 (of x_t), log_betas, large_log_variance
    (log beta with entry 0 replaced by that of the posterior at step 1: "fixed_large").

    timestep_map [T] int64: the original timestep of every step, which the network is told;
    original_steps: the number of steps of the schedule that was respaced.
    """

    def __init__(
        self,
        betas: Tensor,
        timestep_map: Tensor | None = None,
        original_steps: int | None = None,
    ) -> None:
        betas = torch.as_tensor(betas, dtype=torch.float64).cpu()
        if betas.ndim != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas <= 1)).all()):
            raise UserError("noise schedule: betas must be a list of numbers in (0, 1]")
        self.steps = len(betas)
        self.timestep_map = torch.arange(self.steps) if timestep_map is None else timestep_map
        self.original_steps = original_steps or self.steps
        self.betas = betas
        self.alphas = 1 - betas
        self.alphas_cumprod = abar = self.alphas.cumprod(0)
        self.alphas_cumprod_prev = previous = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
        self.signal = abar.sqrt()
        self.noise = (1 - abar).sqrt()
        self.sigma = ((1 - abar) / abar).sqrt()
        self.snr = abar / (1 - abar)
        self.posterior_variance = betas * (1 - previous) / (1 - abar)
        # The posterior of step 0 has no variance; its logarithm is never used but must be finite.
        first = self.posterior_variance[1:2] if self.steps > 1 else betas
        clipped = torch.cat([first, self.posterior_variance[1:]])
        self.posterior_log_variance_clipped = clipped.log()
        self.posterior_mean_coef1 = betas * previous.sqrt() / (1 - abar)
        self.posterior_mean_coef2 = (1 - previous) * self.alphas.sqrt() / (1 - abar)
        self.log_betas = betas.log()
        self.large_log_variance = torch.cat([clipped[:1], betas[1:]]).log()
        self.inverse_signal = (1 / abar).sqrt()
        self._copies: dict[tuple[str, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return self.steps

    def at(self, name: str, t: Tensor, like: Tensor | None = None) -> Tensor:
        """Entries of table `name` at steps t [B] int64, on the device of t.

        Without `like`: [B] float64 (float32 where the device has no float64); with `like`
        [B,C,H,W]: [B,1,1,1] in its type.
        """
        key = (name, t.device)
        if key not in self._copies:
            table = getattr(self, name)
            if table.is_floating_point():
                table = table.to(wide(t.device))
            self._copies[key] = table.to(t.device)
        values = self._copies[key][t]
        if like is None:
            return values
        return values.to(like).reshape(-1, *[1] * (like.ndim - 1))

    def nearest(self, sigma: Tensor) -> Tensor:
        """The step whose noise level in EDM terms is nearest to sigma (any shape), int64."""
        if self.steps == 1:
            return torch.zeros_like(sigma, dtype=torch.int64)
        precision = wide(sigma.device)
        table = self.sigma.to(precision).to(sigma.device)
        flat = sigma.to(precision).reshape(-1)
        right = torch.searchsorted(table, flat).clamp(1, self.steps - 1)
        left = right - 1
        nearer_left = (flat - table[left]).abs() <= (table[right] - flat).abs()
        return torch.where(nearer_left, left, right).reshape(sigma.shape)


def linear_betas(steps: int, end: float = 0.02) -> Tensor:
    """Betas from 1e-4 to `end`, both times 1000 / steps (DDPM; 1000 steps unscaled)."""
    scale = 1000 / steps
    # numpy's linspace and torch's differ in the last digit, which decides ties at the bounds of
    # signal-to-noise splits.
    return torch.from_numpy(np.linspace(scale * 1e-4, scale * end, steps))


def cosine_betas(steps: int, s: float = 0.008, limit: float = 0.999) -> Tensor:
    """Betas of abar(u) = cos^2((u + s) / (1 + s) pi / 2), capped at `limit` (Improved DDPM)."""

    def abar(u: float) -> float:
        return math.cos((u + s) / (1 + s) * math.pi / 2) ** 2

    ratios = [abar((i + 1) / steps) / abar(i / steps) for i in range(steps)]
    return torch.tensor([min(1 - ratio, limit) for ratio in ratios], dtype=torch.float64)


def stable_diffusion_betas(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """Betas linear in their square root (the schedule of Stable Diffusion), [steps]."""
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()


def schedule(name: str, steps: int) -> Schedule:
    """The schedule called `name`: linear, linearX (last beta X) or cosine."""
    end = linear_end(name)
    if end is not None:
        check_betas(name, steps)
        return Schedule(linear_betas(steps, end))
    if name in ("cosine", "squaredcos_cap_v2"):
        return Schedule(cosine_betas(steps))
    raise UserError(f"noise schedule: unknown name {name!r}; use linear, linearX or cosine")


def respace(base: Schedule, respacing: str) -> Schedule:
    """The schedule over the kept steps only, with the same abar at each of them.

    `respacing` as in `kept_steps`. `timestep_map` of the result gives the original timesteps.
    """
    kept = torch.tensor(kept_steps(base.steps, respacing))
    if len(kept) == base.steps:
        return base
    abar = base.alphas_cumprod[kept]
    previous = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
    return Schedule(1 - abar / previous, base.timestep_map[kept], base.original_steps)


def split_bounds(splits: list[float]) -> list[float]:
    """Bounds of the signal-to-noise splits, descending: infinite in effect, the values, zero."""
    return [1e9, *sorted(splits, reverse=True), 0.0]


def split_models(snr: Tensor, splits: list[float]) -> Tensor:
    """Index of the model that denoises each step in sampling, from snr [T]; 0 has least noise.

    Model j handles snr in (bound[j+1], bound[j]] (Patch Diffusion).
    """
    bounds = split_bounds(splits)
    inside = torch.tensor(bounds[1:-1], dtype=snr.dtype)
    return (snr[:, None] <= inside).sum(1)


def split_mask(snr: Tensor, splits: list[float], index: int) -> Tensor:
    """The steps [T] bool that model `index` is trained on: snr in [bound[j+1], bound[j])."""
    bounds = split_bounds(splits)
    return (snr >= bounds[index + 1]) & (snr < bounds[index])
