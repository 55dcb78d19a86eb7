"""Formulations, targets and augmentation against the official codes' recorded outputs.

Every ``run_<kind>(case, tensors)`` takes a golden case (its JSON and its tensors) and returns the
outputs it describes, computed by this package; ``study parity`` compares. Where a case uses an
analytic stand-in for the network, the formula is the one in the case's notes.
"""

import math
import re
from collections.abc import Callable, Mapping
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

Case = Mapping[str, Any]
Tensors = dict[str, Tensor]


# EDM family: losses and stable targets


IDLE = {"D": 128, "N": 3072, "opts": None}
"""Arguments of the official VE loss that it stores and never uses."""


def expect(given: dict[str, Any], **wanted: Any) -> None:
    """Take settings out that have no other value here. Raises ``ValueError`` where they have."""
    for key, value in wanted.items():
        found = given.pop(key, value)
        if type(found) is not type(value) or found != value:
            raise ValueError(f"{key} {found!r} cannot be had here; it must be {value!r}")


def _edm_family(kind: str, given: dict[str, Any]) -> Preconditioned:
    """The formulation of an official constructor's arguments, all of which it must know."""
    if kind == "ve":
        expect(given, **IDLE)
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
    kind = case.get("augmentation", "none")
    if kind not in ("none", "mirror_odd"):
        raise ValueError(f"augmentation {kind!r} is unknown")
    return (images, None) if kind == "none" else mirror_odd(images)


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
    made = _edm_family(kind, dict(case["constructor"]))
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
    made = _edm_family("edm", dict(case["constructor"]))
    given, batch = tensors["in/reference_batch"], case["batch"]
    if case.get("rbatch", len(given)) != len(given):
        raise ValueError(f"rbatch is {case['rbatch']}, but in/reference_batch has {len(given)}")
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
    from study.backbones.songunet import SongUNet, check_filters

    inner, given = dict(case["inner_network"]), dict(case["constructor"])
    for key in [key for key in given if key not in OPTIONS[kind].model_fields]:
        name = {"img_channels": "in_channels"}.get(key, key)
        if name in inner and given.pop(key) != inner[name]:
            raise ValueError(f"{key} is not that of the inner network")
    expect(given, use_fp16=False, model_type="SongUNet")
    network = SongUNet.from_official(**inner)
    prefix = "weights/model."
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    check_filters(network, weights)
    network.load_state_dict(weights)
    network.eval()
    made = _edm_family(kind, given)
    for key, value in case.get("resulting_attributes", {}).items():
        ours = getattr(made, key) if key.startswith("sigma_m") else getattr(made.options, key)
        # Official limits near 0 come from float32, which sees few different noise levels there.
        limits = key.startswith("sigma_m") and kind in ("vp", "iddpm")
        if not math.isclose(ours, float(value), rel_tol=0.05 if limits else 1e-6):
            raise ValueError(f"resulting_attributes.{key} is {value}, ours {ours}")
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


def _uvit_stand_in(last: float) -> Callable[..., Tensor]:
    """0.8 x - 0.3 (model time) / last + 0.1 label."""

    def network(x: Tensor, noise: Tensor, label: Tensor | None) -> Tensor:
        out = 0.8 * x - 0.3 * column(noise, x) / last
        return out if label is None else out + 0.1 * column(label, x)

    return network


def run_vpsde_uvit(case: Case, tensors: Tensors) -> Tensors:
    """Continuous VP SDE: LSimple, conversions, and the functions of time (in float32)."""
    # The model's text names its class and loss: "VPSDE, LSimple loss, noise_pred".
    words, given = case["model"].lower(), dict(case.get("constructor") or {})
    found = [ours for ours, theirs in (("x0", "x0_pred"), ("eps", "noise_pred")) if theirs in words]
    if len(found) != 1 or "lsimple" not in words or "vpsde" not in words:
        raise ValueError(f"model {case['model']!r} is none of VPSDE's, with LSimple")
    spec: dict[str, Any] = {"kind": "vpsde", "prediction": found[0]}
    cosine = "cosine" in words or "s" in given
    if cosine:
        spec |= {"schedule": "cosine"} | ({"cosine_s": given.pop("s")} if "s" in given else {})
    elif given.keys() <= {"beta_min", "beta_max"}:
        spec |= given
        given = {}
    if given:
        raise ValueError(f"the constructor has no argument {', '.join(sorted(given))}")
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


def _betas(case: Case) -> tuple[float, float, int]:
    """First and last beta and their number, from ``schedule``, with which a text must agree."""
    texts = [case["betas"]] if "betas" in case else []
    found = [
        tuple(float(number) for number in re.findall(r"\d+(?:\.\d+)?", text))
        for text in texts
        if "linear in the square root" in text
    ]
    if "schedule" in case:
        given = dict(case["schedule"])
        found.append((given.pop("start"), given.pop("end"), given.pop("steps")))
        expect(given)
    if len(found) != len(texts) + ("schedule" in case) or len(set(found)) != 1:
        raise ValueError("betas and schedule do not say the same, or not what can be had here")
    start, end, steps = found[0]
    return start, end, int(steps)


def run_vpsde_uvit_discrete(case: Case, tensors: Tensors) -> Tensors:
    """Stable-Diffusion schedule: LSimple and the tables."""
    words = case["model"].lower()
    if "lsimple" not in words or "discrete" not in words:
        raise ValueError(f"model {case['model']!r} is not the discrete one, with LSimple")
    start, end, steps = _betas(case)
    made = formulation(
        {
            "kind": "vpsde",
            "schedule": "discrete",
            "prediction": "x0" if "x0_pred" in words else "eps",
            "beta_start": start,
            "beta_end": end,
            "steps": steps,
        }
    )
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


def run_ddpm_patch_split(case: Case, tensors: Tensors) -> Tensors:
    """Signal-to-noise splits: which model samples and which is trained where."""
    table = schedule(case["noise_schedule"], case.get("diffusion_steps", case.get("steps", 1000)))
    text = case["snr_splits"]
    splits = [float(v) for v in (re.split(r"[,\s]+", text) if isinstance(text, str) else text)]
    if case.get("allow_const", True) is not True:
        raise ValueError("allow_const must be true: the weight of a split is a constant")
    models = split_models(table.snr, splits)
    out = {"out/sampling_model_index": models, "out/snr": table.snr}
    for index in range(len(split_bounds(splits)) - 1):
        mask = split_mask(table.snr, splits, index)
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
            out[f"out/{found[1]}/sampling_model_index"] = split_models(spaced.snr, splits)
            out[f"out/{found[1]}/timestep_map"] = spaced.timestep_map
    return out


def ddpm_losses(case: Case, tensors: Tensors, runs: dict[str, Any], repository: str) -> Tensors:
    """Training losses and p(x_{t-1} | x_t) of runs with official options ("patch" or "dit")."""
    out: Tensors = {}
    images, t, noise = tensors["in/x0"], tensors["in/t"].long(), tensors["in/noise"]
    for name, official in runs.items():
        spec = ddpm_spec(official, repository)
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
