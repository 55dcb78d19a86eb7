"""What cannot be together in a study: checks between its sections, before anything starts."""

import math
from typing import TYPE_CHECKING, Any

from study.files import UserError
from study.spec.backbones import FAMILIES
from study.spec.data import Dataset, Images
from study.spec.formulations import FormulationOptions
from study.spec.guidance import guidance_options
from study.spec.measuring import Classes, Guidance
from study.spec.run import KEPT, Spec
from study.spec.samplers import SamplerOptions
from study.spec.study import Study

if TYPE_CHECKING:
    from study.arms import Run, _Arm


def check_arm(study: Study, arm: "_Arm", spec: Spec) -> None:
    """Raise ``UserError`` where the settings of an arm do not go together."""
    _check_training(arm, spec)
    _check_network(arm.where, spec, *spec.shape)
    _check_machine(study, arm, spec)


def check_archive(runs: "dict[str, Run]", name: str, images: int, shape: tuple[int, int]) -> None:
    """Raise ``UserError`` where runs do not fit a converted data set.

    ``images`` and ``shape`` (resolution, channels) are those of the archive called ``name``.
    """
    for run in runs.values():
        if run.spec.dataset.name == name and run.checkpoint is None:
            _check_size(run.display, run.spec, images)
            _check_network(run.display, run.spec, *shape)


def _check_size(where: str, spec: Spec, images: int) -> None:
    """Raise ``UserError`` where a step needs more images than there are."""
    training, target, name = spec.training, spec.target, spec.dataset.name
    if training.batch > images:
        raise UserError(
            f"{where}: training.batch: {training.batch} images of a data set ({name}) of "
            f"{images}; take at most that many"
        )
    if spec.stable and target.reference > images:
        raise UserError(
            f"{where}: target stf({target.reference}): data set {name} has only {images} "
            f"images; take at most stf({images})"
        )


def _check_training(arm: "_Arm", spec: Spec) -> None:
    training, target, dataset = spec.training, spec.target, spec.dataset
    family, options = spec.backbone.family, spec.backbone.options
    if arm.checkpoint is not None:
        _check_checkpoint(arm, spec)
    else:
        if spec.stable and target.reference < training.batch:
            raise UserError(
                f"{arm.where}: target stf({target.reference}) has fewer reference images than "
                f"training.batch ({training.batch}); the batch is part of the reference"
            )
        if dataset.images is not None:
            _check_size(arm.where, spec, dataset.images)
        for model in spec.models:
            if model.warmup > model.steps:
                raise UserError(
                    f"{arm.where}: training.warmup: {model.warmup} steps of warm-up in a training "
                    f"of {model.steps} never come to the learning rate; take fewer"
                )
        _check_snapshots(arm, spec)
    if training.dropout and not options.has_dropout:
        raise UserError(
            f"{arm.where}: training.dropout: {family} has none; set it under "
            "backbones.<name>.training of those that have"
        )
    if training.conditional and not dataset.labels:
        raise UserError(f"{arm.where}: training.conditional needs dataset.labels: true")
    if training.label_dropout and not training.conditional:
        raise UserError(f"{arm.where}: training.label_dropout needs training.conditional: true")
    if training.label_dropout and options.drops_labels:
        raise UserError(
            f"{arm.where}: training.label_dropout: {options.drops_labels}; leave it out"
        )
    if training.label_dropout and options.no_null_label():
        raise UserError(f"{arm.where}: training.label_dropout: {options.no_null_label()}")
    _check_splits(arm, spec)
    if training.augment and not options.augmentable:
        takers = ", ".join(name for name, row in FAMILIES.items() if row.options.augmentable)
        raise UserError(
            f"{arm.where}: training.augment needs a network that takes augmentation labels "
            f"({takers}), not {family}"
        )


def _check_snapshots(arm: "_Arm", spec: Spec) -> None:
    kept = spec.training.snapshots
    if kept is not None and kept.at is not None and kept.at[-1] > spec.steps:
        raise UserError(
            f"{arm.where}: training.snapshots: step {kept.at[-1]} is beyond the end of a training "
            f"of {spec.steps} steps; take at most that many"
        )


def _check_network(where: str, spec: Spec, resolution: int | None, channels: int | None) -> None:
    problem = spec.backbone.options.problem(
        resolution=resolution,
        channels=channels,
        scaling=spec.skip_scaling,
        outputs=spec.formulation.output_multiplier,
    )
    if problem:
        raise UserError(f"{where}: {spec.backbone.family} with {spec.skip_scaling}: {problem}")


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


def _check_splits(arm: "_Arm", spec: Spec) -> None:
    listed = spec.training.models
    splits = getattr(spec.formulation, "splits", ())
    if splits and spec.formulation.split is not None:
        raise UserError(
            f"{arm.where}: formulation.split: samples need the models of all splits; leave it "
            "out, and the arm trains one for each"
        )
    if listed and not splits:
        raise UserError(f"{arm.where}: training.models belongs to formulation.splits")
    if not listed:
        return
    order = [model.split for model in listed]
    if sorted(order) != list(range(len(splits) + 1)):
        raise UserError(
            f"{arm.where}: training.models: {len(splits)} splits make {len(splits) + 1} models; "
            f"each of split 0 to {len(splits)} is to be there once, got {order}"
        )
    for number, model in enumerate(listed):
        if model.start is not None and model.start not in order[:number]:
            raise UserError(
                f"{arm.where}: training.models[{number}].start: the model of split "
                f"{model.start} does not come earlier in the list"
            )


