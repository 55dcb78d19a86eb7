"""From a study to its runs: every arm with every seed, and what cannot be together.

Arms that resolve to the same settings are one arm. No heavy imports.
"""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from study import combinations, protocols
from study.files import UserError, canonical_json
from study.spec.backbones import FAMILIES, family
from study.spec.data import Dataset, DatasetSettings
from study.spec.explain import check, leaves
from study.spec.formulations import FormulationOptions
from study.spec.probes import ProbeOptions
from study.spec.run import KEPT, Backbone, Seeds, Spec, Untrained
from study.spec.scalings import SkipScaling, same_factors
from study.spec.study import Arm, BackboneEntry, Checkpoint, Grid, Study
from study.spec.targets import Target
from study.spec.training import SplitModel, Training

NOT_SETTINGS = set(Dataset.model_fields) - set(DatasetSettings.model_fields)
"""Keys of the data set that say where it lies or what to print, not what it is."""


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    ``name`` is the folder; ``arm`` identifies the arm whatever its seed; ``display`` is the arm's
    name for people; ``grid`` says whether the arm comes from a grid; ``axes`` holds short texts
    for backbone, skip_scaling, target, formulation, training, seed. ``checkpoint`` is where the
    weights lie if they are imported instead of trained; ``measurements`` says how its quality is
    measured, the main measurement first.
    """

    name: str
    arm: str
    display: str
    grid: bool
    axes: dict[str, str]
    spec: Spec
    checkpoint: str | None = None
    measurements: tuple[protocols.Planned, ...] = field(default=(), compare=False)

    def row(self) -> dict[str, Any]:
        """The run as the manifest lists it."""
        images = self.spec.dataset.images
        return {
            "run": self.name,
            "arm": self.arm,
            "display": self.display,
            "grid": self.grid,
            "axes": self.axes,
            "spec": self.spec.content(),
            "measurements": [one.row(self.spec, images) for one in self.measurements],
        }


def probed(runs: dict[str, Run], probe: ProbeOptions) -> list[str]:
    """Names of the runs that a probe looks at; none for a probe of the data set or the study."""
    if probe.subject not in ("run", "arm"):
        return []
    seeds = probe.seeds
    wanted = None if seeds is None else {str(seed) for seed in seeds}
    return [name for name, run in runs.items() if wanted is None or run.axes["seed"] in wanted]


def shorter(runs: dict[str, Run]) -> dict[str, list[str]]:
    """By run, if any: the shorter trainings of its lineage in order, which it goes on from."""
    lineages: dict[str, list[tuple[int, str]]] = {}
    for name, run in runs.items():
        lineages.setdefault(run.spec.lineage, []).append((run.spec.steps, name))
    return {
        name: before
        for lineage in lineages.values()
        for steps, name in (lineage if len(lineage) > 1 else ())
        if (before := [other for less, other in sorted(lineage) if less < steps])
    }


def _check_probes(study: Study, runs: dict[str, Run]) -> None:
    """Raise ``UserError`` for a probe of seeds that no run has, or of one of several data sets."""
    known = list(dict.fromkeys(run.axes["seed"] for run in runs.values()))
    for number, probe in enumerate(study.probes):
        if probe.subject in ("dataset", "study") and len(study.data) > 1:
            raise UserError(
                f"probes[{number}]: {probe.kind} looks at one data set, and the study has several; "
                "make it in a study with one of them"
            )
        for seed in getattr(probe, "seeds", None) or ():
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
        chosen = run.spec.chosen
        kept = {key: chosen[key] for key in ("dataset", "backbone", "formulation")}
        training = {k: v for k, v in chosen["training"].items() if k in (*KEPT, "dropout")}
        whole = {**kept, "training": training, "target": {"kind": "dsm"}}
        found[canonical_json(whole)] = whole
    return [found[text] for text in sorted(found)]


def _seeds(seed: Any) -> tuple[str, Seeds]:
    """Short text and the seed of every axis."""
    if isinstance(seed, int):
        return str(seed), Seeds(data=seed, init=seed, noise=seed)
    seeds = Seeds(**seed)
    return f"{seeds.data}.{seeds.init}.{seeds.noise}", seeds


def resolve_backbone(
    study: Study, name: str, options: dict[str, Any], where: str
) -> tuple[Backbone, dict[str, Any]]:
    """The spec's backbone section and the training keys that belong to the entry ``name``."""
    entry = study.backbones.get(name)
    if entry is None:
        if name not in FAMILIES:
            known = ", ".join(dict.fromkeys([*study.backbones, *FAMILIES]))
            raise UserError(f"{where}: {name!r} is no backbone of this study; allowed: {known}")
        entry = BackboneEntry()
    try:
        kind = family(entry.family or name)
    except UserError as error:
        raise UserError(f"backbones.{name}.family: {error}") from None
    presets = kind.presets
    if entry.preset is not None and entry.preset not in presets:
        known = ", ".join(presets) or "none"
        raise UserError(f"backbones.{name}.preset: {entry.preset!r} is unknown; allowed: {known}")
    preset = presets.get(entry.preset, {}) if entry.preset else {}
    merged = {**preset, **entry.options, **options}
    prefix = f"{where}.options." if options else f"backbones.{name}.options."
    section = Backbone(
        family=entry.family or name,
        options=check(kind.options, merged, prefix),
        noise_scale=entry.noise_scale,
    )
    return section, entry.training


