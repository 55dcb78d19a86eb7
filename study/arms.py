"""From a study to its runs: resolved specs and the names of their folders.

A run's name is a readable slug and eight hex digits of a hash of its settings alone. The hash
leaves out defaults, so a new option with its default keeps every old name, and it leaves out what
cannot change numbers (``Study.machine``, paths, display names, notes). No heavy imports.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from pydantic import BaseModel, Field

from study.backbones import FAMILIES, family
from study.config import (
    Arm,
    BackboneEntry,
    Checkpoint,
    Dataset,
    Formulation,
    Grid,
    Model,
    Probe,
    SkipScaling,
    SplitModel,
    Study,
    Target,
    Training,
    check,
    leaves,
)
from study.diffusion.samplers.options import discrete_steps, guidance_options
from study.diffusion.samplers.options import options as sampler_options
from study.files import UserError, canonical_json

RUN_PATTERN = r"[A-Za-z0-9._-]+-s\d+-[0-9a-f]{8}"
"""What a run's folder name looks like."""

NOT_SETTINGS = {"path", "on_error", "note"}
"""Keys of the data set that say where it lies or what to print, not what it is."""


UNTRAINED: dict[str, Any] = {"steps": 0, "batch": 1, "lr": 0.0}
"""Training keys without a default, as a run has them whose weights are imported."""

KEPT = ("conditional", "augment", "precision", "attention")
"""Training keys that say something of an imported network as well."""


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    ``name`` is the folder; ``arm`` identifies the arm whatever its seed; ``display`` is the arm's
    name for people; ``grid`` says whether the arm comes from a grid; ``axes`` holds short texts
    for backbone, skip_scaling, target, formulation, training, seed. ``checkpoint`` is where the
    weights lie if they are imported instead of trained.
    """

    name: str
    arm: str
    display: str
    grid: bool
    axes: dict[str, str]
    spec: dict[str, Any]
    checkpoint: str | None = None

    def row(self) -> dict[str, Any]:
        """The run as the manifest lists it."""
        return {
            "run": self.name,
            "arm": self.arm,
            "display": self.display,
            "grid": self.grid,
            "axes": self.axes,
            "spec": self.spec,
        }


def _differences(value: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if defaults.get(key, ...) != item}


@cache
def _defaults(model: type[BaseModel]) -> dict[str, Any]:
    """Default values of a model's fields, in JSON form; required fields have none."""
    full = model.model_construct().model_dump(mode="json", warnings=False)
    return {key: full[key] for key, field in model.model_fields.items() if not field.is_required()}


