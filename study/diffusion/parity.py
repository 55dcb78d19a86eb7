"""Formulations, targets and augmentation against the official codes' recorded outputs.

Every ``run_<kind>(case, tensors)`` takes a golden case (its JSON and its tensors) and returns the
outputs it describes, computed by this package; ``study parity`` compares. Where a case uses an
analytic stand-in for the network, the formula is the one in the case's notes.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from study.diffusion import formulation
from study.diffusion.augmentation import DRAWS, Augmentation, Draws
from study.diffusion.base import Loss, column
from study.diffusion.ddpm import DDPM, loss_weights
from study.diffusion.edm import Preconditioned
from study.diffusion.options import OPTIONS, AugmentationOptions
from study.diffusion.samplers.parity import ddpm_spec
from study.diffusion.schedules import (
    Schedule,
    respace,
    schedule,
    split_bounds,
    split_mask,
    split_models,
)
from study.diffusion.stf import StableTarget, reference_batch
from study.diffusion.vpsde import VPSDE, eps_of_x0, score_of_eps, x0_of_eps

Case = dict[str, Any]
Tensors = dict[str, Tensor]


# EDM family: losses and stable targets


def _edm_family(kind: str, case: Case) -> Preconditioned:
    """The formulation of a case's official constructor; arguments without effect are dropped."""
    known = OPTIONS[kind].model_fields
    given = {k: v for k, v in case["constructor"].items() if k in known}
    if given.get("sigma_max") in ("inf", float("inf")):
        given["sigma_max"] = None
    made = formulation({"kind": kind, **given})
    assert isinstance(made, Preconditioned)
    return made


def mirror_odd(images: Tensor) -> tuple[Tensor, Tensor]:
    """The cases' stand-in for augmentation: odd-indexed images mirrored and labelled 1."""
    odd = torch.arange(len(images)) % 2 == 1
    mirrored = torch.where(odd[:, None, None, None], images.flip(3), images)
    return mirrored, odd.to(images)[:, None]


def _augmented(case: Case, images: Tensor) -> tuple[Tensor, Tensor | None]:
    if case.get("augmentation", "none") == "none":
        return images, None
    return mirror_odd(images)


def _class_index(tensors: Tensors, count: int) -> Tensor | None:
    labels = tensors.get("in/class_labels")
    return None if labels is None else labels[:count].argmax(1)


def _stand_in(case: Case) -> Callable[..., Tensor]:
    """x s2 / (s2 + sigma^2) + 0.05 class + 0.1 sum of augmentation labels."""
    variance = case["sigma_data_of_net"] ** 2

    def denoise(
        x: Tensor, sigma: Tensor, label: Tensor | None, augment_labels: Tensor | None = None
    ) -> Tensor:
        out = x * column(variance / (variance + sigma.square()), x)
        if label is not None:
            out = out + 0.05 * column(label, x)
        if augment_labels is not None:
            out = out + 0.1 * column(augment_labels.sum(1), x)
        return out

    return denoise


def _edm_loss(kind: str, case: Case, tensors: Tensors) -> Tensors:
    made = _edm_family(kind, case)
    images, augment_labels = _augmented(case, tensors["in/images"])
    label = _class_index(tensors, len(images))
    draw, noise = tensors["in/level_draw"].flatten(), tensors["in/unit_noise"]
    loss = made.denoiser_loss(
        _stand_in(case), images, draw, noise, label, augment_labels=augment_labels
    )
    return {
        "out/augmented_images": images,
        "out/sigma": loss.sigma,
        "out/lambda": made.weight(loss.sigma),
        "out/loss": loss.elements,
        "out/net_input": loss.noisy,
        "out/denoised": loss.prediction,
        "out/backward_scalar": loss.per_sample.mean(),
    }


def run_edmloss(case: Case, tensors: Tensors) -> Tensors:
    """EDM loss."""
    return _edm_loss("edm", case, tensors)


def run_vploss(case: Case, tensors: Tensors) -> Tensors:
    """VP loss."""
    return _edm_loss("vp", case, tensors)


def run_veloss(case: Case, tensors: Tensors) -> Tensors:
    """VE loss."""
    return _edm_loss("ve", case, tensors)


def run_stf(case: Case, tensors: Tensors) -> Tensors:
    """Stable targets and the EDM loss with and without them."""
    made = _edm_family("edm", case)
    given, batch = tensors["in/reference_batch"], case["batch"]
    images, augment_labels = _augmented(case, given[:batch])
    reference = reference_batch(images, _augmented(case, given[batch:])[0])
    target = StableTarget(reference)

    def loss(stable: StableTarget | None) -> Loss:
        return made.denoiser_loss(
            _stand_in(case),
            images,
            tensors["in/level_draw"].flatten(),
            tensors["in/unit_noise"],
            _class_index(tensors, batch),
            stable,
            augment_labels=augment_labels,
        )

    plain, stable = loss(None), loss(target)
    scale = torch.ones(batch)
    return {
        "out/sigma": stable.sigma,
        "out/perturbed": stable.noisy,
        "out/weights": target.weights(stable.noisy, scale, stable.sigma),
        "out/log_weights_unnormalised": target.log_weights(stable.noisy, scale, stable.sigma),
        "out/stable_targets": stable.clean,
        "out/denoised": stable.prediction,
        "out/lambda": made.weight(stable.sigma),
        "out/loss_stf": stable.elements,
        "out/loss_plain": plain.elements,
        "out/backward_scalar": stable.per_sample.mean(),
        "out/reference_batch_used": reference,
        "out/augmented_images": images,
    }