@dataclass(frozen=True)
class _Arm:
    """An arm before its seeds: everything a run needs but them.

    ``where`` is its place in the study, ``training_at`` that of its training keys.
    """

    where: str
    training_at: str
    dataset: str
    name: str | None
    grid: bool
    backbone: str
    options: dict[str, Any]
    scaling: SkipScaling
    target: Target
    formulation: FormulationOptions
    training: dict[str, Any]
    seeds: tuple[Any, ...]
    checkpoint: Checkpoint | None = None


def _arms(study: Study) -> Iterator[_Arm]:
    for number, grid in enumerate(study.grid):
        where = "grid" if len(study.grid) == 1 else f"grid[{number}]"
        yield from _grid_arms(study, grid, where)
    for number, arm in enumerate(study.arms):
        yield _extra_arm(study, arm, f"arms[{number}]")


def _datasets(study: Study, chosen: tuple[str, ...] | None, where: str) -> tuple[str, ...]:
    """The names of the data sets of a grid or an arm. Raises ``UserError`` for an unknown one."""
    known = ", ".join(study.data)
    if chosen is None and len(study.data) > 1:
        raise UserError(f"{where}: missing; the study has several data sets: {known}")
    for name in chosen or ():
        if name not in study.data:
            raise UserError(f"{where}: {name!r} is no data set of this study; allowed: {known}")
    return chosen or tuple(study.data)


