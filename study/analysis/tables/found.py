"""What did every run leave on disk, and which arm is it of?"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study.analysis.names import AXES, flat, word
from study.files import UserError, canonical_json, read_json

Load = Callable[[Path], dict[str, Any]]
"""The content of a JSON file; empty where it is missing or cannot be read."""


@dataclass(frozen=True)
class Score:
    """A number that an extractor's file holds, or a missing one (None) and why."""

    metric: str
    value: Any
    spread: Any
    identity: dict[str, Any]
    note: str


@dataclass(frozen=True)
class Measurement:
    """One measurement that the manifest lists for a run, and the JSON files that exist for it.

    ``cell`` says how it is made, ``wanted`` holds the metrics by extractor; ``generate`` and
    ``records`` (by extractor) are empty where nothing is there yet.
    """

    folder: Path
    protocols: list[str]
    step: int | None
    last: bool
    best_of: str
    images: int | None
    cell: dict[str, Any]
    wanted: dict[str, list[str]]
    generate: dict[str, Any]
    records: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, entry: Mapping[str, Any], run: Path, load: Load) -> "Measurement":
        folder = run / "measurements" / entry["measurement"]
        generate = load(folder / "generate.json")
        records = {one: load(folder / f"{one}.json") for one in entry["extractors"]}
        asked, step = entry.get("images"), entry.get("step")
        if asked is None and "images" in generate:
            asked = generate["images"] + (generate.get("not_finite") or 0)
        return cls(
            folder=folder,
            protocols=list(entry["protocols"]),
            step=generate.get("step") if step is None else step,  # of a best one, known afterwards
            last=bool(entry.get("last")),
            best_of=entry.get("best_of", ""),
            images=asked,
            cell=dict(entry["cell"]),
            wanted=dict(entry["extractors"]),
            generate=generate,
            records={one: record for one, record in records.items() if record},
        )

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def lack(self) -> str:
        """What is missing of it, in words."""
        absent = [one for one in self.wanted if one not in self.records]
        if not self.generate:
            return "not sampled"
        if not absent:
            return ""
        return f"not evaluated with {', '.join(absent)}" if self.records else "not evaluated"

    @property
    def evaluation(self) -> str:
        """What became of the evaluation, by all extractors: "missing", "skipped" or "done"."""
        states = {record.get("status", "missing") for record in self.records.values()}
        if self.records.keys() != self.wanted.keys():
            return "missing"
        return states.pop() if len(states) == 1 else "done"

    @property
    def reason(self) -> str:
        """Why numbers are missing that were to be measured."""
        reasons = [record.get("reason") for record in self.records.values()]
        return "; ".join(dict.fromkeys(filter(None, reasons)))

    def scores(self, extractor: str) -> list[Score]:
        """The numbers of one extractor. Raises ``UserError`` where one has no identity."""
        record = self.records.get(extractor, {})

        def part(section: str) -> dict[str, Any]:
            return record.get(section) or {}

        for metric in part("metrics"):
            if not part("identity").get(metric):
                path = self.folder / f"{extractor}.json"
                raise UserError(f"{path}: metric {metric} has no identity")
        return [
            Score(
                metric,
                value,
                part("spread").get(metric),
                part("identity")[metric],
                part("notes").get(metric, ""),
            )
            for metric, value in part("metrics").items()
        ]


