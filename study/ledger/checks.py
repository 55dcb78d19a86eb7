"""A study against what lies here: other studies, converted data sets, files that it names."""

import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from study.arms import Run, remarks
from study.combinations import check_archive, section
from study.files import UserError, read_json
from study.ledger import contents
from study.spec.data import Dataset, DatasetSettings, Images
from study.spec.study import Study

LARGEST_DESCRIPTION = 2**28
"""Bytes of an archive's ``dataset.json`` that are read; what is longer is checked by the jobs."""


def check_shared(
    study: Study, results: str | Path = "results", sources: Mapping[str, str] | None = None
) -> None:
    """Raise ``UserError`` if another study means something else by the same data set's name.

    Studies share archives, classifiers and references; two meanings of one name would convert, and
    so train, everything again at every change of study. ``sources`` are the identities of the
    sources (``study.ledger.contents.source``) by archive, where paths are to be compared too.
    """
    results, ours = Path(results), study.model_dump(mode="json")
    for path in sorted(results.glob("*/study.json")):
        other = _described(path)
        if other is not None and other.get("study") != study.study:
            _check_other(ours, other, path.parent, sources)


def _described(path: Path) -> dict[str, Any] | None:
    """A study as its manifest holds it; ``None`` where it says nothing that can be compared.

    Another version may have written it, and no study is kept from running by that.
    """
    try:
        config = read_json(path)["config"]
        for name, (_, one) in _images(config).items():
            if one["name"] != name or "source" not in one:
                return None
        return config
    except (UserError, KeyError, TypeError, AttributeError):
        return None


def _check_other(
    ours: Mapping[str, Any],
    other: Mapping[str, Any],
    folder: Path,
    sources: Mapping[str, str] | None,
) -> None:
    """The same of one other study, whose results are in ``folder``."""
    for name in _datasets(ours).keys() & _datasets(other).keys():
        _check_classifier(name, ours, other, folder)
    for name, (where, mine) in _images(ours).items():
        if name not in _images(other):
            continue
        theirs = _images(other)[name][1]
        _check_same(where, mine, theirs, folder)
        if sources is not None:
            archive = str(folder.parent / "datasets" / f"{name}.zip")
            _check_source(where, mine, theirs, folder, archive, sources)


def _check_source(
    where: str,
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    folder: Path,
    archive: str,
    sources: Mapping[str, str],
) -> None:
    """The archive was made from another study's path, and ours holds something else."""
    made_from = contents.made_from(archive)
    if sources.get(archive) in (None, made_from):
        return
    if made_from is None and contents.gone(theirs["path"]):
        return
    if contents.source(theirs["path"], archive) == sources[archive]:
        return
    raise UserError(
        f"{where}.path: {ours['path']} does not hold what {theirs['path']} holds, which is the "
        f"data set {ours['name']!r} of {folder}; choose another name, or delete that folder"
    )