def canonical(spec: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved spec that its name depends on: what differs from the defaults."""
    entry = spec["backbone"]
    model = family(entry["family"]).options
    kind = spec["formulation"]["kind"]
    method = spec["skip_scaling"]["method"]
    scaling = {"method": method}
    if method == "cs":
        scaling = dict(spec["skip_scaling"])
        scaling = {k: v for k, v in scaling.items() if v != "per_skip" and v is not None}
    target = dict(spec["target"]) if spec["target"]["kind"] == "stf" else {"kind": "dsm"}
    from study.diffusion.options import OPTIONS

    parts = {
        "dataset": _differences(spec["dataset"], _defaults(Dataset)),
        "backbone": {
            "family": entry["family"],
            "options": _differences(entry["options"], _defaults(model) if model else {}),
            "noise_scale": entry["noise_scale"],
        },
        "skip_scaling": scaling,
        "target": target,
        "formulation": {
            "kind": kind,
            **_differences(
                {k: v for k, v in spec["formulation"].items() if k != "kind"},
                _defaults(OPTIONS[kind]),
            ),
        },
        "training": _differences(
            spec["training"], _defaults(Training) | (UNTRAINED if "checkpoint" in spec else {})
        ),
        "seeds": spec["seeds"],
    }
    if "checkpoint" in spec:
        parts["checkpoint"] = spec["checkpoint"]
    if entry["noise_scale"] == 1.0:
        del parts["backbone"]["noise_scale"]
    return parts


def with_defaults(model: type[BaseModel], section: dict[str, Any]) -> dict[str, Any]:
    """A section in JSON form with the defaults of its model filled in."""
    return {**_defaults(model), **section}


SECTIONS = ("dataset", "backbone", "skip_scaling", "target", "formulation", "training", "seeds")


class _Backbone(Model):
    family: str
    options: dict[str, Any] = Field({})
    noise_scale: float = Field(1.0, gt=0)


class _Seeds(Model):
    data: int = 0
    init: int = 0
    noise: int = 0


def _section(model: type[BaseModel], parts: dict[str, Any], name: str) -> dict[str, Any]:
    return check(model, parts[name], f"spec.{name}.").model_dump(mode="json")


def placed(dataset: dict[str, Any], path: str = "-") -> dict[str, Any]:
    """The section with a ``path`` where it needs one: a spec does not say where things lie."""
    return dataset if dataset.get("source") == "digits" else {"path": path, **dataset}


def complete(parts: dict[str, Any]) -> dict[str, Any]:
    """The resolved spec that ``canonical`` made ``parts`` of; a resolved spec stays as it is.

    So a stage may be given what differs from the defaults, and a spec from before an option
    existed gets the option's default. Raises ``UserError`` for anything that is no spec.
    """
    if not isinstance(parts, dict):
        raise UserError(f"spec: expected an object of sections; got {type(parts).__name__}")
    for section in SECTIONS:
        if section not in parts:
            raise UserError(f"spec: section {section!r} is missing; study.json holds whole specs")
    for section in parts:
        if section not in (*SECTIONS, "checkpoint"):
            raise UserError(f"spec.{section}: unknown; allowed: {', '.join(SECTIONS)}, checkpoint")
    for section in ("dataset", "training", *(["checkpoint"] if "checkpoint" in parts else [])):
        if not isinstance(parts[section], dict):
            raise UserError(f"spec.{section}: expected an object")
    entry = check(_Backbone, parts["backbone"], "spec.backbone.")
    kind = family(entry.family)
    options = entry.options
    if kind.options is not None:
        options = check(kind.options, options, "spec.backbone.options.").model_dump(mode="json")
    dataset = check(Dataset, placed(parts["dataset"]), "spec.dataset.").model_dump(mode="json")
    imported = {}
    training, untrained = parts["training"], {}
    if "checkpoint" in parts:
        check(Checkpoint, {"path": "-"} | parts["checkpoint"], "spec.checkpoint.")
        imported = {"checkpoint": parts["checkpoint"]}
        untrained = UNTRAINED
        training = training | {"steps": 1, "batch": 1, "lr": 1.0}
    trained = check(Training, training, "spec.training.").model_dump(mode="json")
    return {
        "dataset": {key: value for key, value in dataset.items() if key not in NOT_SETTINGS},
        "backbone": {
            "family": entry.family,
            "options": options,
            "noise_scale": entry.noise_scale,
        },
        "skip_scaling": _section(SkipScaling, parts, "skip_scaling"),
        "target": _section(Target, parts, "target"),
        "formulation": check(Formulation, parts["formulation"], "spec.formulation.").resolved(),
        "training": trained | untrained,
        "seeds": _section(_Seeds, parts, "seeds"),
        **imported,
    }


def probed(runs: dict[str, Run], probe: Probe) -> list[str]:
    """Names of the runs that a probe looks at; none for a probe of the data set or the study."""
    if probe.subject not in ("run", "arm"):
        return []
    seeds = probe.resolved()["seeds"]
    wanted = None if seeds is None else {str(seed) for seed in seeds}
    return [name for name, run in runs.items() if wanted is None or run.axes["seed"] in wanted]


def _check_probes(study: Study, runs: dict[str, Run]) -> None:
    """Raise ``UserError`` for a probe of seeds that no run has."""
    known = list(dict.fromkeys(run.axes["seed"] for run in runs.values()))
    for number, probe in enumerate(study.probes):
        for seed in probe.resolved().get("seeds") or ():
            if str(seed) not in known:
                raise UserError(
                    f"probes[{number}].seeds: no run has seed {seed}; there are {', '.join(known)}"
                )


def networks(runs: dict[str, Run]) -> list[dict[str, Any]]:
    """What the networks at initialisation depend on but scaling and seeds, each once, in order.

    However long the arms are trained, and towards which target.
    """
    found = {}
    for run in runs.values():
        spec = canonical(run.spec)
        kept = {key: spec[key] for key in ("dataset", "backbone", "formulation")}
        training = {k: v for k, v in spec["training"].items() if k in (*KEPT, "dropout")}
        whole = {**kept, "training": training, "target": {"kind": "dsm"}}
        found[canonical_json(whole)] = whole
    return [found[text] for text in sorted(found)]


def digest(content: Any) -> str:
    """Eight hex digits that stand for ``content``."""
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:8]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _seeds(seed: Any) -> tuple[str, dict[str, int]]:
    """Short text and the seed of every axis."""
    if isinstance(seed, int):
        return str(seed), {"data": seed, "init": seed, "noise": seed}
    seeds = {axis: seed.get(axis, 0) for axis in ("data", "init", "noise")}
    return ".".join(str(value) for value in seeds.values()), seeds


def resolve_backbone(
    study: Study, name: str, options: dict[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The spec's backbone section and the training keys that belong to the entry ``name``."""
    entry = study.backbones.get(name)
    if entry is None:
        if name not in FAMILIES:
            known = ", ".join(dict.fromkeys([*study.backbones, *FAMILIES]))
            raise UserError(f"{where}: {name!r} is no backbone of this study; allowed: {known}")
        entry = BackboneEntry()
    if (entry.family or name) not in FAMILIES:
        raise UserError(
            f"backbones.{name}.family: {entry.family or name!r} is unknown; allowed: "
            f"{', '.join(FAMILIES)}"
        )
    kind = family(entry.family or name)
    presets = kind.presets or {}
    if entry.preset is not None and entry.preset not in presets:
        raise UserError(
            f"backbones.{name}.preset: {entry.preset!r} is unknown; allowed: {', '.join(presets)}"
        )
    preset = presets.get(entry.preset, {}) if entry.preset else {}
    merged = {**preset, **entry.options, **options}
    if kind.options is not None:
        prefix = f"{where}.options." if options else f"backbones.{name}.options."
        merged = check(kind.options, merged, prefix).model_dump(mode="json")
    section = {
        "family": entry.family or name,
        "options": merged,
        "noise_scale": entry.noise_scale,
    }
    return section, entry.training


@dataclass(frozen=True)
class _Arm:
    """An arm before its seeds: everything a run needs but them.

    ``where`` is its place in the study, ``training_at`` that of its training keys.
    """

    where: str
    training_at: str
    name: str | None
    grid: bool
    backbone: str
    options: dict[str, Any]
    scaling: SkipScaling
    target: Target
    formulation: Formulation
    training: dict[str, Any]
    seeds: tuple[Any, ...]
    checkpoint: Checkpoint | None = None


def _arms(study: Study) -> Iterator[_Arm]:
    for number, grid in enumerate(study.grid):
        where = "grid" if len(study.grid) == 1 else f"grid[{number}]"
        yield from _grid_arms(study, grid, where)
    for number, arm in enumerate(study.arms):
        yield _extra_arm(study, arm, f"arms[{number}]")


def _grid_arms(study: Study, grid: Grid, where: str) -> Iterator[_Arm]:
    axes = (
        grid.backbone,
        grid.formulation or (study.formulation,),
        grid.training,
        grid.skip_scaling,
        grid.target,
    )
    numbers = {id(keys): number for number, keys in enumerate(grid.training)}
    for backbone, formulation, training, scaling, target in itertools.product(*axes):
        yield _Arm(
            where=f"{where}.backbone",
            training_at=f"{where}.training[{numbers[id(training)]}]",
            name=None,
            grid=True,
            backbone=backbone,
            options={},
            scaling=scaling,
            target=target,
            formulation=formulation,
            training=training,
            seeds=grid.seed or study.seed,
        )


def _extra_arm(study: Study, arm: Arm, where: str) -> _Arm:
    return _Arm(
        where=where,
        training_at=f"{where}.training",
        name=arm.name,
        grid=False,
        backbone=arm.backbone,
        options=arm.options,
        scaling=arm.skip_scaling,
        target=arm.target,
        formulation=arm.formulation or study.formulation,
        training=arm.training,
        # Weights that are there already are the same for every seed of training.
        seeds=arm.seed or ((0,) if arm.checkpoint else study.seed),
        checkpoint=arm.checkpoint,
    )


def _short(options: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, dict):
            return f"({_short(value)})"
        return f"{value:g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{key}={text(value)}" for key, value in sorted(options.items()))


