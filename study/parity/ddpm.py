"""Discrete diffusion as Patch Diffusion and U-DiT have it: schedules, losses, sampling loops."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from study.diffusion import formulation
from study.diffusion.base import column
from study.diffusion.ddpm import DDPM, loss_weights
from study.diffusion.guidance import guided
from study.diffusion.samplers import sampler
from study.diffusion.samplers.base import StoredNoise
from study.diffusion.schedules import (
    Schedule,
    respace,
    schedule,
    split_bounds,
    split_mask,
    split_models,
)
from study.diffusion.split import SplitDenoiser
from study.parity.case import Case, Tensors, expect
from study.parity.mixture import Mixture

TABLES = (
    "betas",
    "alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "snr",
    "timestep_map",
)


def _tables(table: Schedule, prefix: str) -> Tensors:
    return {f"{prefix}/{name}": getattr(table, name) for name in TABLES}


def schedules(case: Case, tensors: Tensors) -> Tensors:
    """Betas, posterior terms, loss weights and respacings of every setting."""
    out: Tensors = {}
    for name, setting in case["settings"].items():
        table = schedule(setting["noise_schedule"], setting["diffusion_steps"])
        out |= _tables(table, f"out/{name}")
        for weighting in ("sqrt_snr", "snr", "snr+1", "truncated_snr", "p2"):
            out[f"out/{name}/weight_{weighting}"] = loss_weights(table, weighting)
        for respacing, steps in setting.get("respacings", {}).items():
            spaced = respace(table, respacing)
            if steps != len(spaced.betas):
                raise ValueError(
                    f"respacing {respacing} has {len(spaced.betas)} steps, not {steps}"
                )
            out |= _tables(spaced, f"out/{name}/respaced_{respacing}")
    return out


def _boundaries(trained: Tensor, sampled: Tensor, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a case says of a split's model, as it is here."""

    def ends(mask: Tensor) -> list[int]:
        return mask.nonzero()[[0, -1], 0].tolist()

    weight = trained.float().mean().item()
    near = math.isclose(weight, facts.get("loss_weight", weight), rel_tol=1e-5)
    return {
        "trained_on_timesteps": ends(trained),
        "n": int(trained.sum()),
        "samples_timesteps": ends(sampled),
        "loss_weight": facts.get("loss_weight", weight) if near else weight,
    }


def _bounds(text: Any) -> list[float]:
    """Signal-to-noise bounds from "0.25,4", a list, or nothing."""
    if isinstance(text, str):
        text = [part for part in re.split(r"[,\s]+", text) if part]
    return sorted((float(part) for part in text or []), reverse=True)


def splits(case: Case, tensors: Tensors) -> Tensors:
    """Signal-to-noise splits: which model samples and which is trained where."""
    table = schedule(case["noise_schedule"], case.get("diffusion_steps", case.get("steps", 1000)))
    bounds = _bounds(case["snr_splits"])
    if case.get("allow_const", True) is not True:
        raise ValueError("allow_const must be true: the weight of a split is a constant")
    models = split_models(table.snr, bounds)
    out = {"out/sampling_model_index": models, "out/snr": table.snr}
    for index in range(len(split_bounds(bounds)) - 1):
        mask = split_mask(table.snr, bounds, index)
        facts = case.get("boundaries", {}).get(f"model_{index}")
        if facts is not None:
            expect(dict(facts), **_boundaries(mask, models == index, facts))
        out[f"out/training_mask_split{index}"] = mask.to(torch.float32)
        weight = f"out/loss_weight_split{index}"
        shape = case["outputs"].get(weight, {"shape": [1]})["shape"]
        out[weight] = mask.to(torch.float32).mean().expand(shape)
    for name in case["outputs"]:
        found = re.fullmatch(r"out/(respaced_(.+))/(sampling_model_index|timestep_map)", name)
        if found:
            spaced = respace(table, found[2])
            out[f"out/{found[1]}/sampling_model_index"] = split_models(spaced.snr, bounds)
            out[f"out/{found[1]}/timestep_map"] = spaced.timestep_map
    return out


def _losses(case: Case, tensors: Tensors, runs: dict[str, Any], repository: str) -> Tensors:
    """Training losses and p(x_{t-1} | x_t) of runs with official options ("patch" or "dit")."""
    out: Tensors = {}
    images, t, noise = tensors["in/x0"], tensors["in/t"].long(), tensors["in/noise"]
    for name, official in runs.items():
        spec = _spec(official, repository)
        if official.get("snr_splits"):
            raise ValueError("snr_splits: losses here are of one model alone")
        base = formulation(spec)
        assert isinstance(base, DDPM)
        made = DDPM(
            base.options, table=respace(base.schedule, official.get("timestep_respacing") or "")
        )
        suffixes = [f"{n}_{spec['steps']}" for n in (official["noise_schedule"], spec["schedule"])]
        given = f"in/model_mean_output_{spec['prediction']}"
        suffix = next((s for s in suffixes if f"{given}_{s}" in tensors), suffixes[0])
        output = tensors[f"{given}_{suffix}"]
        if spec["variance"] == "learned":
            output = torch.cat([output, tensors["in/model_var_output"]], 1)
        loss = made.loss_at(t, lambda x, noise, label, raw=output: raw, images, noise)
        moments = made.moments(output, loss.noisy, t)
        clipped = made.moments(output, loss.noisy, t, adjust=lambda x0: x0.clamp(-1, 1))
        out[f"out/xt_{suffix}"] = loss.noisy
        out |= {f"out/{name}/{term}": value for term, value in loss.terms.items()}
        out |= {
            f"out/{name}/loss": loss.per_sample,
            f"out/{name}/p_mean": moments.mean,
            f"out/{name}/p_log_variance": moments.log_variance.expand_as(images),
            f"out/{name}/p_pred_xstart": moments.x0,
            f"out/{name}/p_mean_clipped": clipped.mean,
        }
    return out


def patch_losses(case: Case, tensors: Tensors) -> Tensors:
    """Patch Diffusion's training losses."""
    return _losses(case, tensors, case["runs"], "patch")


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
        signal, sigma = column(signal, clean), column(sigma, clean)
        eps = (x.double() - signal * clean) / sigma
        mean = {
            "x0": clean,
            "eps": eps,
            "v": signal * eps - sigma * clean,
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


def _spec(official: dict[str, Any], repository: str) -> dict[str, Any]:
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


def _discrete(case: Case, tensors: Tensors, runs: dict[str, Any], repository: str) -> Tensors:
    variance = {"patch": lambda x: (2 * x).sigmoid(), "dit": torch.tanh}[repository]
    out: Tensors = {}
    for name, run in runs.items():
        spec = _spec(run["diffusion"], repository)
        made = formulation(spec)
        splits = _bounds(run["diffusion"].get("snr_splits"))
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


def patch_samples(case: Case, tensors: Tensors) -> Tensors:
    """Patch Diffusion's sampling loops, on every run of the case."""
    return _discrete(case, tensors, case["runs"], "patch")


def udit(case: Case, tensors: Tensors) -> Tensors:
    """U-DiT's losses and sampling loops, on every run of the case."""
    losses = _losses(case, tensors, case.get("loss_runs", {}), "dit")
    return losses | _discrete(case, tensors, case.get("sample_runs", {}), "dit")