def _extractors(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The extractors of a resolved study by kind."""
    found: dict[str, dict[str, Any]] = {}
    if "evaluation" in config:  # from before there were protocols
        found[config["evaluation"].get("extractor")] = config["evaluation"]
    for protocol in config.get("protocols", {}).values():
        listed = protocol["extractors"]
        for one in listed if isinstance(listed, list) else [listed]:
            found.setdefault(one["kind"], one)
    return found


def _check_classifier(
    name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], folder: Path
) -> None:
    """Studies whose features come from a classifier of the same data set share that classifier."""
    mine, other = (_extractors(one).get("digits") for one in (ours, theirs))
    if mine is None or other is None:
        return
    seed, theirs_seed = mine.get("seed", 0), other.get("seed", 0)
    if seed != theirs_seed:
        raise UserError(
            f"extractor digits: {folder} has trained the classifier of {name!r} with seed "
            f"{theirs_seed}, which all studies of this data set share; take that seed instead of "
            f"{seed}, give the data set another name, or delete that folder"
        )


def _datasets(config: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """By name: the data sets of a resolved study, and the sections that describe them."""
    if config.get("datasets"):
        return {name: (f"datasets.{name}", one) for name, one in config["datasets"].items()}
    return {config["dataset"]["name"]: ("dataset", config["dataset"])}


def _images(config: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """The same with the images that samples are measured against, if those are others."""
    found = dict(_datasets(config))
    references = [(f"{where}.reference", one.get("reference")) for where, one in found.values()]
    # From before a reference belonged to its data set.
    references.append(("evaluation.reference", (config.get("evaluation") or {}).get("reference")))
    for where, one in references:
        if one is not None:
            found.setdefault(one["name"], (where, one))
    return found


def _check_same(
    where: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], folder: Path
) -> None:
    for key, field in DatasetSettings.model_fields.items():
        # An option that did not exist yet was at its default.
        known = theirs.get(key, field.get_default())
        if ours[key] != known:
            raise UserError(
                f"{where}.name: {ours['name']!r} is a data set of {folder} with {key}: "
                f"{known!r} instead of {ours[key]!r}; choose another name, or delete "
                "that folder"
            )


def check(
    study: Study,
    runs: Mapping[str, Run],
    results: str | Path = "results",
    *,
    notebooks: str | Path = "notebooks",
    sources: Mapping[str, str] | None = None,
) -> list[str]:
    """Check a study against what lies here: other studies, notebooks, converted data sets.

    Returns a line for each thing that a user should know and that keeps no job from running, and
    raises ``UserError`` for what does. Both from small files alone.
    """
    check_shared(study, results, sources)
    _check_notebooks(study, Path(notebooks))
    for name, dataset in study.data.items():
        found = _converted(dataset, Path(results))
        if found is not None:
            images, *shape = found
            check_archive(dict(runs), name, images, tuple(shape))
        if dataset.reference is not None and dataset.decoder is None:
            measured = _converted(dataset.reference, Path(results))
            _check_reference(f"{section(study, name)}.reference", dataset, found, measured)
    return remarks(study)


def _check_notebooks(study: Study, folder: Path) -> None:
    for name in study.notebooks if folder.is_dir() else ():
        if not (folder / f"{name}.ipynb").is_file():
            here = ", ".join(sorted(path.stem for path in folder.glob("*.ipynb")))
            raise UserError(f"notebooks: there is no {folder / name}.ipynb; allowed: {here}")


def _converted(dataset: Images, results: Path) -> tuple[int, int, int] | None:
    """Images, resolution and channels of a data set's archive.

    ``None`` where there is none, or none that the study would still make of its source.
    """
    archive = results / "datasets" / f"{dataset.name}.zip"
    try:
        with zipfile.ZipFile(archive) as file, file.open("dataset.json") as opened:
            meta = json.loads(opened.read(LARGEST_DESCRIPTION))
        images, *shape = (int(meta[key]) for key in ("images", "resolution", "channels"))
    except Exception:  # a file in its place may be damaged in any way; the jobs will say so
        return None
    wanted = dataset.images or min(images, dataset.max_images or images)
    fixed = zip(shape, dataset.shape)
    if images != wanted or any(asked not in (None, found) for found, asked in fixed):
        return None
    former = contents.made_from(archive)
    if former is not None and contents.source(dataset.path, archive) != former:
        return None
    return images, *shape


def _check_reference(
    where: str,
    dataset: Dataset,
    data: tuple[int, int, int] | None,
    reference: tuple[int, int, int] | None,
) -> None:
    """Raise ``UserError`` where samples have another shape than what they are measured against."""
    measured = dataset.measured
    ours, theirs = (
        known[1:] if known else one.shape for known, one in ((data, dataset), (reference, measured))
    )
    for key, mine, other in zip(("resolution", "channels"), ours, theirs, strict=True):
        if None not in (mine, other) and mine != other:
            raise UserError(
                f"{where}: {measured.name} has {key} {other}, but the samples are like "
                f"{dataset.name}, whose {key} is {mine}; make them equal with resolution and color"
            )


def missing_files(
    study: Study, runs: Mapping[str, Run], results: str | Path = "results"
) -> list[str]:
    """A line for every file or folder that a study names, still needs, and that is not there."""
    results = Path(results)
    folder = results / study.study / "runs"
    wanted: list[tuple[str, str | None, Iterable[Path]]] = []
    for name, dataset in study.data.items():
        where = section(study, name)
        of_it = [run for run in runs.values() if run.spec.dataset.name == name]
        if not of_it:
            continue
        wanted.append((f"{where}.path", dataset.path, [results / f"datasets/{name}.zip"]))
        if dataset.reference is not None:
            archive = results / f"datasets/{dataset.reference.name}.zip"
            wanted.append((f"{where}.reference.path", dataset.reference.path, [archive]))
        made = (
            folder / run.name / "measurements" / one.name / "generate.json"
            for run in of_it
            for one in run.measurements
        )
        decoder = dataset.decoder
        wanted.append((f"{where}.decoder.weights", decoder and decoder.weights, made))
    for kind, options in study.extractors.items():
        made = (
            folder / run.name / "measurements" / one.name / f"{kind}.json"
            for run in runs.values()
            for one in run.measurements
            if kind in one.extractors
        )
        wanted.append((f"extractor {kind}: weights", getattr(options, "weights", None), made))
    for run in runs.values():
        if run.checkpoint is not None:
            status = folder / run.name / "train/status.json"
            wanted.append((f"{run.display}: checkpoint", run.checkpoint, [status]))
    return [
        f"{where}: {path}: no such file or folder"
        for where, path, made in wanted
        if contents.gone(path) and not all(map(os.path.exists, made))
    ]


def changed_sources(study: Study, results: str | Path = "results") -> list[str]:
    """A line for each data set that is converted anew, since its path leads to other files now."""
    lines = []
    for where, dataset in _images(study.model_dump(mode="json")).values():
        archive = Path(results, "datasets", f"{dataset['name']}.zip")
        former = contents.made_from(archive)
        if former is not None and contents.source(dataset["path"], archive) != former:
            lines.append(
                f"{where}.path: {dataset['path']} does not hold what {archive} was made from; it "
                "is converted anew, and with it everything that depends on it"
            )
    return lines


def kept_archives(study: Study, results: Path) -> list[str]:
    """A line for each data set whose source is not where the study says, and that is there."""
    return [
        f"{where}.path: {dataset['path']}: no such file or folder; {archive} stays in use"
        for where, dataset in _images(study.model_dump(mode="json")).values()
        if contents.gone(dataset["path"])
        and (archive := results / "datasets" / f"{dataset['name']}.zip").exists()
    ]
