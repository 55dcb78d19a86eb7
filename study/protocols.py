"""Which measurements do a study's protocols make of a run, and of which runs?

No heavy imports.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from study.combinations import check_measured
from study.files import UserError
from study.spec.guidance import guidance_options
from study.spec.measuring import Best, BestOf, Decoding, Guidance, Measurement, Only, Protocol
from study.spec.metrics import METRICS, numbers
from study.spec.run import Spec
from study.spec.study import Study

if TYPE_CHECKING:
    from study.arms import Run

KEEPING = ("none", "grid", "samples")
"""What stays of the samples, from nothing to all."""


@dataclass(frozen=True)
class Planned:
    """One measurement of a run, and what the protocols that ask for it want of it.

    ``step`` is that of the weights (``None``: the best one, known when its curve is), ``last``
    whether the training ends there. ``extractors`` has the metrics of each.
    """

    name: str
    cell: Measurement
    step: int | None
    last: bool
    protocols: tuple[str, ...]
    extractors: dict[str, tuple[str, ...]]
    keep: str
    best_of: str = ""
    """The protocol that tells which snapshot is best, where that is asked for."""

    def row(self, spec: Spec, images: int | None) -> dict[str, Any]:
        """The measurement as the manifest lists it; ``images`` are those of the data set."""
        cell = self.cell.model_dump(mode="json")
        guidance = guidance_options(cell["guidance"], spec.formulation)
        return {
            "measurement": self.name,
            "protocols": list(self.protocols),
            "step": self.step,
            "last": self.last,
            "best_of": self.best_of,
            "images": self.cell.images or images,
            "cell": {**cell, "guidance": guidance and guidance.model_dump(mode="json")},
            "extractors": {kind: list(metrics) for kind, metrics in self.extractors.items()},
        }


def _values(run: "Run", key: str) -> set[Any]:
    """The values of a key by which a run can be chosen."""
    spec, axes = run.spec, run.axes
    return {
        "dataset": {spec.dataset.name},
        "backbone": {axes["backbone"], axes["backbone"].partition("(")[0]},
        "skip_scaling": {axes["skip_scaling"]},
        "target": {spec.target.kind, str(spec.target)},
        "formulation": {spec.formulation.kind},
        "name": {run.display},
        "seed": {spec.seeds.init},
    }[key]


def chosen(
    runs: dict[str, "Run"],
    only: Only | None,
    where: str = "only",
    declared: Mapping[str, set[str]] | None = None,
) -> dict[str, "Run"]:
    """The runs that a filter leaves.

    Raises ``UserError`` for a value that no run has, and where none is left. With what a study has
    ``declared`` by key, such a value may be one of those, and none may be left: a part of a study's
    grid keeps the protocols of the whole.
    """
    if only is None:
        return runs
    left = runs
    for key, wanted in only.given().items():
        known = {name: _values(run, key) for name, run in runs.items()}
        there = set().union(*known.values())
        for value in wanted:
            if value not in there and value not in (declared or {}).get(key, ()):
                listed = ", ".join(sorted(map(str, there)))
                raise UserError(f"{where}.{key}: no arm has {value!r}; there are {listed}")
        left = {name: run for name, run in left.items() if known[name] & set(wanted)}
    if not left and declared is None:
        raise UserError(f"{where}: no arm has all of these values together")
    return left


def with_measurements(study: Study, runs: dict[str, "Run"]) -> dict[str, "Run"]:
    """The runs, each with its measurements: first those of ``final``, then by protocols' names.

    Raises ``UserError`` where a protocol asks for what no training of the study keeps.
    """
    applies: dict[str, list[str]] = {name: [] for name in runs}
    declared = {"backbone": set(study.backbones), "dataset": set(study.data)}
    for protocol in sorted(study.protocols, key=lambda name: (name != "final", name)):
        only = study.protocols[protocol].only
        for name, run in chosen(runs, only, f"protocols.{protocol}.only", declared).items():
            check_measured(f"{run.display}: protocols.{protocol}", study, protocol, run)
            applies[name].append(protocol)
    made: dict[tuple[Any, ...], tuple[Planned, ...]] = {}
    found = {}
    for name, run in runs.items():
        spec = run.spec
        kept = tuple(map(spec.kept, spec.snapshots))
        key = (spec.dataset.name, spec.snapshots, kept, spec.checkpoint is None)
        key = (*key, spec.formulation.kind, *applies[name])
        if key not in made:
            decoder = study.data[spec.dataset.name].decoder
            scale = None if decoder is None else Decoding(scale=decoder.scale)
            made[key] = tuple(_planned(study, run, applies[name], scale))
        found[name] = replace(run, measurements=made[key])
    return found


def _planned(
    study: Study, run: "Run", names: Iterable[str], decoder: Decoding | None
) -> list[Planned]:
    """The measurements of a run; what several protocols ask for is one measurement."""
    cells: dict[str, list[tuple[Measurement, int | None]]] = {}
    waiting = list(names)
    for name in [*waiting]:  # those of steps first, for the best of them is told from their names
        cells[name] = list(_cells(study, run, name, study.protocols[name], decoder))
    found: dict[str, Planned] = {}
    for name in waiting:
        protocol = study.protocols[name]
        best = dict(_best(study, run, name, protocol, cells, decoder))
        for cell, step in [*cells[name], *((cell, None) for cell in best)]:
            new = Planned(
                name=cell.name,
                cell=cell,
                step=step,
                last=cell.at == "final",
                protocols=(name,),
                extractors=protocol.measured(),
                keep=protocol.keep,
                best_of=best.get(cell, ""),
            )
            found[cell.name] = _together(found[cell.name], new) if cell.name in found else new
    return list(found.values())


def _together(first: Planned, second: Planned) -> Planned:
    extractors = dict(first.extractors)
    for kind, metrics in second.extractors.items():
        both = (*extractors.get(kind, ()), *metrics)
        extractors[kind] = tuple(metric for metric in METRICS if metric in both)
    return replace(
        first,
        protocols=tuple(dict.fromkeys((*first.protocols, *second.protocols))),
        extractors=extractors,
        keep=max(first.keep, second.keep, key=KEEPING.index),
    )


def _kept(run: "Run", where: str, step: int, weights: str) -> None:
    """Raise ``UserError`` where a training does not keep such weights at such a step."""
    spec = run.spec
    if step not in spec.snapshots:
        kept = ", ".join(map(str, spec.snapshots))
        raise UserError(
            f"{where}.at: {run.display} keeps no snapshot at step {step}, but at {kept}; add it "
            "to training.snapshots"
        )
    if weights not in spec.kept(step):
        kept = ", ".join(spec.kept(step))
        hint = (
            "training.snapshots: {every: n, raw: true} keeps raw ones, too"
            if weights == "raw"
            else "training.ema may be a list of averages"
        )
        raise UserError(
            f"{where}.weights: {run.display} keeps no {weights} at step {step}, but {kept}; {hint}"
        )


def _cells(
    study: Study, run: "Run", name: str, protocol: Protocol, decoder: Decoding | None
) -> Iterable[tuple[Measurement, int | None]]:
    """The cells of a protocol at snapshots that are known beforehand, with their steps.

    The last step comes first. Of weights that were not trained here there is nothing else.
    """
    spec, where = run.spec, f"protocols.{name}"
    end, imported = spec.snapshots[-1], spec.checkpoint is not None
    for cell in protocol.cells():
        at = cell.pop("at")
        if isinstance(at, Best):
            continue
        if imported and (at != "final" or cell["weights"] not in spec.kept(end)):
            continue
        steps = (end if at == "final" else at,)
        for step in spec.snapshots[::-1] if at == "snapshots" else steps:
            _kept(run, where, step, cell["weights"])
            last = step == end
            made = Measurement.model_construct(
                at="final" if last else step, decoder=decoder, **_resolved(cell, spec)
            )
            yield made, step


def _resolved(cell: dict[str, Any], spec: Spec) -> dict[str, Any]:
    """A cell in the one form in which it is named, however it was written."""
    guidance, images = cell["guidance"], cell["images"]
    if guidance is not None:
        whole = guidance_options(guidance.model_dump(mode="json"), spec.formulation)
        guidance = Guidance.model_validate(whole.model_dump(mode="json"))
    return {
        **cell,
        "guidance": guidance,
        "images": None if images == spec.dataset.images else images,
    }


def _best(
    study: Study,
    run: "Run",
    name: str,
    protocol: Protocol,
    cells: dict[str, list[tuple[Measurement, int | None]]],
    decoder: Decoding | None,
) -> Iterator[tuple[Measurement, str]]:
    """The cells of a protocol at the best snapshot by another one, and which that is."""
    for cell in protocol.cells():
        at = cell.pop("at")
        if not isinstance(at, Best):
            continue
        where = f"protocols.{name}.at"
        other = study.protocols.get(at.best)
        if other is None or at.best == name or any(isinstance(one, Best) for one in other.at):
            known = ", ".join(key for key in study.protocols if key != name)
            raise UserError(
                f"{where}: best({at.best}) needs another protocol, at known snapshots; there are "
                f"{known or 'none'}"
            )
        for axis in ("weights", "sampler", "guidance", "images", "labels"):
            if len(getattr(other, axis)) > 1:
                raise UserError(
                    f"{where}: best({at.best}) compares snapshots, but {at.best} has several "
                    f"{axis}; let it have no axes but at and seeds"
                )
        extractor = at.extractor or next(iter(other.measured()))
        given = (numbers(one, extractor) for one in other.measured().get(extractor, ()))
        # On Inception's features the Fréchet distance is the FID: both names are understood.
        metric = "fd" if at.metric == "fid" else at.metric
        if not {metric, "fid" if metric == "fd" else metric} & set().union(*given):
            raise UserError(
                f"{where}: protocol {at.best} does not measure {at.metric} with {extractor}"
            )
        curve = cells.get(at.best, ())
        if not curve:  # weights that are not trained have no curve
            continue
        for _, step in curve:
            _kept(run, f"protocols.{name}", step, cell["weights"])
        names = tuple(sorted({one.name for one, _ in curve}))
        best = BestOf(best=names, extractor=extractor, metric=metric)
        cell = _resolved(cell, run.spec)
        yield Measurement.model_construct(at=best, decoder=decoder, **cell), at.best