def _channels(dataset: dict[str, Any]) -> int | None:
    """Colour channels of the archive where the settings fix them."""
    if dataset.get("channels") is not None:  # not in specs of older runs
        return dataset["channels"]
    if dataset["source"] == "digits" and dataset["color"] != "rgb":
        return 1
    if dataset["source"] in ("latents", "archive") or dataset["color"] == "keep":
        return None
    return 1 if dataset["color"] == "grey" else 3


IMAGES = {
    ("digits", "train"): 1797,
    ("digits", "all"): 1797,
    ("cifar10", "train"): 50_000,
    ("cifar10", "test"): 10_000,
    ("cifar10", "all"): 60_000,
}
"""Images of sources that are always the same."""


def images_of(dataset: dict[str, Any]) -> int | None:
    """Images that a spec's data set has; ``None`` where its source decides."""
    known = IMAGES.get((dataset["source"], dataset["split"] or "train"))
    return known and min(known, dataset["max_images"] or known)


def image_shape(dataset: dict[str, Any]) -> tuple[int | None, int | None]:
    """Resolution and channels that a spec's data set fixes; ``None`` where its images decide."""
    resolution = dataset["resolution"]
    if resolution is None and dataset["source"] == "digits":
        resolution = 8
    if resolution is None and dataset["source"] == "cifar10":
        resolution = 32
    return resolution, _channels(dataset)