def _grid_arms(study: Study, grid: Grid, where: str) -> Iterator[_Arm]:
    axes = (
        _datasets(study, grid.dataset, f"{where}.dataset"),
        grid.backbone,
        grid.formulation or (study.formulation,),
        grid.training,
        grid.skip_scaling,
        grid.target,
    )
    numbers = {id(keys): number for number, keys in enumerate(grid.training)}
    for dataset, backbone, formulation, training, scaling, target in itertools.product(*axes):
        yield _Arm(
            where=f"{where}.backbone",
            training_at=f"{where}.training[{numbers[id(training)]}]",
            dataset=dataset,
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
        dataset=_datasets(study, arm.dataset and (arm.dataset,), f"{where}.dataset")[0],
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


def _training(study: Study, arm: _Arm, entry: dict[str, Any]) -> Training:
    """The training section of an arm: the study's, then the backbone's, then its own keys."""
    whole = {**study.training.model_dump(mode="json"), **entry, **arm.training}
    try:
        return check(Training, whole)
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


def _plain_training(spec: Spec) -> Training:
    """The training without what its keys repeat.

    ``models`` are empty and ``snapshots`` none if they say nothing new.
    """
    training = spec.training
    listed = tuple(
        model.model_copy(
            update={
                key: None
                for key, value in model.model_dump().items()
                if value == getattr(training, key, ...)
            }
        )
        for model in training.models
    )
    same = tuple(SplitModel(split=split) for split in range(len(spec.formulation.parts)))
    kept, earlier = training.snapshots, training.kept(spec.steps)[:-1]
    if kept is not None and kept.at is not None:
        kept = kept.model_copy(update={"at": earlier})
    plain = {"models": () if listed == same else listed, "snapshots": kept if earlier else None}
    return training.model_copy(update=plain)


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
            settings = leaves({**run.spec.chosen, "seeds": None})
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


_resolved: tuple[Study, tuple[dict[str, Run], list[str]]] | None = None
"""The last study that was resolved: checks, plans and states ask for the same one."""


def _resolve(study: Study) -> tuple[dict[str, Run], list[str]]:
    global _resolved
    if _resolved is None or _resolved[0] is not study:
        _resolved = study, _resolve_anew(study)
    found, lines = _resolved[1]
    return dict(found), list(lines)


def _resolve_anew(study: Study) -> tuple[dict[str, Run], list[str]]:
    combinations.check_protocols(study)
    if not study.grid and not study.arms:
        raise UserError("grid: the study has neither a grid nor arms; nothing would run")
    ours = study.training.model_dump(mode="json")
    for name in study.backbones:
        _, training = resolve_backbone(study, name, {}, f"backbones.{name}")
        check(Training, {**ours, **training}, f"backbones.{name}.training.")
    settings = {name: dataset.settings for name, dataset in study.data.items()}
    backbones: dict[str, tuple[Backbone, dict[str, Any]]] = {}
    trainings: dict[str, Training] = {}
    result: dict[str, Run] = {}
    names, lines = _Names(), []
    for arm in _arms(study):
        key = json.dumps([arm.backbone, arm.options])
        if key not in backbones:
            backbones[key] = resolve_backbone(study, arm.backbone, arm.options, arm.where)
        backbone, entry_training = backbones[key]
        key = json.dumps([entry_training, arm.training])
        if key not in trainings:
            trainings[key] = _training(study, arm, entry_training)
        scaling = _plain_scaling(arm, backbone, lines)
        spec = Spec(
            dataset=settings[arm.dataset],
            backbone=backbone,
            skip_scaling=scaling,
            target=arm.target,
            formulation=arm.formulation,
            training=trainings[key],
        )
        combinations.check_arm(study, arm, spec)
        if arm.checkpoint is not None:
            kept = {key: getattr(spec.training, key) for key in KEPT}
            imported = {"training": Untrained(**kept), "checkpoint": arm.checkpoint.identity}
            spec = spec.model_copy(update=imported)
        else:
            spec = spec.model_copy(update={"training": _plain_training(spec)})
        axes = {
            "backbone": arm.backbone + (f"({_short(arm.options)})" if arm.options else ""),
            "skip_scaling": str(scaling),
            "target": arm.target.kind,
            "formulation": arm.formulation.kind,
            "training": _short(arm.training),
        }
        identity = spec.arm
        path = arm.checkpoint.path if arm.checkpoint else None
        extra = [axes["training"]] if axes["training"] else []
        extra += [arm.checkpoint.label] if arm.checkpoint else []
        extra += [arm.dataset] if len(study.data) > 1 else []
        display = " · ".join([axes["backbone"], axes["skip_scaling"], axes["target"], *extra])
        for seed in arm.seeds:
            short, seeds = _seeds(seed)
            seeded = spec.model_copy(update={"seeds": seeds})
            name = seeded.name
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
                    spec=seeded,
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
    return protocols.with_measurements(study, result), list(dict.fromkeys(lines))


def selected(study: Study, found: dict[str, Run]) -> dict[str, Run]:
    """The runs that ``only`` leaves of a study's."""
    return protocols.chosen(found, study.only)


def _plain_scaling(arm: _Arm, backbone: Backbone, lines: list[str]) -> SkipScaling:
    """The arm's scaling as its backbone tells it apart; ``lines`` gets a word on a change."""
    shapes = backbone.options.skip_shapes()
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
        "config": study.model_dump(mode="json", exclude={"only"}),
        "runs": [run.row() for run in all_runs.values()],
    }
