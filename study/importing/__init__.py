"""Official checkpoints as runs of this project (``study import``, and arms with ``checkpoint``).

A file is read as data (``reading``), recognised by what it holds, and described by the module of
its network (``LAYOUTS``); then its weights are written as a finished training, which ``study
generate`` and ``study evaluate`` take like any other.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from pydantic import BaseModel
from safetensors.torch import save_file
from torch import Tensor

from study.backbones import build
from study.backbones.base import Backbone
from study.bounded import Object, reason
from study.data import Archive
from study.diffusion import formulation
from study.files import UserError, atomic, canonical_json, plain, sha256, write_json
from study.importing import patch_unet, songunet, udit, uvit
from study.importing.reading import read, simple, tensors_of
from study.importing.settings import Description, Images
from study.network import AUGMENT_LABELS
from study.provenance import provenance
from study.spec.backbones import family
from study.spec.explain import check
from study.spec.formulations import Formulation
from study.spec.run import Spec
from study.spec.scalings import SkipScaling

LAYOUTS: dict[str, ModuleType] = {
    "U-ViT": uvit,
    "U-DiT": udit,
    "Patch Diffusion": patch_unet,
    "EDM": songunet,
}
"""What a checkpoint can be; each module has ``matches(state)`` and ``describe(...)``."""


@dataclass
class Contents:
    """A checkpoint: its network's layout, and its weights by the role they have in a run.

    ``names`` says where in the file the weights of a role were; ``facts`` is what else it holds.
    """

    layout: str
    weights: dict[str, dict[str, Tensor]]
    names: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)


AVERAGED = ("ema", "model_ema", "state_dict_ema", "ema_state_dict", "nnet_ema", "params_ema")
CURRENT = (
    "net",
    "model",
    "state_dict",
    "model_state_dict",
    "nnet",
    "network",
    "params",
    "module",
    "weights",
)
"""What people call the averaged and the last weights in a file of several things."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What parallel training, compilation, and preconditioning put in front of the names of weights."""


def _is_state(value: Any) -> bool:
    """Whether this is a state dictionary, beside whose weights there may be counters."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(item, Tensor) for item in value.values())
        and all(isinstance(key, str) for key in value)
        and all(isinstance(i, Tensor | int | float | str | None) for i in value.values())
    )


def _bare(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights, without the ``PREFIXES`` of their names."""
    bare = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    for _ in PREFIXES:
        for prefix in PREFIXES:
            inside = {k.removeprefix(prefix): v for k, v in bare.items() if k.startswith(prefix)}
            # Of a preconditioning only the network's own weights count.
            if inside and (len(inside) == len(bare) or prefix == "model."):
                bare = inside
    return bare


def _layout(state: Mapping[str, Tensor], path: Path) -> str:
    for name, module in LAYOUTS.items():
        if module.matches(state):
            return name
    some = ", ".join(list(state)[:3])
    raise UserError(
        f"{path}: none of this project's networks has the weights in this file ({some}, ...)"
    )


def open_checkpoint(path: str | Path) -> Contents:
    """Read a checkpoint and recognise it. Raises ``UserError`` where that is not possible."""
    path = Path(path)
    value = read(path)
    found: dict[str, Any] = {}
    if isinstance(value, Object):
        found = {"ema": value}
    elif _is_state(value):
        found = {"weights": value}
    elif isinstance(value, Mapping):
        keys = [*AVERAGED, *CURRENT]
        found = {key: value[key] for key in keys if _is_state(value.get(key))}
        found |= {key: value[key] for key in keys if isinstance(value.get(key), Object)}
    if not found:
        held = f"a {type(value).__name__}"
        if isinstance(value, Mapping):
            held = ", ".join(map(str, list(value)[:10])) or "nothing"
        what = "the state of an optimiser" if "param_groups" in held else f"no network ({held})"
        raise UserError(
            f"{path}: the file holds {what[:200]}; give the file with the weights: a state "
            f"dictionary, alone or under a key such as {', '.join(CURRENT[:3])} or {AVERAGED[0]}"
        )
    facts: dict[str, Any] = {}
    networks = [item for item in found.values() if isinstance(item, Object)]
    try:
        states = {
            key: _bare(tensors_of(item) if isinstance(item, Object) else item)
            for key, item in found.items()
        }
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    layout = _layout(next(iter(states.values())), path)
    if networks:
        if layout != "EDM":
            raise UserError(f"{path}: an object of EDM's form, but not one of its networks")
        contents = value if isinstance(value, dict) else {}
        try:
            facts = songunet.facts_of(contents, networks[0])
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    if isinstance(value, Mapping) and isinstance(value.get("args"), Object):
        facts["arguments"] = simple(value["args"].state)
    averaged = next(iter(states))
    raw = next((key for key in CURRENT if key in states), averaged)
    return Contents(
        layout,
        {"ema": states[averaged], "raw": states[raw]},
        {"ema": averaged, "raw": raw},
        facts,
    )