def same_factors(scaling: SkipScaling, shapes: list[tuple[int, int]]) -> SkipScaling:
    """The plainest scaling that is the same on long skips of these widths and levels.

    On skips that all differ in shape ``ls`` shares no gate; of constant scalings the powers of
    kappa may all be 0, or 0, 1, 2, ... as those of ``per_skip``.
    """
    if scaling.method == "ls_unshared" and len(set(shapes)) == len(shapes):
        return SkipScaling(method="ls")
    if scaling.method != "cs":
        return scaling
    count = len(shapes)
    ranks = {level: rank for rank, level in enumerate(dict.fromkeys(level for _, level in shapes))}
    powers = {
        "per_skip": list(range(count)),
        "per_level": [ranks[level] for _, level in shapes],
        "normalised": [(scaling.innermost or 0) * i / max(count - 1, 1) for i in range(count)],
    }
    if not any(powers[scaling.exponent]):
        return SkipScaling(method="none")
    if powers[scaling.exponent] == powers["per_skip"]:
        return SkipScaling(method="cs", kappa=scaling.kappa)
    return scaling


def _check_size(where: str, spec: dict[str, Any], images: int) -> None:
    """Raise ``UserError`` where a step needs more images than there are."""
    training, target, name = spec["training"], spec["target"], spec["dataset"]["name"]
    if training["batch"] > images:
        raise UserError(
            f"{where}: training.batch: {training['batch']} images of a data set ({name}) of "
            f"{images}; take at most that many"
        )
    if target["kind"] == "stf" and target["reference"] > images:
        raise UserError(
            f"{where}: target stf({target['reference']}): data set {name} has only {images} "
            f"images; take at most stf({images})"
        )


def check_archive(runs: dict[str, Run], name: str, images: int, shape: tuple[int, int]) -> None:
    """Raise ``UserError`` where runs do not fit a converted data set.

    ``images`` and ``shape`` (resolution, channels) are those of the archive called ``name``.
    """
    for run in runs.values():
        if run.spec["dataset"]["name"] == name and run.checkpoint is None:
            _check_size(run.display, run.spec, images)
            _check_network(run.display, run.spec, *shape)


def _check_combination(arm: _Arm, spec: dict[str, Any]) -> None:
    training, target, dataset = spec["training"], spec["target"], spec["dataset"]
    entry = spec["backbone"]
    if arm.checkpoint is not None:
        _check_checkpoint(arm, spec)
    elif target["kind"] == "stf" and target["reference"] < training["batch"]:
        raise UserError(
            f"{arm.where}: target stf({target['reference']}) has fewer reference images than "
            f"training.batch ({training['batch']}); the batch is part of the reference"
        )
    images = images_of(dataset)
    if images is not None and arm.checkpoint is None:
        _check_size(arm.where, spec, images)
    for model in () if arm.checkpoint else models(spec):
        if model["warmup"] > model["steps"]:
            raise UserError(
                f"{arm.where}: training.warmup: {model['warmup']} steps of warm-up in a training "
                f"of {model['steps']} never come to the learning rate; take fewer"
            )
    if training["dropout"] and entry["family"] in ("uvit", "udit"):
        raise UserError(
            f"{arm.where}: training.dropout: {entry['family']} has none; set it under "
            "backbones.<name>.training of those that have"
        )
    if training["conditional"] and not dataset["labels"]:
        raise UserError(f"{arm.where}: training.conditional needs dataset.labels: true")
    if training["label_dropout"] and not training["conditional"]:
        raise UserError(f"{arm.where}: training.label_dropout needs training.conditional: true")
    if training["label_dropout"] and entry["family"] == "udit":
        raise UserError(
            f"{arm.where}: training.label_dropout: U-DiT drops labels itself, with its option "
            "class_dropout_prob; leave it out"
        )
    if training["label_dropout"] and not _has_null_label(entry):
        raise UserError(f"{arm.where}: training.label_dropout: {_NO_NULL[entry['family']]}")
    _check_splits(arm, spec)
    if training["augment"] and entry["family"] not in ("ddpmpp", "ncsnpp"):
        raise UserError(
            f"{arm.where}: training.augment needs a network that takes augmentation labels "
            f"(ddpmpp, ncsnpp), not {entry['family']}"
        )
    _check_network(arm.where, spec, *image_shape(dataset))