# EDM family: preconditioned networks


def _precond(kind: str, case: Case, tensors: Tensors) -> Tensors:
    from study.backbones.songunet import SongUNet

    network = SongUNet.from_official(**case["inner_network"])
    prefix = "weights/model."
    network.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    network.eval()
    made = _edm_family(kind, case)
    seen: dict[str, Tensor] = {}

    def recorded(x: Tensor, noise: Tensor, label: Tensor | None, **conditioning: Any) -> Tensor:
        raw = network(x, noise, label, **conditioning)
        seen.update({"out/net_input": x, "out/c_noise": noise, "out/F": raw})
        return raw

    denoise = made.denoiser(recorded)
    x, sigma = tensors["in/x"], tensors["in/sigma"].flatten()
    out: Tensors = {}
    with torch.no_grad():
        out["out/D_no_labels"] = denoise(x, sigma)
        conditioning = {}
        if "in/augment_labels" in tensors:
            conditioning["augment_labels"] = tensors["in/augment_labels"]
        out["out/D"] = denoise(x, sigma, tensors.get("in/class_labels"), **conditioning)
    out |= seen
    if "in/round_query" in tensors:
        out["out/round_sigma"] = denoise.round_sigma(tensors["in/round_query"])
    if kind == "iddpm":
        out["out/u"] = made.u
        if "in/round_query" in tensors:
            out["out/round_index"] = made.index(tensors["in/round_query"])
    return out


def run_precond_edm(case: Case, tensors: Tensors) -> Tensors:
    """EDM preconditioning around a network."""
    return _precond("edm", case, tensors)


def run_precond_vp(case: Case, tensors: Tensors) -> Tensors:
    """VP preconditioning around a network."""
    return _precond("vp", case, tensors)


def run_precond_ve(case: Case, tensors: Tensors) -> Tensors:
    """VE preconditioning around a network."""
    return _precond("ve", case, tensors)


def run_precond_iddpm(case: Case, tensors: Tensors) -> Tensors:
    """Improved-DDPM preconditioning around a network."""
    return _precond("iddpm", case, tensors)


# U-ViT


def _described(case: Case) -> str:
    """What the case says of itself, without notes that speak of other settings too."""
    words = {k: v for k, v in case.items() if k not in ("notes", "inputs", "outputs", "source")}
    return str(words).lower()


def _uvit_stand_in(last: float) -> Callable[..., Tensor]:
    """0.8 x - 0.3 (model time) / last + 0.1 label."""

    def network(x: Tensor, noise: Tensor, label: Tensor | None) -> Tensor:
        out = 0.8 * x - 0.3 * column(noise, x) / last
        return out if label is None else out + 0.1 * column(label, x)

    return network


def run_vpsde_uvit(case: Case, tensors: Tensors) -> Tensors:
    """Continuous VP SDE: LSimple, conversions, and the functions of time (in float32)."""
    words, given = _described(case), case.get("constructor") or {}
    spec: dict[str, Any] = {"kind": "vpsde", "prediction": "x0" if "x0_pred" in words else "eps"}
    if "cosine" in words:
        spec["schedule"] = "cosine"
        if "s" in given:
            spec["cosine_s"] = given["s"]
    else:
        spec |= {k: given[k] for k in ("beta_min", "beta_max") if k in given}
    made = formulation(spec)
    assert isinstance(made, VPSDE)
    process, t = made.process, tensors["in/t"]
    network = _uvit_stand_in(999)
    loss = made.loss_at(t, network, tensors["in/x0"], tensors["in/noise"], tensors.get("in/y"))
    x = loss.noisy
    if spec["prediction"] == "eps":
        eps, x0 = loss.prediction, x0_of_eps(process, x, t, loss.prediction)
    else:
        eps, x0 = eps_of_x0(process, x, t, loss.prediction), loss.prediction
    out = {
        "out/loss": loss.per_sample,
        "out/xt": x,
        "out/model_time": made.noise_number(t),
        "out/noise_prediction": eps,
        "out/x0_prediction": x0,
        "out/score": score_of_eps(process, t, eps),
    }
    if "in/t_grid" in tensors:
        grid = tensors["in/t_grid"]
        for name in ("cum_alpha", "cum_beta", "snr", "nsr", "diffusion"):
            out[f"out/grid/{name}"] = getattr(process, name)(grid)
        out["out/grid/alpha"] = process.cum_alpha(grid).sqrt()
        out["out/grid/sigma"] = process.cum_beta(grid).sqrt()
    return out