def _fit(network: Backbone, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights of a network, as it wants them. Raises ``UserError`` where they do not fit."""
    wanted = network.state_dict()
    # Sampling never uses augmentation labels, so a run without them loses nothing.
    spare = {"map_augment.weight"} - wanted.keys()
    # Nor do counters that lie beside the weights.
    spare |= {key for key, value in state.items() if key not in wanted and not value.dim()}
    state = {key: value for key, value in state.items() if key not in spare}
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    wrong = [key for key in wanted if key in state and wanted[key].shape != state[key].shape]
    if missing or unknown or wrong:
        parts = [
            f"{key} is {list(state[key].shape)}, not {list(wanted[key].shape)}" for key in wrong[:2]
        ]
        parts += [f"it lacks {', '.join(missing[:2])}"] if missing else []
        parts += [f"it has {', '.join(unknown[:2])} too many"] if unknown else []
        total = len(missing) + len(unknown) + len(wrong)
        raise UserError(
            f"{path}: the weights do not fit the network of these settings in {total} places: "
            f"{'; '.join(parts)}"
        )
    # Copies, because tensors in a file may share their storage.
    return {key: _sound(key, state[key], value.dtype, path) for key, value in wanted.items()}


def _sound(name: str, weight: Tensor, dtype: torch.dtype, path: Path) -> Tensor:
    """A copy of a weight in the type that its network has, all of whose numbers are finite."""
    if weight.is_floating_point() != dtype.is_floating_point or weight.is_complex():
        raise UserError(f"{path}: {name} is {weight.dtype}; its network's is {dtype}")
    made = weight.to(dtype, copy=True).contiguous()
    broken = int((~made.isfinite()).sum())
    if broken:
        why = "training has diverged, or the file is damaged"
        if weight.dtype == torch.float16:
            why += ", or its numbers were too large for half precision: take the float32 weights"
        raise UserError(
            f"{path}: {name} holds {broken} of {made.numel()} numbers that are not finite; {why}"
        )
    return made


def _network(spec: Spec, images: Images) -> Backbone:
    """The network that ``study generate`` will build, without memory for its weights."""
    training = spec.training
    outputs = images.channels * formulation(spec.formulation).output_multiplier
    with torch.device("meta"):
        return build(
            spec.backbone,
            spec.skip_scaling,
            resolution=images.resolution,
            channels=images.channels,
            out_channels=outputs,
            num_classes=images.num_classes if training.conditional else 0,
            augment_dim=AUGMENT_LABELS if training.augment else 0,
        )


def _images(data: str | Path) -> tuple[Archive, Images]:
    archive = Archive(data)
    return archive, Images(archive.resolution, archive.channels, archive.num_classes)


def _save(path: Path, weights: dict[str, Tensor]) -> None:
    with atomic(path) as temporary:
        save_file(weights, temporary)


def _save_empty_log(path: Path) -> None:
    """A log of training without rows, in the form of the trainer's."""
    # Not the trainer's own class: that would make every change of the trainer import anew.
    types = {"step": "int64", "quantity": "string", "where": "string", "value": "double"}
    columns = {name: pyarrow.array([], kind) for name, kind in types.items()}
    with atomic(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary, compression="zstd")


def _write(
    out: Path,
    path: Path,
    contents: Contents,
    spec: Spec,
    images: Images,
    facts: dict[str, Any],
    code: str | None,
    data_sha256: str | None,
) -> dict[str, Any]:
    """A finished training in ``out``, whose weights are the file's; ``status.json`` comes last."""
    network = _network(spec, images)
    fitted = {role: _fit(network, contents.weights[role], path) for role in ("ema", "raw")}
    out.mkdir(parents=True, exist_ok=True)
    for role, name in (("ema", "weights.safetensors"), ("raw", "raw.safetensors")):
        _save(out / name, fitted.pop(role))
    for name in ("dynamics.parquet", "timing.parquet"):
        _save_empty_log(out / name)
    status = {
        "status": "done",
        "step": 0,
        "steps": 0,
        "reason": None,
        "last_finite": {},
        "run": out.parent.name,
        "spec": spec.content(),
        "code": code,
        "data_sha256": data_sha256,
        "seeds": spec.seeds.model_dump(),
        "parameters": sum(p.numel() for p in network.parameters()),
        "skips": len(network.long_skips),
        "skip_factors": network.long_skips.factors,
        "images_seen": 0,
        "train_seconds": None,
        "images_per_second": None,
        "peak_memory_mib": None,
        "final_loss": None,
        "processes": 1,
        "imported": {
            "file": path.name,
            "bytes": path.stat().st_size,
            "layout": contents.layout,
            "weights": contents.names,
            **facts,
        },
        "weights_sha256": sha256(out / "weights.safetensors"),
        "raw_sha256": sha256(out / "raw.safetensors"),
        "snapshots": {},
        "provenance": provenance("cpu"),
    }
    write_json(out / "status.json", status)
    return status


def import_run(
    spec: Spec,
    path: str | Path,
    data: str | Path,
    out: str | Path,
    code: str | None = None,
) -> dict[str, Any]:
    """Make the ``train/`` folder ``out`` of a run whose spec names a checkpoint.

    ``spec`` describes the network in full; ``path`` is where the checkpoint lies. Raises
    ``UserError`` where its hash is not the one that the spec names, or its weights do not fit.
    """
    path, out = Path(path), Path(out)
    contents = open_checkpoint(path)
    identity = sha256(path)
    wanted = spec.checkpoint.sha256
    if wanted is not None and identity != wanted:
        raise UserError(
            f"checkpoint.sha256: {path} has the hash {identity}, not {wanted}; it is another file"
        )
    archive, images = _images(data)
    _check_recorded(contents, spec, path)
    status = _write(out, path, contents, spec, images, {"sha256": identity}, code, archive.sha256)
    print(f"imported {path.name} ({contents.layout}): {status['parameters']:,} parameters")
    return status


def _describe(
    contents: Contents, given: dict[str, Any], images: Images | None, path: Path
) -> Description:
    """What the network in a file is; shapes that no network has are a mistake of the file."""
    module = LAYOUTS[contents.layout]
    try:
        return module.describe(contents.weights["ema"], given, images, contents.facts)
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path}: the weights are not those of a whole {contents.layout} network "
            f"({reason(error)})"
        ) from None