def _check_checkpoint(arm: "_Arm", spec: Spec) -> None:
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
    if len(spec.formulation.parts) > 1:
        raise UserError(
            f"{arm.where}.checkpoint: a file holds one network, but formulation.splits needs "
            f"{len(spec.formulation.parts)}"
        )


def _check_machine(study: Study, arm: "_Arm", spec: Spec) -> None:
    machine, training = study.machine, spec.training
    if training.attention == "xformers" and not machine.gpus:
        raise UserError(
            f"{arm.where}: training.attention: xformers needs an NVIDIA GPU, but machine.gpus is "
            "0; use sdpa, or give the study a GPU"
        )
    problem = unshared(training.batch, machine.processes, machine.gpus)
    if problem and arm.checkpoint is None:
        raise UserError(f"{arm.where}: {problem}")


def check_measured(where: str, study: Study, protocol: str, run: "Run") -> None:
    """Raise ``UserError`` where a protocol cannot measure a run that it is to measure."""
    settings, spec = study.protocols[protocol], run.spec
    for guidance in settings.guidance:
        if guidance is not None:
            imported = spec.checkpoint is not None
            _check_guided(f"{where}.guidance", spec, guidance, imported)
    for sampler in settings.sampler:
        _check_sampler(f"{where}.sampler", sampler, spec.formulation)
    for labels in settings.labels:
        _check_labels(f"{where}.labels", labels, spec)
    if "digits" in settings.measured() and not spec.dataset.labels:
        raise UserError(
            f"{where}.extractors: digits trains a classifier and needs "
            f"{section(study, spec.dataset.name)}.labels: true"
        )


def _check_guided(where: str, spec: Spec, guidance: Guidance, imported: bool) -> None:
    guided = guidance_options(guidance.model_dump(mode="json"), spec.formulation)
    options, training = spec.backbone.options, spec.training
    if guided.evaluations == 1 or getattr(options, "context_dim", None) is not None:
        return
    if not training.conditional:
        raise UserError(f"{where} needs training.conditional: true")
    if options.no_null_label():
        raise UserError(f"{where}: {options.no_null_label()}")
    if not training.label_dropout and not options.drops_labels and not imported:
        raise UserError(f"{where}: the null label is never trained; set training.label_dropout")


def section(study: Study, name: str) -> str:
    """The key under which a study describes a data set."""
    return f"datasets.{name}" if study.datasets else "dataset"


def _check_dataset(where: str, dataset: Dataset) -> None:
    decoder, reference = dataset.decoder, dataset.reference
    if dataset.source == "latents" and decoder is None:
        raise UserError(
            f"{where}.decoder: missing; {dataset.name} holds latents, which become images only "
            "through an autoencoder (weights, scale)"
        )
    if dataset.source == "latents" and reference is None:
        raise UserError(
            f"{where}.reference: missing; {dataset.name} holds latents, and samples are "
            "measured against images: name a data set of images"
        )
    if decoder is not None and dataset.source not in ("latents", "archive"):
        raise UserError(f"{where}.decoder: {dataset.name} holds images; leave it out")
    if reference is not None and reference.source == "latents":
        raise UserError(f"{where}.reference.source: samples are measured against images")


def _check_names(study: Study) -> None:
    """Raise ``UserError`` where one name of a data set stands for unlike ones."""
    known: dict[str, tuple[str, Images]] = {}
    for name, dataset in study.data.items():
        here = section(study, name)
        for where, one in ((here, dataset), (f"{here}.reference", dataset.reference)):
            if one is None:
                continue
            other, first = known.setdefault(one.name, (where, one))
            if first.settings != one.settings or first.path != one.path:
                raise UserError(
                    f"{where}.name: {one.name!r} is the name of {other}, with other settings; "
                    "choose another name"
                )


def check_protocols(study: Study) -> None:
    """Raise ``UserError`` where a study's data, samples and metrics do not go together."""
    for name, dataset in study.data.items():
        _check_dataset(section(study, name), dataset)
    _check_names(study)
    for name, protocol in study.protocols.items():
        for one in protocol.extractors:
            first = study.extractors[one.kind]
            if one != first:
                raise UserError(
                    f"protocols.{name}.extractors: {one.kind} has other options than elsewhere; a "
                    "study has one extractor of each kind"
                )


def _check_labels(where: str, labels: Any, spec: Spec) -> None:
    if labels != "data" and not spec.training.conditional:
        raise UserError(
            f"{where}: the network is told no class; set training.conditional: true, or leave "
            "labels out"
        )
    classes = spec.dataset.known_classes
    if isinstance(labels, Classes) and classes is not None and max(labels.classes) >= classes:
        raise UserError(
            f"{where}: {max(labels.classes)} is no class of data set {spec.dataset.name}, whose "
            f"classes are 0 to {classes - 1}"
        )


def _check_sampler(where: str, sampler: SamplerOptions, process: FormulationOptions) -> None:
    if hasattr(sampler, "sigmas") and process.kind in ("edm", "ve"):
        low, high = sampler.sigmas
        least, most = process.sigma_min, process.sigma_max or math.inf
        if max(low, least) >= min(high, most):
            raise UserError(
                f"{where}: noise levels {low:g} to {high:g} have nothing "
                f"in common with the formulation's {least:g} to {most:g}"
            )
    if hasattr(sampler, "check"):
        try:
            sampler.check(process.discrete_steps)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
