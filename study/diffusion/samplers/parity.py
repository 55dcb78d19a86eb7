"""Samplers against recorded outputs of the official implementations (``study parity``)."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from study.diffusion import formulation
from study.diffusion.guidance import guided
from study.diffusion.samplers import sampler
from study.diffusion.samplers.base import StoredNoise
from study.diffusion.schedules import stable_diffusion_betas
from study.diffusion.split import SplitDenoiser

Case = Mapping[str, Any]
Tensors = dict[str, Tensor]


class Mixture:
    """E[x0 | x_t] of equal Gaussians around ``points`` [K, C, H, W], for x_t = s x0 + sigma n.

    The analytic stand-in for a network. Class k of n sees the centres k K/n .. (k+1) K/n - 1, the
    null label n sees all. Arithmetic is float64.
    """

    def __init__(self, points: Tensor, std: float, classes: int | None = None) -> None:
        self.points = points.double().flatten(1)
        self.std = float(std)
        self.classes = classes

    def __call__(
        self, x: Tensor, signal: Tensor, sigma: Tensor, label: Tensor | None = None
    ) -> Tensor:
        """x [B,C,H,W]; signal and sigma scalar or [B] -> [B,C,H,W] float64."""
        flat = x.double().flatten(1)
        s = torch.as_tensor(signal, dtype=torch.float64).reshape(-1, 1, 1)
        variance = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1, 1) ** 2
        variance = variance + s**2 * self.std**2
        gap = flat[:, None] - s * self.points
        logits = -(gap.square().sum(-1, keepdim=True)) / (2 * variance)
        if label is not None and self.classes is not None:
            share = len(self.points) // self.classes
            owner = torch.arange(len(self.points)) // share
            seen = (owner == label[:, None]) | (label[:, None] == self.classes)
            logits = logits.masked_fill(~seen[:, :, None], -torch.inf)
        means = self.points + (s * self.std**2 / variance) * gap
        return (logits.softmax(1) * means).sum(1).reshape(x.shape)


class _EDMStandIn:
    """The mixture as D(x; sigma), recording what it is called with."""

    def __init__(self, case: Case, tensors: Tensors, std: float) -> None:
        self.sigma_min, self.sigma_max = (float(end) for end in case["network_sigma_range"])
        self.mixture = Mixture(tensors["in/points"], std)
        self.states: list[Tensor] = []
        self.levels: list[float] = []

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        self.states.append(x)
        self.levels.append(float(sigma))
        return self.mixture(x, 1.0, sigma, label)


def _edm_family(case: Case, tensors: Tensors, kind: str) -> Tensors:
    out: Tensors = {}
    for name, run in case["runs"].items():
        given = {key: value for key, value in run.items() if value is not None}
        stand_in = _EDMStandIn(case, tensors, given.pop("component_std"))
        solver = sampler({"kind": kind, "steps": given.pop("num_steps"), **given})
        churn = tensors.get(f"in/{name}/churn_noise")
        noise = None if churn is None else StoredNoise(churn)
        latents = tensors.get(f"in/{name}/latents", tensors["in/latents"])
        *_, last = solver.states(stand_in, latents, None, noise)
        out[f"out/{name}/x"] = last.x
        out[f"out/{name}/x_of_each_network_call"] = torch.stack(stand_in.states)
        out[f"out/{name}/sigma_steps"] = solver.sigmas(stand_in)
        out[f"out/{name}/sigma_of_each_network_call"] = torch.tensor(
            stand_in.levels, dtype=torch.float64
        )
    return out


def run_sampler_edm_heun(case: Case, tensors: Tensors) -> Tensors:
    """EDM's sampler, on every run of the case."""
    return _edm_family(case, tensors, "edm_heun")


def run_sampler_edm_ablation(case: Case, tensors: Tensors) -> Tensors:
    """EDM's ablation sampler, on every run of the case."""
    return _edm_family(case, tensors, "edm_ablation")


