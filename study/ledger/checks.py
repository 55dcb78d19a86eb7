"""A study against what lies here: other studies, converted data sets, files that it names."""

import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from study.arms import NOT_SETTINGS, Run, remarks
from study.combinations import check_archive
from study.files import UserError, read_json
from study.ledger import contents
from study.spec.data import Dataset
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
        try:
            _check_other(ours, read_json(path)["config"], path.parent, sources)
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}: not the description of a study of this version; move {path.parent} away"
            ) from None


def _check_other(
    ours: Mapping[str, Any],
    other: Mapping[str, Any],
    folder: Path,
    sources: Mapping[str, str] | None,
) -> None:
    """The same of one other study, whose results are in ``folder``."""
    if other["study"] == ours["study"]:
        return
    _check_classifier(ours, other, folder)
    for where, mine in _datasets(ours).items():
        for theirs in _datasets(other).values():
            _check_same(where, mine, theirs, folder)
            if sources is not None and mine["name"] == theirs["name"]:
                archive = str(folder.parent / "datasets" / f"{mine['name']}.zip")
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


def _check_classifier(ours: Mapping[str, Any], theirs: Mapping[str, Any], folder: Path) -> None:
    """Studies whose features come from a classifier of the same data set share that classifier."""
    mine, other = ours["evaluation"], theirs["evaluation"]
    if not mine["extractor"] == other["extractor"] == "digits":
        return
    if ours["dataset"]["name"] != theirs["dataset"]["name"]:
        return
    if mine["seed"] != other.get("seed", 0):
        raise UserError(
            f"evaluation.seed: {folder} has trained the classifier of "
            f"{ours['dataset']['name']!r} with seed {other.get('seed', 0)}, which all studies of "
            f"this data set share; take that seed, give the data set another name, or delete "
            "that folder"
        )


def _datasets(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The data sets of a resolved study by the section that describes them."""
    found = {
        "dataset": config["dataset"],
        "evaluation.reference": config["evaluation"].get("reference"),
    }
    return {where: dataset for where, dataset in found.items() if dataset is not None}


def _check_same(
    where: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], folder: Path
) -> None:
    if ours["name"] != theirs["name"]:
        return
    for key in ours:
        if key not in NOT_SETTINGS and ours[key] != theirs.get(key):
            raise UserError(
                f"{where}.name: {ours['name']!r} is a data set of {folder} with {key}: "
                f"{theirs.get(key)!r} instead of {ours[key]!r}; choose another name, or delete "
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
    found = {}
    for where, dataset in (("dataset", study.dataset), ("reference", study.evaluation.reference)):
        if dataset is not None:
            found[where] = _converted(dataset, Path(results))
    if found["dataset"] is not None:
        images, *shape = found["dataset"]
        check_archive(dict(runs), study.dataset.name, images, tuple(shape))
    _check_reference(study, found["dataset"], found.get("reference"))
    return remarks(study)


def _check_notebooks(study: Study, folder: Path) -> None:
    for name in study.notebooks if folder.is_dir() else ():
        if not (folder / f"{name}.ipynb").is_file():
            here = ", ".join(sorted(path.stem for path in folder.glob("*.ipynb")))
            raise UserError(f"notebooks: there is no {folder / name}.ipynb; allowed: {here}")


def _converted(dataset: Dataset, results: Path) -> tuple[int, int, int] | None:
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
    study: Study,
    data: tuple[int, int, int] | None,
    reference: tuple[int, int, int] | None,
) -> None:
    """Raise ``UserError`` where samples have another shape than what they are measured against."""
    measured = study.evaluation.reference
    if measured is None or study.generation.decoder is not None:
        return
    pairs = []
    for known, dataset in ((data, study.dataset), (reference, measured)):
        shape = known[1:] if known else dataset.shape
        pairs.append(shape)
    for key, ours, theirs in zip(("resolution", "channels"), *pairs, strict=True):
        if None not in (ours, theirs) and ours != theirs:
            raise UserError(
                f"evaluation.reference: {measured.name} has {key} {theirs}, but the samples are "
                f"like {study.dataset.name}, whose {key} is {ours}; make them equal with "
                "resolution and color"
            )


def missing_files(
    study: Study, runs: Mapping[str, Run], results: str | Path = "results"
) -> list[str]:
    """A line for every file or folder that a study names, still needs, and that is not there."""
    results = Path(results)
    folder = results / study.study / "runs"
    decoder, measured = study.generation.decoder, study.evaluation.reference
    wanted: list[tuple[str, str | None, Iterable[Path]]] = [
        ("dataset.path", study.dataset.path, [results / f"datasets/{study.dataset.name}.zip"]),
        (
            "generation.decoder.weights",
            decoder and decoder.weights,
            (folder / run / "generate/generate.json" for run in runs),
        ),
        (
            "evaluation.weights",
            study.evaluation.weights,
            (folder / run / "evaluate/fidelity.json" for run in runs),
        ),
    ]
    if measured is not None:
        archive = results / f"datasets/{measured.name}.zip"
        wanted.append(("evaluation.reference.path", measured.path, [archive]))
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
    for where, dataset in _datasets(study.model_dump(mode="json")).items():
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
        for where, dataset in _datasets(study.model_dump(mode="json")).items()
        if contents.gone(dataset["path"])
        and (archive := results / "datasets" / f"{dataset['name']}.zip").exists()
    ]
