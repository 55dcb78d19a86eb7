"""U-ViT's formulation: a variance-preserving SDE in continuous or discrete time, unweighted loss.

Bao et al. 2023, "All are Worth Words": x_t = sqrt(cum_alpha) x_0 + sqrt(cum_beta) n, the network
predicts the noise (or x_0) and the loss is the plain mean squared error ("LSimple"). Song et al.
2021 ("Score-Based Generative Modeling through SDEs") for the SDEs.

The functions of time are evaluated in the precision of their argument. The formulation itself
works in float64: in float32, cum_beta = 1 - cum_alpha of the linear SDE is known to no better than
one per cent below t = 1e-4.
"""

import math
from typing import Any, Protocol

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
    noise_target,
    perturb,
    wide,
)
from study.diffusion.schedules import stable_diffusion_betas

TIME_SCALE = 999.0
"""The network of the continuous formulation receives 999 t."""

T_MIN = 1e-4
"""Where published sampling ends, hence the smallest supported noise level in continuous time."""


class Process(Protocol):
    """A variance-preserving process; every method maps times of any shape to the same shape."""

    t_min: float
    t_max: float

    def cum_alpha(self, t: Tensor) -> Tensor:
        """Squared signal coefficient of x_t."""
        ...

    def cum_beta(self, t: Tensor) -> Tensor:
        """Variance of x_t given x_0."""
        ...

    def nsr(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio cum_beta / cum_alpha."""
        ...

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio."""
        ...

    def time(self, sigma: Tensor) -> Tensor:
        """The time at which sqrt(nsr) is sigma."""
        ...


class LinearSDE:
    """dx = -beta(t)/2 x dt + sqrt(beta(t)) dw with beta linear in t from beta_min to beta_max."""

    t_min, t_max = T_MIN, 1.0

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        self.beta_min = beta_min
        self.beta_max = beta_max

    def integral(self, t: Tensor) -> Tensor:
        """Integral of beta from 0 to t."""
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t.square()

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t); the drift is -g^2 x / 2."""
        return (self.beta_min + t * (self.beta_max - self.beta_min)).sqrt()

    def cum_alpha(self, t: Tensor) -> Tensor:
        """Squared signal coefficient of x_t."""
        return (-self.integral(t)).exp()

    def cum_beta(self, t: Tensor) -> Tensor:
        """Variance of x_t given x_0."""
        return 1 - self.cum_alpha(t)

    def nsr(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio."""
        return self.integral(t).expm1()

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio."""
        return 1 / self.nsr(t)

    def time(self, sigma: Tensor) -> Tensor:
        """The time at which sqrt(nsr) is sigma."""
        level = sigma.square().log1p()
        slope = self.beta_max - self.beta_min
        return 2 * level / ((self.beta_min**2 + 2 * slope * level).sqrt() + self.beta_min)


class CosineSDE:
    """The continuous form of improved DDPM's cosine schedule with offset s.

    The signal vanishes at t = 1; denoisers support t up to 0.9946, the end that Lu et al. 2022
    ("DPM-Solver") use for this schedule.
    """

    t_min, t_max = T_MIN, 0.9946

    def __init__(self, s: float = 0.008) -> None:
        self.s = s
        self.start = math.cos(s / (1 + s) * math.pi / 2) ** 2

    def angle(self, t: Tensor) -> Tensor:
        """Argument of the cosine."""
        return (t + self.s) / (1 + self.s) * math.pi / 2

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t); the drift is -g^2 x / 2."""
        return (self.angle(t).tan() * (math.pi / (1 + self.s))).sqrt()

    def cum_alpha(self, t: Tensor) -> Tensor:
        """Squared signal coefficient of x_t."""
        return self.angle(t).cos().square() / self.start

    def cum_beta(self, t: Tensor) -> Tensor:
        """Variance of x_t given x_0."""
        return 1 - self.cum_alpha(t)

    def nsr(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio."""
        return self.cum_beta(t) / self.cum_alpha(t)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio."""
        return self.cum_alpha(t) / self.cum_beta(t)

    def time(self, sigma: Tensor) -> Tensor:
        """The time at which sqrt(nsr) is sigma."""
        cosine = (self.start / (1 + sigma.square())).sqrt()
        return cosine.acos() * (2 / math.pi) * (1 + self.s) - self.s


class DiscreteProcess:
    """Steps n = 0..N (0: clean data) of a list of betas; fractional n by interpolation.

    Tables [N + 1] float64: betas (beta_0 = 0), cum_alphas, cum_betas (built as a sum of products,
    which unlike 1 - cum_alphas keeps all digits at small n). Between steps ln(cum_alpha) is
    linear in n, outside 1..N the end segments go on (as DPM-Solver reads a discrete schedule).
    """

    def __init__(self, betas: Tensor) -> None:
        self.betas = torch.cat([torch.zeros(1, dtype=torch.float64), betas.to(torch.float64)])
        self.steps = len(betas)
        self.t_min, self.t_max = 1.0, float(self.steps)
        self.cum_alphas = (1 - self.betas).cumprod(0)
        variance, variances = 0.0, []
        for beta in self.betas.tolist():
            variance = (1 - beta) * variance + beta
            variances.append(variance)
        self.cum_betas = torch.tensor(variances, dtype=torch.float64)
        self.log_alphas = self.cum_alphas.log()

    def _read(self, table: Tensor, n: Tensor) -> Tensor:
        return table.to(wide(n.device)).to(n.device)[n]

    def log_cum_alpha(self, n: Tensor) -> Tensor:
        """ln(cum_alpha) at fractional n."""
        left = n.floor().long().clamp(1, self.steps - 1)
        low = self._read(self.log_alphas, left)
        high = self._read(self.log_alphas, left + 1)
        return low + (n - left) * (high - low)

    def cum_alpha(self, n: Tensor) -> Tensor:
        """Squared signal coefficient of x_n."""
        if not n.is_floating_point():
            return self._read(self.cum_alphas, n)
        return self.log_cum_alpha(n).exp()

    def cum_beta(self, n: Tensor) -> Tensor:
        """Variance of x_n given x_0."""
        if not n.is_floating_point():
            return self._read(self.cum_betas, n)
        return -self.log_cum_alpha(n).expm1()

    def nsr(self, n: Tensor) -> Tensor:
        """Noise-to-signal ratio."""
        return self.cum_beta(n) / self.cum_alpha(n)

    def snr(self, n: Tensor) -> Tensor:
        """Signal-to-noise ratio."""
        return self.cum_alpha(n) / self.cum_beta(n)

    def time(self, sigma: Tensor) -> Tensor:
        """The fractional step at which sqrt(nsr) is sigma."""
        wanted = -sigma.to(wide(sigma.device)).square().log1p()
        table = self.log_alphas.to(wanted.dtype).to(sigma.device)
        # ln(cum_alpha) falls with n, searchsorted wants it to rise.
        left = torch.searchsorted(-table, -wanted.contiguous()).sub(1).clamp(1, self.steps - 1)
        return left + (wanted - table[left]) / (table[left + 1] - table[left])


class VPSDEDenoiser:
    """D(x; sigma) of a network trained on a variance-preserving process, and its native views."""

    sigma_data = None

    def __init__(self, formulation: "VPSDE", network: Network) -> None:
        self.formulation = formulation
        self.process = formulation.process
        self.network = network
        ends = torch.tensor([self.process.t_min, self.process.t_max], dtype=torch.float64)
        self.sigma_min, self.sigma_max = self.process.nsr(ends).sqrt().tolist()

    def __call__(
        self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None, **conditioning: Any
    ) -> Tensor:
        """x = y + sigma n [B,C,H,W], sigma scalar or [B] -> clean image [B,C,H,W], float32."""
        x = x.to(torch.float32)
        sigma = torch.as_tensor(sigma).to(x.device, wide(x.device)).reshape(-1)
        sigma = sigma.expand(len(x))
        scaled = column(1 / (1 + sigma.square()).sqrt(), x) * x
        raw = self._raw(scaled, self.process.time(sigma), label, conditioning)
        if self.formulation.options.prediction == "x0":
            return raw
        return x - column(sigma, x) * raw

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The identity: the network takes any time, fractional steps included."""
        return torch.as_tensor(sigma)

    def eps(
        self, x: Tensor, t: Tensor | float, label: Tensor | None = None, **conditioning: Any
    ) -> Tensor:
        """Noise in x = x_t [B,C,H,W] at native time t (scalar or [B]), float32."""
        x, t = self._native(x, t)
        raw = self._raw(x, t, label, conditioning)
        return (
            raw
            if self.formulation.options.prediction == "eps"
            else eps_of_x0(self.process, x, t, raw)
        )

    def x0(
        self, x: Tensor, t: Tensor | float, label: Tensor | None = None, **conditioning: Any
    ) -> Tensor:
        """Clean image behind x = x_t [B,C,H,W] at native time t (scalar or [B]), float32."""
        x, t = self._native(x, t)
        raw = self._raw(x, t, label, conditioning)
        return (
            raw
            if self.formulation.options.prediction == "x0"
            else x0_of_eps(self.process, x, t, raw)
        )

    def _native(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        x = x.to(torch.float32)
        t = torch.as_tensor(t).to(x.device, wide(x.device)).reshape(-1)
        return x, t.expand(len(x))

    def _raw(self, x: Tensor, t: Tensor, label: Tensor | None, conditioning: dict) -> Tensor:
        return self.formulation.network_output(self.network, x, t, label, conditioning)


def x0_of_eps(process: Process, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_0 = x_t / sqrt(cum_alpha) - sqrt(nsr) eps; x, eps [B,C,H,W], t [B]."""
    return column(process.cum_alpha(t).rsqrt(), x) * x - column(process.nsr(t).sqrt(), x) * eps


def eps_of_x0(process: Process, x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """eps = x_t / sqrt(cum_beta) - sqrt(snr) x_0; x, x0 [B,C,H,W], t [B]."""
    return column(process.cum_beta(t).rsqrt(), x) * x - column(process.snr(t).sqrt(), x) * x0


def score_of_eps(process: Process, t: Tensor, eps: Tensor) -> Tensor:
    """Score -eps / sqrt(cum_beta); eps [B,C,H,W], t [B]."""
    return -column(process.cum_beta(t).rsqrt(), eps) * eps


class VPSDE(Formulation):
    """Noise (or x_0) prediction on a variance-preserving process, plain mean squared error.

    Continuous time: t uniform on (0, 1), network input 999 t. Discrete: n uniform on 1..steps,
    network input n. `process` gives the functions of time.
    """

    kind = "vpsde"

    def __init__(self, options: Any, noise_scale: float = 1.0) -> None:
        super().__init__(options, noise_scale)
        self.discrete = options.schedule == "discrete"
        self.process: Process
        if options.schedule == "linear":
            self.process = LinearSDE(options.beta_min, options.beta_max)
        elif options.schedule == "cosine":
            self.process = CosineSDE(options.cosine_s)
        else:
            betas = stable_diffusion_betas(options.steps, options.beta_start, options.beta_end)
            self.process = DiscreteProcess(betas)

    def levels(self, draw: Tensor) -> Tensor:
        """Times in (0, 1), or int64 steps 1..N, from u uniform in [0, 1).

        u = 0 stands for the smallest number above it that single precision draws can give, so
        that no noise level is zero.
        """
        if self.discrete:
            return (draw * self.process.steps).long().clamp(max=self.process.steps - 1) + 1
        return draw.clamp(min=2.0**-24)

    def _time(self, level: Tensor) -> Tensor:
        return level.to(wide(level.device)) if level.is_floating_point() else level

    def sigma(self, level: Tensor) -> Tensor:
        """sqrt(nsr), float32."""
        return self.process.nsr(self._time(level)).sqrt().to(torch.float32)

    def scales(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """(sqrt(cum_alpha), sqrt(cum_beta)), float64."""
        t = self._time(level)
        return self.process.cum_alpha(t).sqrt(), self.process.cum_beta(t).sqrt()

    def noise_number(self, level: Tensor) -> Tensor:
        """999 t, or the step n (fractional in sampling), times noise_scale; float32."""
        scale = 1.0 if self.discrete else TIME_SCALE
        return (level * scale).to(torch.float32) * self.noise_scale

    def denoiser(self, network: Network) -> Denoiser:
        """The network as D(x; sigma), with `eps` and `x0` views at native times."""
        return VPSDEDenoiser(self, network)

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
        """Squared error of the noise (or of x_0), mean over the image, no weight."""
        return self.loss_at(
            self.levels(draw), network, images, noise, label, stable_target, **conditioning
        )

    def loss_at(
        self,
        level: Tensor,
        network: Network,
        images: Tensor,
        noise: Tensor,
        label: Tensor | None = None,
        stable_target: Target | None = None,
        **conditioning: Any,
    ) -> Loss:
        """`loss` at given noise levels [B]."""
        a, s = self.scales(level)
        noisy = perturb(images, noise, a, s)
        clean = clean_target(images, noisy, a, s, stable_target)
        raw = self.network_output(network, noisy, level, label, conditioning)
        if self.options.prediction == "eps":
            target = noise_target(images, noise, clean, a, s)
        else:
            target = clean
        elements = (raw - target).square()
        return Loss(
            per_sample=elements.flatten(1).mean(1),
            level=level,
            sigma=self.sigma(level),
            elements=elements,
            target=target,
            prediction=raw,
            clean=clean,
            noisy=noisy,
        )

    def network_output(
        self, network: Network, x: Tensor, level: Tensor, label: Tensor | None, conditioning: dict
    ) -> Tensor:
        """The network's prediction at x_t, image channels only, float32."""
        raw = network(x, self.noise_number(level), label, **conditioning)
        return raw[:, : x.shape[1]].to(torch.float32)