def _check_recorded(contents: Contents, spec: Spec, path: Path) -> None:
    """Raise ``UserError`` where a spec contradicts what the file says of its own network."""
    if "preconditioning" not in contents.facts:
        return
    made = _describe(contents, {}, None, path)
    told = _dump(spec.backbone.options) | _dump(spec.formulation)
    # Of the formulation only what sampling depends on: P_mean and P_std are the training's.
    recorded = plain(made.options | made.formulation)
    for key in [*made.options, "kind", *songunet.attributes(contents.facts)]:
        if told.get(key, ...) != recorded.get(key, told.get(key, ...)):
            raise UserError(
                f"{path}: the file's network has {key} {recorded[key]!r}, not {told.get(key)!r}"
            )


def _dump(section: BaseModel) -> dict[str, Any]:
    return section.model_dump(mode="json")


def _sections(
    made: Description,
    scaling: str | None,
    process: str | dict[str, Any] | None,
    recorded: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Skip scaling and formulation: what the user says, or else the file's or published ones."""
    if scaling is not None:
        chosen = _dump(check(SkipScaling, scaling, "--skip-scaling: "))
        made.assumed.pop("scalelong", None)
    else:
        chosen = _dump(check(SkipScaling, made.scaling, "--options: "))
    if process is not None:
        return chosen, _dump(check(Formulation, process, "--formulation: "))
    if not recorded:
        made.assumed["formulation"] = made.formulation
    return chosen, _dump(check(Formulation, made.formulation, "the file's formulation: "))


def import_checkpoint(
    path: str | Path,
    run_dir: str | Path,
    *,
    data: str | Path | None = None,
    preset: str | None = None,
    options: Mapping[str, Any] | None = None,
    scaling: str | None = None,
    process: str | dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Turn an official checkpoint into the run folder ``run_dir``, and say what it is.

    What the file does not tell comes from ``options`` (names of ``study.spec.backbones`` or of
    the official constructor), from ``preset``, or from the published models; what was assumed is
    printed. ``scaling`` and ``process`` are the skip scaling and the formulation as a study writes
    them. ``data`` is the archive that the network is for: it fixes resolution, channels and
    classes where the file does not, and must agree where it does. Raises ``UserError`` where
    file, options and data contradict each other.
    """
    path, run_dir = Path(path), Path(run_dir)
    contents = open_checkpoint(path)
    archive, images = _images(data) if data is not None else (None, None)
    name = {"U-ViT": "uvit", "U-DiT": "udit", "Patch Diffusion": "patch_unet", "EDM": "ddpmpp"}
    presets = family(name[contents.layout]).presets
    if preset is not None and preset not in presets:
        raise UserError(f"--preset: {preset!r} is unknown; allowed: {', '.join(presets)}")
    given = {**(presets[preset] if preset else {}), **(options or {})}
    made = _describe(contents, given, images, path)
    found = Images(made.resolution, made.channels, made.num_classes)
    if images is not None:
        _check_images(found, images, path)
    recorded = "preconditioning" in contents.facts
    chosen, process = _sections(made, scaling, process, recorded)
    model = family(made.family).options
    prefix = "--options: "
    section = _dump(check(model, made.options, prefix))
    identity = sha256(path)
    spec = Spec.read(
        {
            "dataset": {
                "name": archive.name if archive is not None else "unknown",
                "source": "archive",
                "resolution": made.resolution,
            },
            "backbone": {"family": made.family, "options": section},
            "skip_scaling": chosen,
            "target": {"kind": "dsm"},
            "formulation": process,
            "training": {"conditional": made.num_classes > 0, **made.training},
            "seeds": {"data": 0, "init": 0, "noise": 0},
            "checkpoint": {"sha256": identity},
        }
    )
    facts = {
        "sha256": identity,
        "constructor": plain(made.official),
        "assumed": plain(made.assumed),
        **_recorded(contents.facts),
    }
    status = _write(
        run_dir / "train",
        path,
        contents,
        spec,
        found,
        facts,
        None,
        archive.sha256 if archive is not None else None,
    )
    _report(path, run_dir, contents.layout, status, made)
    return status


def _check_images(found: Images, wanted: Images, path: Path) -> None:
    pairs = [
        ("resolution", found.resolution, wanted.resolution),
        ("channels", found.channels, wanted.channels),
    ]
    if found.num_classes:
        pairs.append(("classes", found.num_classes, wanted.num_classes))
    for what, ours, theirs in pairs:
        if ours != theirs:
            raise UserError(
                f"{path}: the network is for {what} {ours}, but the data set has {theirs}"
            )


def _recorded(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts that JSON can hold."""
    kept = {key: value for key, value in facts.items() if key != "constructor"}
    return json.loads(json.dumps(plain(kept), default=str))


def arm_of(status: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The arm of a study that imports the same checkpoint as the run of ``status``."""
    spec = Spec.read(status["spec"])
    options = spec.chosen["backbone"]["options"]
    training = spec.training
    named = {k: getattr(training, k) for k in ("conditional", "augment") if getattr(training, k)}
    return {
        "name": Path(path).stem,
        "backbone": spec.backbone.family,
        **({"options": options} if options else {}),
        "skip_scaling": str(spec.skip_scaling),
        "formulation": spec.chosen["formulation"],
        **({"training": named} if named else {}),
        "checkpoint": {"path": str(path), "sha256": spec.checkpoint.sha256},
    }


def _report(
    path: Path, run_dir: Path, layout: str, status: dict[str, Any], made: Description
) -> None:
    print(
        f"{path.name}: {layout}, {status['parameters']:,} parameters, {status['skips']} long "
        f"skips, {made.channels}x{made.resolution}x{made.resolution}, "
        f"{made.num_classes or 'no'} classes -> {run_dir}"
    )
    said = ", ".join(f"{key} {canonical_json(plain(v))}" for key, v in made.assumed.items())
    print(f"Assumed, because the file does not tell: {said or 'nothing'}")
    print(f"As an arm of a study: {json.dumps(arm_of(status, path))}")