class _UViTStandIn:
    """The mixture as U-ViT's network: the exact noise, called with the model's time, recorded."""

    def __init__(self, case: Case, tensors: Tensors, signal: Callable[[Tensor], Tensor]) -> None:
        self.mixture = Mixture(tensors["in/points"], case["component_std"], case.get("n_classes"))
        self.signal = signal
        self.states: list[Tensor] = []
        self.times: list[float] = []

    def __call__(self, x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        self.states.append(x)
        self.times.append(float(noise[0]))
        signal = self.signal(noise.double())
        sigma = (1 - signal.square()).sqrt()
        clean = self.mixture(x, signal, sigma, label)
        return (x.double() - _column(signal) * clean) / _column(sigma)

    def forget(self) -> None:
        """Drop what was recorded."""
        self.states, self.times = [], []

    def calls(self, wanted: int) -> list[int]:
        """Which of our network calls are the ``wanted`` recorded ones.

        Both passes of a guided pair see the same x and time; a case may hold one or both.
        """
        return [number * len(self.times) // wanted for number in range(wanted)]


def _column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)


def _linear_signal(model_time: Tensor) -> Tensor:
    """alpha of the linear SDE (beta 0.1 to 20) at 999 t."""
    t = model_time / 999
    return (-(0.1 * t + 19.9 * t**2 / 2) / 2).exp()


def _discrete_signal(model_time: Tensor) -> Tensor:
    """alpha of Stable Diffusion's schedule at steps 1..1000, ln alpha linear between them."""
    table = (1 - stable_diffusion_betas()).log().cumsum(0) / 2
    n = model_time.clamp(1, 1000)
    left = n.floor().long().clamp(max=999)
    return torch.lerp(table[left - 1], table[left], n - left).exp()


def _uvit(
    case: Case, tensors: Tensors, spec: dict[str, Any], options: Callable[[str], dict[str, Any]]
) -> Tensors:
    """Runs of U-ViT's samplers; ``options`` gives a run's sampler, with its noise under "noise"."""
    signal = _discrete_signal if spec.get("schedule") == "discrete" else _linear_signal
    out: Tensors = {}
    for name in case["runs"]:
        chosen = options(name)
        noise = chosen.pop("noise", None)
        network = _UViTStandIn(case, tensors, signal)
        denoiser = formulation(spec).denoiser(network)
        scale = case.get("guidance_scale")
        if scale is not None:
            denoiser = guided(denoiser, {"kind": "uvit", "scale": scale}, case["n_classes"])
        elif case.get("n_classes") is not None and "in/y" not in tensors:
            raise ValueError("n_classes needs in/y")
        stored = None if noise is None else StoredNoise(noise)
        latents = tensors.get(f"in/{name}/latents", tensors["in/latents"])
        labels = tensors.get("in/y")
        labels = None if labels is None else labels.long()
        *_, last = sampler(chosen).states(denoiser, latents, labels, stored)
        out[f"out/{name}/x_float64"] = last.x
        # The official float32 run, whose trajectory the recorded calls are.
        network.forget()
        run = case["runs"][name]
        solver = sampler(chosen | ({"precision": "float32"} if "dpm" in chosen["kind"] else {}))
        *_, last = solver.states(denoiser, latents, labels, stored)
        out[f"out/{name}/x"] = last.x
        passes = len(network.times) // chosen["steps"]
        if run["model_calls"] not in (chosen["steps"], passes * chosen["steps"]):
            raise ValueError(f"{name}: model_calls is {run['model_calls']}, not {chosen['steps']}")
        if "orders" in run and list(run["orders"]) != solver.orders():
            raise ValueError(f"{name}: orders are {run['orders']}, ours {solver.orders()}")
        for output, described in case["outputs"].items():
            quantity = output.removeprefix(f"out/{name}/")
            if quantity in ("t_of_each_model_call", "model_time_of_each_call"):
                calls = network.calls(described["shape"][0])
                times = torch.tensor([network.times[call] for call in calls], dtype=torch.float64)
                out[output] = times / 999 if quantity.startswith("t_") else times
            elif quantity == "x_of_each_model_call":
                calls = network.calls(described["shape"][0])
                out[output] = torch.stack([network.states[call] for call in calls])
            elif quantity == "timesteps":
                out[output] = solver.times(denoiser)
            elif quantity == "orders":
                out[output] = torch.tensor(solver.orders())
    return out


def run_sampler_dpm_fast(case: Case, tensors: Tensors) -> Tensors:
    """DPM-Solver fast on the linear SDE, on every run of the case."""

    def options(name: str) -> dict[str, Any]:
        return {"kind": "dpm_solver", "steps": sum(case["runs"][name]["orders"])}

    return _uvit(case, tensors, {"kind": "vpsde"}, options)


def run_sampler_dpm_discrete(case: Case, tensors: Tensors) -> Tensors:
    """DPM-Solver++ fast on Stable Diffusion's schedule, on every run of the case."""

    def options(name: str) -> dict[str, Any]:
        return {"kind": "dpm_solver_pp", "steps": sum(case["runs"][name]["orders"])}

    out = _uvit(case, tensors, {"kind": "vpsde", "schedule": "discrete"}, options)
    out["out/betas"] = stable_diffusion_betas()
    return out


def run_sampler_em(case: Case, tensors: Tensors) -> Tensors:
    """Euler-Maruyama on the reverse SDE and Euler on its ODE, on every run of the case."""

    def options(name: str) -> dict[str, Any]:
        numbers = re.findall(r"\d+", name)
        steps = int(numbers[0]) if numbers else case["runs"][name]["model_calls"]
        noise = tensors.get(f"in/{name}/noise", tensors.get(f"in/steps{steps}/noise"))
        form = "ode" if "ode" in name else "sde"
        return {"kind": "euler_maruyama", "form": form, "steps": steps, "noise": noise}

    return _uvit(case, tensors, {"kind": "vpsde"}, options)


class _StepsStandIn:
    """The mixture as a discrete network: the stated prediction, and variance channels of x_t."""

    def __init__(
        self, mixture: Mixture, options: Any, abar: Tensor, variance: Callable[[Tensor], Tensor]
    ) -> None:
        self.mixture = mixture
        self.options = options
        self.abar = abar
        self.variance = variance

    def __call__(self, x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        rescale = self.options.steps / 1000 if self.options.rescale_timesteps else 1.0
        abar = self.abar[(noise.double() * rescale).round().long()]
        signal, sigma = abar.sqrt(), (1 - abar).sqrt()
        clean = self.mixture(x, signal, sigma, label)
        eps = (x.double() - _column(signal) * clean) / _column(sigma)
        mean = {
            "x0": clean,
            "eps": eps,
            "v": _column(signal) * eps - _column(sigma) * clean,
        }[self.options.prediction]
        if self.options.variance != "learned":
            return mean
        return torch.cat([mean, self.variance(x.double())], 1)


PREDICTIONS = {
    "x0": "x0",
    "xstart": "x0",
    "start_x": "x0",
    "eps": "eps",
    "epsilon": "eps",
    "v": "v",
    "velocity": "v",
    "v_prediction": "v",
}
"""Names of a network's prediction in the official options, and ours."""


def ddpm_spec(official: dict[str, Any], repository: str) -> dict[str, Any]:
    """Our formulation spec from the official diffusion options of "patch" or "dit"."""
    schedule = {"squaredcos_cap_v2": "cosine"}.get(
        official["noise_schedule"], official["noise_schedule"]
    )
    if "model_mean_type" in official:
        prediction = PREDICTIONS[official["model_mean_type"].lower()]
    else:
        prediction = "x0" if official.get("predict_xstart") else "eps"
    fixed = "fixed_small" if official.get("sigma_small") else "fixed_large"
    loss = "rescaled_mse" if official.get("rescale_learned_sigmas") else "mse"
    if official.get("use_kl"):
        loss = "rescaled_kl"
    return {
        "kind": "ddpm",
        "steps": official.get("steps", official.get("diffusion_steps", 1000)),
        "schedule": schedule,
        "prediction": prediction,
        "variance": "learned" if official.get("learn_sigma") else fixed,
        "variance_values": "unit" if repository == "patch" else "signed",
        "weighting": official.get("weight_schedule", "uniform"),
        "loss": loss,
        "rescale_timesteps": bool(official.get("rescale_timesteps")),
    }


def _splits(text: Any) -> list[float]:
    """Signal-to-noise bounds from "0.25,4", a list, or nothing."""
    if isinstance(text, str):
        text = [part for part in re.split(r"[,\s]+", text) if part]
    return sorted((float(part) for part in text or []), reverse=True)


def _discrete(case: Case, tensors: Tensors, runs: dict[str, Any], repository: str) -> Tensors:
    variance = {"patch": lambda x: (2 * x).sigmoid(), "dit": torch.tanh}[repository]
    out: Tensors = {}
    for name, run in runs.items():
        spec = ddpm_spec(run["diffusion"], repository)
        made = formulation(spec)
        splits = _splits(run["diffusion"].get("snr_splits"))
        stds = run["component_std"]
        stds = stds if isinstance(stds, list) else [stds] * (len(splits) + 1)
        if len(stds) != len(splits) + 1:
            raise ValueError(
                f"{name}: component_std has {len(stds)} numbers for {len(splits)} splits"
            )
        classes = run.get("n_classes")
        denoisers = [
            made.denoiser(
                _StepsStandIn(
                    Mixture(tensors["in/points"], std, classes),
                    made.options,
                    made.schedule.alphas_cumprod,
                    variance,
                )
            )
            for std in stds
        ]
        denoiser = SplitDenoiser(denoisers, splits) if splits else denoisers[0]
        if run.get("guidance_scale") is not None:
            kind = "patch" if repository == "patch" else "udit"
            guidance = {"kind": kind, "scale": run["guidance_scale"]}
            denoiser = guided(denoiser, guidance, classes)
        threshold = "clip" if run.get("clip_denoised") else "none"
        respacing = run["diffusion"]["timestep_respacing"]
        if run.get("respacing", respacing) != respacing:
            raise ValueError(f"{name}: respacing is not that of diffusion")
        options = {
            "kind": {"ddim": "ddim", "ddpm": "ancestral"}[run["sampler"]],
            "respacing": respacing,
            "threshold": "dynamic" if run.get("dynamic_thresholding") else threshold,
            "precision": "float32",
        }
        if options["kind"] == "ddim":
            options["eta"] = run.get("eta") or 0.0
        elif run.get("eta") is not None:
            raise ValueError(f"{name}: eta belongs to ddim")
        solver = sampler(options)
        latents = tensors.get(f"in/{name}/latents", tensors.get("in/latents"))
        labels = tensors.get(f"in/{name}/y", tensors.get("in/y"))
        noise = tensors.get(f"in/{name}/noise", tensors.get("in/noise"))
        labels = None if labels is None else labels.long()
        if classes is not None and labels is None:
            raise ValueError(f"{name}: n_classes needs in/y")
        states = list(solver.states(denoiser, latents, labels, StoredNoise(noise)))
        out[f"out/{name}/sample"] = states[-1].x
        out[f"out/{name}/trajectory"] = torch.stack([state.x for state in states])
        out[f"out/{name}/pred_xstart"] = torch.stack([state.denoised for state in states])
        out[f"out/{name}/timestep_map"] = solver.table(denoiser).timestep_map
    return out


def run_ddpm_patch_sample(case: Case, tensors: Tensors) -> Tensors:
    """Patch Diffusion's sampling loops, on every run of the case."""
    return _discrete(case, tensors, case["runs"], "patch")


def run_ddpm_dit(case: Case, tensors: Tensors) -> Tensors:
    """U-DiT's losses and sampling loops, on every run of the case."""
    from study.diffusion.parity import ddpm_losses  # which imports this module

    losses = ddpm_losses(case, tensors, case.get("loss_runs", {}), "dit")
    return losses | _discrete(case, tensors, case.get("sample_runs", {}), "dit")


RUNNERS: dict[str, Callable[[Case, Tensors], Tensors]] = {
    "sampler-edm-heun": run_sampler_edm_heun,
    "sampler-edm-ablation": run_sampler_edm_ablation,
    "sampler-dpm-fast": run_sampler_dpm_fast,
    "sampler-dpm-discrete": run_sampler_dpm_discrete,
    "sampler-em": run_sampler_em,
    "ddpm-patch-sample": run_ddpm_patch_sample,
    "ddpm-dit": run_ddpm_dit,
}
"""Kind of a golden case (its name without the last letter) -> the function that runs it."""