def run_vpsde_uvit_discrete(case: Case, tensors: Tensors) -> Tensors:
    """Stable-Diffusion schedule: LSimple and the tables."""
    prediction = "x0" if "x0_pred" in _described(case) else "eps"
    made = formulation({"kind": "vpsde", "schedule": "discrete", "prediction": prediction})
    assert isinstance(made, VPSDE)
    process, n = made.process, tensors["in/n"].long()
    network = _uvit_stand_in(process.steps)
    loss = made.loss_at(n, network, tensors["in/x0"], tensors["in/noise"], tensors.get("in/y"))
    return {
        "out/loss": loss.per_sample,
        "out/xn": loss.noisy,
        "out/model_time": made.noise_number(n),
        "out/betas": process.betas,
        "out/cum_alphas": process.cum_alphas,
        "out/cum_betas": process.cum_betas,
    }


# Discrete diffusion

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


def run_ddpm_schedule(case: Case, tensors: Tensors) -> Tensors:
    """Betas, posterior terms, loss weights and respacings of every setting."""
    out: Tensors = {}
    for name, setting in case["settings"].items():
        table = schedule(setting["noise_schedule"], setting["diffusion_steps"])
        out |= _tables(table, f"out/{name}")
        for weighting in ("sqrt_snr", "snr", "snr+1", "truncated_snr", "p2"):
            out[f"out/{name}/weight_{weighting}"] = loss_weights(table, weighting)
        for respacing in setting.get("respacings", {}):
            out |= _tables(respace(table, respacing), f"out/{name}/respaced_{respacing}")
    return out


def run_ddpm_patch_split(case: Case, tensors: Tensors) -> Tensors:
    """Signal-to-noise splits: which model samples and which is trained where."""
    table = schedule(case["noise_schedule"], case.get("diffusion_steps", case.get("steps", 1000)))
    text = case["snr_splits"]
    splits = [float(v) for v in (re.split(r"[,\s]+", text) if isinstance(text, str) else text)]
    out = {"out/sampling_model_index": split_models(table.snr, splits), "out/snr": table.snr}
    for index in range(len(split_bounds(splits)) - 1):
        mask = split_mask(table.snr, splits, index)
        out[f"out/training_mask_split{index}"] = mask.to(torch.float32)
        weight = f"out/loss_weight_split{index}"
        shape = case["outputs"].get(weight, {"shape": [1]})["shape"]
        out[weight] = mask.to(torch.float32).mean().expand(shape)
    for name in case["outputs"]:
        found = re.fullmatch(r"out/(respaced_(.+))/(sampling_model_index|timestep_map)", name)
        if found:
            spaced = respace(table, found[2])
            out[f"out/{found[1]}/sampling_model_index"] = split_models(spaced.snr, splits)
            out[f"out/{found[1]}/timestep_map"] = spaced.timestep_map
    return out


def ddpm_losses(case: Case, tensors: Tensors, runs: dict[str, Any], repository: str) -> Tensors:
    """Training losses and p(x_{t-1} | x_t) of runs with official options ("patch" or "dit")."""
    out: Tensors = {}
    images, t, noise = tensors["in/x0"], tensors["in/t"].long(), tensors["in/noise"]
    for name, official in runs.items():
        spec = ddpm_spec(official, repository)
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


def run_ddpm_patch_loss(case: Case, tensors: Tensors) -> Tensors:
    """Patch Diffusion's training losses."""
    return ddpm_losses(case, tensors, case["runs"], "patch")


# Augmentation


def run_augment(case: Case, tensors: Tensors) -> Tensors:
    """EDM's augmentation with the stored random numbers, in the order in which they were drawn."""
    augmentation = Augmentation(AugmentationOptions(**case["constructor"]))
    images = tensors["in/images"]
    stored = iter(sorted(name for name in tensors if name.startswith("in/draw_")))
    columns: dict[str, list[Tensor]] = {"uniform": [], "normal": []}
    for stage in augmentation.stages:
        for kind, size in DRAWS[stage]:
            numbers = tensors[next(stored)].reshape(-1, len(images))
            if kind == "integer":
                columns["uniform"] += list((numbers + 0.5) / size)
            else:
                columns[kind] += list(numbers)
    none = images.new_zeros(len(images), 0)
    draws = Draws(*(torch.stack(columns[k], 1) if columns[k] else none for k in Draws._fields))
    images, labels = augmentation.apply(images, draws)
    return {"out/images": images, "out/labels": labels}


RUNNERS: dict[str, Callable[[Case, Tensors], Tensors]] = {
    "edmloss": run_edmloss,
    "vploss": run_vploss,
    "veloss": run_veloss,
    "stf": run_stf,
    "precond-edm": run_precond_edm,
    "precond-vp": run_precond_vp,
    "precond-ve": run_precond_ve,
    "precond-iddpm": run_precond_iddpm,
    "vpsde-uvit": run_vpsde_uvit,
    "vpsde-uvit-discrete": run_vpsde_uvit_discrete,
    "ddpm-schedule": run_ddpm_schedule,
    "ddpm-patch-split": run_ddpm_patch_split,
    "ddpm-patch-loss": run_ddpm_patch_loss,
    "augment": run_augment,
}
"""Kind of a golden case (its name without the last letter) -> the function that runs it."""