@dataclass
class Found:
    """One manifest entry and the JSON files that exist for it."""

    run: str
    arm: str
    display: str
    axes: dict[str, str]
    spec: dict[str, Any]
    folder: Path
    train: dict[str, Any]
    progress: dict[str, Any]
    measurements: list[Measurement]

    @classmethod
    def read(cls, entry: Mapping[str, Any], results: Path, problems: list) -> "Found":
        folder = results / "runs" / entry["run"]

        def load(path: Path) -> dict[str, Any]:
            if not path.is_file():
                return {}
            try:
                content = read_json(path)
            except UserError as error:
                problems.append(problem("error", "unreadable file", entry["run"], str(error)))
                return {}
            return content if isinstance(content, dict) else {}

        return cls(
            run=entry["run"],
            arm=entry.get("arm") or without(entry["spec"], "seeds"),
            display=entry.get("display", entry["run"]),
            axes=dict(entry["axes"]),
            spec=entry["spec"],
            folder=folder,
            train=load(folder / "train" / "status.json"),
            progress=load(folder / "state" / "progress.json"),
            measurements=[
                Measurement.read(one, folder, load) for one in entry.get("measurements", ())
            ],
        )

    @property
    def main(self) -> Measurement | None:
        """The measurement whose numbers speak for the run; None where it has none."""
        return self.measurements[0] if self.measurements else None

    @property
    def generate(self) -> dict[str, Any]:
        return self.main.generate if self.main else {}

    def scores(self) -> list[Score]:
        """The numbers of the main measurement."""
        main = self.main
        return [one for name in main.wanted for one in main.scores(name)] if main else []

    def axis(self, name: str) -> str:
        return str(self.axes.get(name, ""))

    @property
    def dataset(self) -> str:
        """The name of its data set, which no other data set of the study has."""
        return str((self.spec.get("dataset") or {}).get("name", ""))

    @property
    def axes_key(self) -> tuple[str, ...]:
        """What people see; arms that share it differ in some other setting."""
        return self.dataset, *(self.axis(axis) for axis in [*AXES, "training"])

    @property
    def status(self) -> str:
        if self.train:
            return "diverged" if self.train.get("status") == "diverged" else "done"
        return "running" if self.progress else "missing"

    @property
    def splits(self) -> bool:
        """Whether the run is of several networks, trained one after another."""
        formulation = self.spec.get("formulation") or {}
        return bool(formulation.get("splits")) and formulation.get("split") is None

    @property
    def seeds(self) -> dict[str, Any]:
        return dict(self.spec.get("seeds") or {})


def problem(severity: str, check: str, run: str, detail: str) -> dict[str, str]:
    return {"severity": severity, "check": check, "run": run, "detail": detail}


def without(spec: Mapping[str, Any], *sections: str) -> str:
    return canonical_json({key: value for key, value in spec.items() if key not in sections})


def labels(found: list[Found]) -> dict[str, dict[str, str]]:
    """The words for each run's arm.

    ``arm`` names everything but the seeds. ``variant`` holds the data set where the study has
    several, and where the axes do not tell two arms apart the settings in which they differ.
    ``line`` is the row of an arm in a picture: its backbone, and its formulation and variant where
    the backbone has several. ``display`` is the arm's name for people, with the same settings
    behind it where other arms share that name.
    """
    formulations = defaultdict(set)
    by_axes = defaultdict(dict)
    for one in found:
        formulations[one.axis("backbone")].add(one.axis("formulation"))
        by_axes[one.axes_key][one.arm] = flat(
            {key: value for key, value in one.spec.items() if key != "seeds"}
        )
    several = len({formulation for group in formulations.values() for formulation in group}) > 1
    datasets = len({one.dataset for one in found}) > 1
    answer = {}
    for one in found:
        axes = {axis: one.axis(axis) for axis in AXES}
        group = by_axes[one.axes_key]
        extra = [one.dataset] if datasets else []
        extra += [one.axis("training")] if one.axis("training") else []
        if len(group) > 1:
            keys = sorted({key for settings in group.values() for key in settings})
            unlike = [k for k in keys if len({repr(s.get(k)) for s in group.values()}) > 1]
            extra += [f"{key}={word(group[one.arm].get(key))}" for key in unlike]
        variant = ", ".join(extra)
        line = [axes["backbone"]]
        line += [axes["formulation"]] if len(formulations[axes["backbone"]]) > 1 else []
        arm = [axes["backbone"], axes["skip_scaling"], axes["target"]]
        arm += [axes["formulation"]] if several else []
        tail = [variant] if variant else []
        answer[one.run] = {
            **axes,
            "dataset": one.dataset,
            "arm": " / ".join(arm + tail),
            "variant": variant,
            "line": " / ".join(line + tail),
            "family": str((one.spec.get("backbone") or {}).get("family", "")),
            "method": str((one.spec.get("skip_scaling") or {}).get("method", "")),
            "target_kind": str((one.spec.get("target") or {}).get("kind", "")),
        }
    _tell_apart(found, answer, several)
    return answer


def _tell_apart(found: list[Found], labels: dict[str, dict[str, str]], several: bool) -> None:
    """Add ``display``; ``several``: the study has more than one formulation."""
    named: dict[str, dict[str, str]] = defaultdict(dict)
    for one in found:
        label = labels[one.run]
        words = [label["formulation"]] * several + [label["variant"]]
        named[one.display][label["arm"]] = ", ".join(filter(None, words))
    for one in found:
        label, twins = labels[one.run], named[one.display]
        own = twins[label["arm"]]
        own = own if len(set(twins.values())) == len(twins) and own else label["arm"]
        label["display"] = f"{one.display} ({own})" if len(twins) > 1 else one.display