def _check_network(
    where: str, spec: dict[str, Any], resolution: int | None, channels: int | None
) -> None:
    from study.diffusion.options import OPTIONS

    entry, scaling = spec["backbone"], SkipScaling(**spec["skip_scaling"])
    model = family(entry["family"]).options
    if model is None:
        return
    process = OPTIONS[spec["formulation"]["kind"]].model_validate(spec["formulation"])
    problem = model.model_validate(entry["options"]).problem(
        resolution=resolution,
        channels=channels,
        scaling=scaling.method,
        outputs=process.output_multiplier,
    )
    if problem:
        raise UserError(f"{where}: {entry['family']} with {scaling}: {problem}")


_NO_NULL = {
    "uvit": "the network has no null label; set its option null_label: true",
    "udit": "the network has no null label; set its option class_dropout_prob above 0",
    "patch_unet": "the network has no null label; set its option classifier_free: true",
}


def _has_null_label(entry: dict[str, Any]) -> bool:
    """Whether the network, if it has classes, has a label for no class."""
    key = {"uvit": "null_label", "udit": "class_dropout_prob", "patch_unet": "classifier_free"}
    option = key.get(entry["family"])
    return option is None or bool(entry["options"][option])


def models(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """How the networks of a run are trained, one after another.

    Each has split (its index, ``None`` where one network serves all noise levels), start (the
    split whose averaged weights it starts from, or ``None``), steps, lr, betas, warmup.
    """
    training, formulation = spec["training"], spec["formulation"]
    own = {key: training[key] for key in ("steps", "lr", "betas", "warmup")}
    if not formulation.get("splits") or formulation["split"] is not None:
        return [{"split": formulation.get("split"), "start": None, **own}]
    listed = training["models"] or [{"split": k} for k in range(len(formulation["splits"]) + 1)]
    return [
        {"start": None, **own, **{key: item for key, item in model.items() if item is not None}}
        for model in listed
    ]


def unsupported(spec: dict[str, Any]) -> str | None:
    """Why a run of this spec cannot be trained or sampled by the stages as they are, if so."""
    if spec["backbone"]["options"].get("context_dim") is not None:
        return (
            "backbones: context_dim makes a network that is told a text, but data set archives "
            "hold no texts and no text features; such a study can be planned, not run"
        )
    return None


def unshared(batch: int, processes: int, gpus: int) -> str | None:
    """Why so many processes on so many GPUs (0: the CPU) cannot share a batch, if so."""
    if gpus and processes > gpus:
        return (
            f"machine.processes: {processes} processes need a GPU each, but machine.gpus is "
            f"{gpus}; take at most as many processes as GPUs"
        )
    if batch % processes:
        return (
            f"training.batch: {batch} images cannot be shared by {processes} processes; "
            "take a multiple"
        )
    return None


def training_steps(spec: dict[str, Any]) -> int:
    """Optimiser steps of a run, over all of its networks."""
    return sum(model["steps"] for model in models(spec))


def _check_splits(arm: _Arm, spec: dict[str, Any]) -> None:
    formulation, listed = spec["formulation"], spec["training"]["models"]
    splits = formulation.get("splits") or []
    if splits and formulation["split"] is not None:
        raise UserError(
            f"{arm.where}: formulation.split: samples need the models of all splits; leave it "
            "out, and the arm trains one for each"
        )
    if listed and not splits:
        raise UserError(f"{arm.where}: training.models belongs to formulation.splits")
    if not listed:
        return
    order = [model["split"] for model in listed]
    if sorted(order) != list(range(len(splits) + 1)):
        raise UserError(
            f"{arm.where}: training.models: {len(splits)} splits make {len(splits) + 1} models; "
            f"each of split 0 to {len(splits)} is to be there once, got {order}"
        )
    for number, model in enumerate(listed):
        if model["start"] is not None and model["start"] not in order[:number]:
            raise UserError(
                f"{arm.where}: training.models[{number}].start: the model of split "
                f"{model['start']} does not come earlier in the list"
            )


def _check_checkpoint(arm: _Arm, spec: dict[str, Any]) -> None:
    idle = [key for key in arm.training if key not in KEPT]
    if idle:
        raise UserError(
            f"{arm.where}.training.{idle[0]} cannot act: the weights of a checkpoint are not "
            "trained; leave it out"
        )
    if arm.target.kind != "dsm":
        raise UserError(
            f"{arm.where}.target cannot act: the weights of a checkpoint are not trained; leave "
            "it out"
        )
    if len(arm.seeds) > 1:
        raise UserError(
            f"{arm.where}.seed: a checkpoint is one trained network, not {len(arm.seeds)}; "
            "give it one seed, or none"
        )
    if spec["formulation"].get("splits"):
        raise UserError(
            f"{arm.where}.checkpoint: a file holds one network, but formulation.splits needs "
            f"{len(spec['formulation']['splits']) + 1}"
        )


def _check_machine(study: Study, arm: _Arm, spec: dict[str, Any]) -> None:
    machine, training = study.machine, spec["training"]
    if training["attention"] == "xformers" and not machine.gpus:
        raise UserError(
            f"{arm.where}: training.attention: xformers needs an NVIDIA GPU, but machine.gpus is "
            "0; use sdpa, or give the study a GPU"
        )
    problem = unshared(training["batch"], machine.processes, machine.gpus)
    if problem and arm.checkpoint is None:
        raise UserError(f"{arm.where}: {problem}")


def _check_guidance(study: Study, arm: _Arm, spec: dict[str, Any]) -> None:
    guidance = study.generation.guidance
    if guidance is None:
        return
    options = guidance_options(guidance.model_dump(mode="json"), spec["formulation"])
    entry, training = spec["backbone"], spec["training"]
    where = f"{arm.where}: generation.guidance"
    if options.evaluations == 1 or entry["options"].get("context_dim") is not None:
        return
    if not training["conditional"]:
        raise UserError(f"{where} needs training.conditional: true")
    if not _has_null_label(entry):
        raise UserError(f"{where}: {_NO_NULL[entry['family']]}")
    if not training["label_dropout"] and entry["family"] != "udit" and arm.checkpoint is None:
        raise UserError(f"{where}: the null label is never trained; set training.label_dropout")


def _check_latents(study: Study) -> None:
    dataset, decoder, reference = (
        study.dataset,
        study.generation.decoder,
        study.evaluation.reference,
    )
    if dataset.source == "latents" and decoder is None:
        raise UserError(
            f"generation.decoder: missing; {dataset.name} holds latents, which become images "
            "only through an autoencoder (weights, scale)"
        )
    if dataset.source == "latents" and reference is None:
        raise UserError(
            f"evaluation.reference: missing; {dataset.name} holds latents, and samples are "
            "measured against images: name a data set of images"
        )
    if decoder is not None and dataset.source not in ("latents", "archive"):
        raise UserError(f"generation.decoder: {dataset.name} holds images; leave it out")
    if reference is None:
        return
    if reference.source == "latents":
        raise UserError("evaluation.reference.source: samples are measured against images")
    settings = [one.model_dump(exclude=NOT_SETTINGS) for one in (dataset, reference)]
    if reference.name == dataset.name and settings[0] != settings[1]:
        raise UserError(
            f"evaluation.reference.name: {reference.name!r} is the data set of the study, with "
            "other settings; choose another name"
        )


def _check_protocols(study: Study) -> None:
    evaluation = study.evaluation
    _check_latents(study)
    if evaluation.extractor == "digits" and not study.dataset.labels:
        raise UserError(
            "evaluation.extractor: digits trains a classifier and needs dataset.labels: true"
        )
    if "is" in evaluation.metrics and evaluation.extractor == "pixels":
        raise UserError("evaluation.metrics: 'is' needs class logits, which pixels does not have")


def _check_steps(study: Study, arm: _Arm, spec: dict[str, Any]) -> None:
    """Raise ``UserError`` where the sampler cannot walk the steps of the arm's formulation."""
    sampler, process = sampler_options(study.generation.sampler.resolved()), spec["formulation"]
    if hasattr(sampler, "sigmas") and process["kind"] in ("edm", "ve"):
        low, high = sampler.sigmas
        least, most = process["sigma_min"], process["sigma_max"] or math.inf
        if max(low, least) >= min(high, most):
            raise UserError(
                f"{arm.where}: generation.sampler: noise levels {low:g} to {high:g} have nothing "
                f"in common with the formulation's {least:g} to {most:g}"
            )
    if hasattr(sampler, "check"):
        try:
            sampler.check(discrete_steps(process))
        except UserError as error:
            raise UserError(f"{arm.where}: generation.sampler: {error}") from None


def _training(study: Study, arm: _Arm, entry: dict[str, Any]) -> dict[str, Any]:
    """The training section of an arm: the study's, then the backbone's, then its own keys."""
    whole = {**study.training.model_dump(mode="json"), **entry, **arm.training}
    try:
        return check(Training, whole).model_dump(mode="json")
    except UserError as error:
        lines = []
        for line in str(error).splitlines():
            key = re.match(r"\w*", line)[0]
            if key in arm.training:
                line = f"{arm.training_at}.{line}"
            elif key in entry:
                line = f"backbones.{arm.backbone}.training.{line}"
            else:
                line = f"training.{line}"
            lines.append(line)
        raise UserError("\n".join(lines)) from None


def _normal_models(training: dict[str, Any], splits: list[float]) -> list[dict[str, Any]]:
    """``training.models`` without what it repeats; empty where it says what would be anyway."""
    listed = [
        {key: None if training.get(key, ...) == value else value for key, value in model.items()}
        for model in training["models"]
    ]
    nothing = dict.fromkeys(SplitModel.model_fields)
    same = [{**nothing, "split": split} for split in range(len(splits) + 1)]
    return [] if listed == same else listed


class _Names:
    """The display names of arms: one for each setting, one setting for each."""

    def __init__(self) -> None:
        self.given: dict[str, tuple[str, str]] = {}
        self.places: dict[str, str] = {}
        self.repeated: dict[str, str] = {}

    def add(self, arm: _Arm, identity: str, known: bool) -> None:
        """Note where the arm is described; ``known``: a run of it is there already."""
        if arm.name is not None:
            name, where = self.given.setdefault(identity, (arm.name, arm.where))
            if name != arm.name:
                raise UserError(
                    f"{arm.where}.name: {arm.name!r} has the settings of {where} ({name!r}); one "
                    "setting has one name, so leave one of them out"
                )
            for other, (name, where) in self.given.items():
                if name == arm.name and other != identity:
                    raise UserError(
                        f"{arm.where}.name: {name!r} is the name of {where}, whose settings are "
                        "others; choose another name"
                    )
        first = self.places.setdefault(identity, arm.where)
        if known and (arm.name is None or not first.startswith("grid")):
            self.repeated.setdefault(identity, first)


def _told_apart(found: dict[str, Run], named: set[str]) -> dict[str, Run]:
    """The runs with what differs added to display names that several arms would share.

    Settings at their defaults are not shown.
    """
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for run in found.values():
        if run.arm not in named:
            settings = leaves({**canonical(run.spec), "seeds": None})
            groups.setdefault(run.display, {})[run.arm] = settings
    more: dict[str, str] = {}
    for arms in groups.values():
        keys = list(dict.fromkeys(key for settings in arms.values() for key in settings))
        apart = [key for key in keys if len({repr(one.get(key)) for one in arms.values()}) > 1]
        for arm, settings in arms.items():
            own = [(key.rpartition(".")[2], settings[key]) for key in apart if key in settings]
            more[arm] = "".join(f" · {key}={value}" for key, value in own)
    return {
        name: replace(run, display=run.display + more.get(run.arm, ""))
        for name, run in found.items()
    }


def runs(study: Study) -> dict[str, Run]:
    """All runs of a study by folder name, grid first, in the order of the configuration.

    Arms that resolve to the same settings are one arm (``remarks`` tells which); a name given to
    one of them is its name. Raises ``UserError`` for names and combinations that cannot be.
    """
    return _resolve(study)[0]


def remarks(study: Study) -> list[str]:
    """What a study should know of its arms: a line for each that is another one's twin."""
    return _resolve(study)[1]


def _resolve(study: Study) -> tuple[dict[str, Run], list[str]]:
    _check_protocols(study)
    if not study.grid and not study.arms:
        raise UserError("grid: the study has neither a grid nor arms; nothing would run")
    ours = study.training.model_dump(mode="json")
    for name in study.backbones:
        _, training = resolve_backbone(study, name, {}, f"backbones.{name}")
        check(Training, {**ours, **training}, f"backbones.{name}.training.")
    dataset = study.dataset.model_dump(mode="json", exclude=NOT_SETTINGS)
    backbones: dict[str, Any] = {}
    trainings: dict[str, dict[str, Any]] = {}
    result: dict[str, Run] = {}
    names, lines = _Names(), []
    for arm in _arms(study):
        key = json.dumps([arm.backbone, arm.options])
        if key not in backbones:
            backbones[key] = resolve_backbone(study, arm.backbone, arm.options, arm.where)
        section, entry_training = backbones[key]
        key = json.dumps([entry_training, arm.training])
        if key not in trainings:
            trainings[key] = _training(study, arm, entry_training)
        scaling = _plain_scaling(arm, section, lines)
        formulation = arm.formulation.resolved()
        spec = {
            "dataset": dataset,
            "backbone": section,
            "skip_scaling": scaling.model_dump(mode="json"),
            "target": arm.target.model_dump(mode="json"),
            "formulation": formulation,
            "training": trainings[key],
        }
        _check_combination(arm, spec)
        _check_machine(study, arm, spec)
        _check_guidance(study, arm, spec)
        _check_steps(study, arm, spec)
        if spec["training"]["models"]:
            listed = _normal_models(spec["training"], formulation["splits"])
            spec["training"] = {**spec["training"], "models": listed}
        if arm.checkpoint is not None:
            kept = {key: spec["training"][key] for key in KEPT}
            spec["training"] = {**_defaults(Training), **UNTRAINED, **kept}
            spec["checkpoint"] = arm.checkpoint.identity()
        axes = {
            "backbone": arm.backbone + (f"({_short(arm.options)})" if arm.options else ""),
            "skip_scaling": str(scaling),
            "target": arm.target.kind,
            "formulation": arm.formulation.kind,
            "training": _short(arm.training),
        }
        slug = "-".join([section["family"].replace("_", "-"), _slug(str(scaling)), arm.target.kind])
        parts = canonical({**spec, "seeds": None})
        del parts["seeds"]
        identity = f"{slug}-{digest(parts)}"
        path = arm.checkpoint.path if arm.checkpoint else None
        extra = [axes["training"]] if axes["training"] else []
        extra += [arm.checkpoint.label] if arm.checkpoint else []
        display = " · ".join([axes["backbone"], axes["skip_scaling"], axes["target"], *extra])
        for seed in arm.seeds:
            short, seeds = _seeds(seed)
            name = f"{slug}-s{seeds['init']}-{digest({**parts, 'seeds': seeds})}"
            former = result.get(name)
            if former is not None and former.checkpoint != path:
                raise UserError(
                    f"{arm.where}.checkpoint: {path} and {former.checkpoint} have the same name "
                    "and settings; give them names, or their sha256"
                )
            names.add(arm, identity, former is not None and scaling == arm.scaling)
            if former is None:
                result[name] = Run(
                    name=name,
                    arm=identity,
                    display=display,
                    grid=arm.grid,
                    axes={**axes, "seed": short},
                    spec={**spec, "seeds": seeds},
                    checkpoint=path,
                )
    _check_probes(study, result)
    result = _told_apart(result, set(names.given))
    for name, run in result.items():
        if run.arm in names.given:
            result[name] = replace(run, display=names.given[run.arm][0])
    twice = {run.arm: run.display for run in result.values() if run.arm in names.repeated}
    if twice:
        first, *more = twice.values()
        whose = f"{first} and {len(more)} more are" if more else f"{first} is"
        lines.append(f"{whose} described more than once, which makes one arm")
    return result, list(dict.fromkeys(lines))


def _plain_scaling(arm: _Arm, section: dict[str, Any], lines: list[str]) -> SkipScaling:
    """The arm's scaling as its backbone tells it apart; ``lines`` gets a word on a change."""
    model = family(section["family"]).options
    shapes = model.model_validate(section["options"]).skip_shapes() if model else None
    if shapes is None:
        return arm.scaling
    plain = same_factors(arm.scaling, shapes)
    if plain != arm.scaling:
        lines.append(
            f"{arm.backbone}: {arm.scaling} is {plain} on its long skips; the two are one arm"
        )
    return plain


def manifest(study: Study, all_runs: dict[str, Run]) -> dict[str, Any]:
    """What ``results/<study>/study.json`` holds: the resolved study and its runs."""
    return {
        "study": study.study,
        "config": study.model_dump(mode="json"),
        "runs": [run.row() for run in all_runs.values()],
    }
