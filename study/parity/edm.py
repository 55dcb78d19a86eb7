"""EDM's and STF's losses, targets, preconditioning, augmentation and samplers.

Where a case uses an analytic stand-in for the network, here and in ``vpsde`` and ``ddpm``, the
formula is the one in the case's notes.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from study.diffusion import formulation
from study.diffusion.augmentation import DRAWS, Augmentation, AugmentationOptions, Draws
from study.diffusion.base import Loss, column
from study.diffusion.edm import Preconditioned
from study.diffusion.samplers import sampler
from study.diffusion.samplers.base import StoredNoise
from study.diffusion.stf import StableTarget, reference_batch
from study.parity import official
from study.parity.case import Case, Tensors, expect
from study.parity.mixture import Mixture
from study.parity.networks import check_filters, weights_of
from study.spec.formulations import FORMULATIONS

IDLE = {"D": 128, "N": 3072, "opts": None}
"""Arguments of the official VE loss that it stores and never uses."""


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


def loss(kind: str, case: Case, tensors: Tensors) -> Tensors:
    """A loss of the EDM family."""
    made = _edm_family(kind, dict(case["constructor"]))
    images, augment_labels = _augmented(case, tensors["in/images"])
    label = _class_index(tensors, len(images))
    draw, noise = tensors["in/level_draw"].flatten(), tensors["in/unit_noise"]
    found = made.denoiser_loss(
        _stand_in(case), images, draw, noise, label, augment_labels=augment_labels
    )
    return {
        "out/augmented_images": images,
        "out/sigma": found.sigma,
        "out/lambda": made.weight(found.sigma),
        "out/loss": found.elements,
        "out/net_input": found.noisy,
        "out/denoised": found.prediction,
        "out/backward_scalar": found.per_sample.mean(),
    }


def stable_target(case: Case, tensors: Tensors) -> Tensors:
    """Stable targets and the EDM loss with and without them."""
    made = _edm_family("edm", dict(case["constructor"]))
    given, batch = tensors["in/reference_batch"], case["batch"]
    if case.get("rbatch", len(given)) != len(given):
        raise ValueError(f"rbatch is {case['rbatch']}, but in/reference_batch has {len(given)}")
    images, augment_labels = _augmented(case, given[:batch])
    reference = reference_batch(images, _augmented(case, given[batch:])[0])
    target = StableTarget(reference)

    def with_target(stable: StableTarget | None) -> Loss:
        return made.denoiser_loss(
            _stand_in(case),
            images,
            tensors["in/level_draw"].flatten(),
            tensors["in/unit_noise"],
            _class_index(tensors, batch),
            stable,
            augment_labels=augment_labels,
        )

    plain, stable = with_target(None), with_target(target)
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


def precond(kind: str, case: Case, tensors: Tensors) -> Tensors:
    """Preconditioning around a network."""
    inner, given = dict(case["inner_network"]), dict(case["constructor"])
    for key in [key for key in given if key not in FORMULATIONS[kind].model_fields]:
        name = {"img_channels": "in_channels"}.get(key, key)
        if name in inner and given.pop(key) != inner[name]:
            raise ValueError(f"{key} is not that of the inner network")
    expect(given, use_fp16=False, model_type="SongUNet")
    network = official.songunet(**inner)
    weights = weights_of(tensors, "weights/model.")
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


def augment(case: Case, tensors: Tensors) -> Tensors:
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


def samplers(kind: str, case: Case, tensors: Tensors) -> Tensors:
    """A sampler, on every run of the case."""
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
