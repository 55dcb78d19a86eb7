"""From the runs on disk to tidy tables: one row per run, per run x metric, per arm, per pair.

The same inputs give the same bytes: fixed columns, sorted rows, ten significant digits.
A diverged run is a row that says so; a run that left nothing is "missing", and never an error.
Two identities never share a metric name: that is an error which names both.
"""

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from study.analysis import stability, statistics
from study.arms import complete
from study.files import UserError, atomic, canonical_json, read_json
from study.probes.columns import MEASURED
from study.probes.options import OPTIONS

AXES = ["backbone", "skip_scaling", "target", "formulation"]
ARM = ["arm", *AXES, "variant", "line"]


def _names(text: str) -> list[str]:
    """Column names written as words; {arm} stands for the columns that say which arm a row is."""
    return text.format(arm=" ".join(ARM)).split()


COLUMNS = {
    "runs": _names("""
        run display {arm} family method target_kind conditional precision
        seed data_seed init_seed noise_seed
        dataset dataset_note status step steps reason last_finite_step last_finite_loss
        last_finite_grad_norm final_loss parameters skips skip_factors images_seen generation
        evaluation images sampling_seed sampler nfe git_commit git_changed device torch_version
        versions"""),
    "metrics": _names("""
        run {arm} seed status metric base extractor images value identity note"""),
    "summary": _names("""
        {arm} metric identity better n mean standard_deviation min_of_n max_of_n ci_low ci_high
        n_runs n_diverged n_missing n_not_measured n_otherwise note"""),
    "comparisons": _names("""
        {arm} baseline metric identity better n_pairs n_diverged_pairs mean_difference ci_low
        ci_high p_value p_holm tests_in_family detectable_difference verdict note"""),
    "cost": _names("""
        run {arm} seed status device parameters skips steps images_seen nfe train_seconds
        train_images_per_second median_step_seconds train_peak_memory_mib generated_images
        generate_seconds generate_images_per_second generate_peak_memory_mib"""),
    "dynamics": _names("run quantity where step value raw minimum maximum points"),
    "oscillation": _names("""
        run quantity where window_first_step window_last_step points level oscillation"""),
    "measures": _names("run {arm} seed status measure value better note"),
    "stability": _names("""
        {arm} measure better against baseline n mean mean_low mean_high n_runs n_diverged n_missing
        test n_pairs n_diverged_pairs factor factor_low factor_high p_value p_holm tests_in_family
        detectable_factor verdict note"""),
    "stability_pairs": _names("""
        run {arm} seed status measure better against baseline baseline_run seeds factor note"""),
    "qc": _names("severity check run detail"),
}
INTEGERS = set(
    _names("""
        data_seed init_seed noise_seed step steps last_finite_step parameters skips images_seen
        images sampling_seed nfe n n_runs n_diverged n_missing n_not_measured n_otherwise n_pairs
        n_diverged_pairs
        tests_in_family points window_first_step window_last_step generated_images""")
)
NUMBERS = set(
    _names("""
        last_finite_loss last_finite_grad_norm final_loss value raw minimum maximum mean min_of_n
        max_of_n standard_deviation ci_low ci_high mean_low mean_high mean_difference p_value
        p_holm detectable_difference factor factor_low factor_high detectable_factor
        train_seconds train_images_per_second median_step_seconds train_peak_memory_mib
        generate_seconds generate_images_per_second generate_peak_memory_mib level oscillation""")
)
TABLES = (
    *("runs", "metrics", "identities", "summary", "comparisons", "cost"),
    *("oscillation", "measures", "stability", "stability_pairs", "qc"),
)

# Points that are kept of one curve: a quantity of the whole network, or one of many places.
CURVE_POINTS, PLACE_POINTS = 60, 30
# Quantities whose wobble about the smoothed curve is a result (ScaleLong, figure 1).
OSCILLATING = ("loss", "grad_norm", "decoder_norm_after", "decoder_frobenius_after")
# The window of the oscillation number: so many steps, and at least so many logged points.
WINDOW_STEPS, WINDOW_POINTS = 500, 8
# Why a finished run has no value in a column: none could be had, or another column holds it.
NOT_MEASURED, OTHERWISE = "not measured", "measured otherwise"

LOWER_IS_BETTER = ("fid", "fd", "kid")
_PLAUSIBLE = {
    "fid": (-1e-6, math.inf),
    "fd": (-1e-6, math.inf),
    "is": (1 - 1e-6, math.inf),
    "precision": (0.0, 1.0),
    "recall": (0.0, 1.0),
}


@dataclass(frozen=True)
class MetricName:
    """The parts of a metric's name: ``fd_digits_1797``, ``fid_50000``, ``fid_50000_ab12cd34``.

    ``way`` is the identity, in the name where runs measured the metric in several ways.
    """

    base: str
    features: str
    images: int | None
    way: str

    @classmethod
    def parse(cls, metric: str) -> "MetricName":
        found = re.fullmatch(r"([^_]+)(?:_(.+?))??(?:_(\d+)(?:_([0-9a-f]{8}))?)?", metric)
        base, features, images, way = found.groups() if found else (metric, "", None, "")
        return cls(base, features or "", None if images is None else int(images), way or "")


def better(metric: str) -> str:
    """ "lower" or "higher": the side of a metric on which the better arms lie."""
    return "lower" if MetricName.parse(metric).base in LOWER_IS_BETTER else "higher"


# --- reading ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tables:
    """The tables of one study, as written by :func:`aggregate`.

    ``results`` is the study's results folder; only the sample grids need it.
    """

    folder: Path
    results: Path | None
    runs: pd.DataFrame
    metrics: pd.DataFrame
    identities: pd.DataFrame
    summary: pd.DataFrame
    comparisons: pd.DataFrame
    cost: pd.DataFrame
    oscillation: pd.DataFrame
    measures: pd.DataFrame
    stability: pd.DataFrame
    stability_pairs: pd.DataFrame
    qc: pd.DataFrame
    dynamics: pd.DataFrame
    probes: dict[str, pd.DataFrame] = field(default_factory=dict)
    """By kind: the rows of a probe, with a column ``run`` where it looks at runs or arms."""

    @classmethod
    def read(cls, folder: str | Path, results: str | Path | None = None) -> "Tables":
        """Read the tables in ``folder``.

        Raises ``UserError`` where one is missing, or lacks a column that today's have.
        """
        folder = Path(folder)
        frames = {}
        for name in TABLES:
            path = folder / f"{name}.csv"
            if not path.is_file():
                raise UserError(f"{path}: no such table; `study aggregate` writes it")
            frame = pd.read_csv(path, keep_default_na=False, dtype=str, encoding="utf-8")
            lacking = [column for column in COLUMNS.get(name, ()) if column not in frame.columns]
            if lacking:
                raise UserError(
                    f"{path}: has no column {lacking[0]}: another version wrote it; "
                    "`study aggregate` makes the tables anew"
                )
            frames[name] = _typed(frame)
        path = folder / "dynamics.parquet"
        if not path.is_file():
            raise UserError(f"{path}: no such table; `study aggregate` writes it")
        frames["dynamics"] = pd.read_parquet(path)
        frames["probes"] = {
            path.stem.removeprefix("probe_"): pd.read_parquet(path)
            for path in sorted(folder.glob("probe_*.parquet"))
        }
        return cls(folder, None if results is None else Path(results), **frames)

    def only(self, **axes: Any) -> "Tables":
        """The same tables for the runs whose columns equal (or are among) the given values.

        >>> tables.only(family="uvit", target_kind="dsm")                     # doctest: +SKIP
        """
        runs = self.runs
        for column, wanted in axes.items():
            values = [wanted] if isinstance(wanted, str | int) else list(wanted)
            runs = runs[runs[column].isin(values)]
        changed: dict[str, Any] = {"runs": runs}
        for part in fields(self):
            frame = getattr(self, part.name)
            if part.name in ("runs", "qc", "identities") or not isinstance(frame, pd.DataFrame):
                continue
            column = "run" if "run" in frame.columns else "arm"
            changed[part.name] = frame[frame[column].isin(set(runs[column]))]
        changed["probes"] = {
            kind: frame[frame["run"].isin(set(runs["run"]))] if "run" in frame.columns else frame
            for kind, frame in self.probes.items()
        }
        return replace(self, **changed)

    def probe(self, kind: str) -> pd.DataFrame:
        """The rows of a probe, with the words of their runs; empty where it was not made.

        Rows of runs get the columns of ``runs`` that say which arm they belong to (``arm``,
        ``line``, ``backbone``, ``family``, ``skip_scaling``, ``target``, ``seed``, ``status``).
        """
        frame = self.probes.get(kind, pd.DataFrame())
        if "run" not in frame.columns or frame.empty:
            return frame
        words = ["run", "arm", "line", "backbone", "family", "skip_scaling", "target", "seed"]
        return frame.merge(self.runs[[*words, "status"]], on="run", validate="many_to_one")

    def metric_names(self) -> list[str]:
        """Every metric of the study, the leading one first.

        Leading is the Inception FID, else a Fréchet distance, on the most images; then the others
        by name.
        """
        counts = self.metrics.dropna(subset=["value"]).groupby("metric")["run"].count()

        def rank(metric: str) -> tuple:
            name = MetricName.parse(metric)
            order = ["fid", "fd", "kid", "is", "precision", "recall"]
            return (
                order.index(name.base) if name.base in order else len(order),
                -int(counts.get(metric, 0)),
                -(name.images or 0),
                metric,
            )

        return sorted({name for name in self.metrics["metric"] if name}, key=rank)

    def ways(self, metric: str | None) -> list[str]:
        """The metric and all others that are the same but for how they were measured, it first.

        Each run has at most one of them; two of them never compare.
        """
        if metric is None:
            return []
        wanted = replace(MetricName.parse(metric), way="")
        names = [
            name
            for name in self.metric_names()
            if name != metric and replace(MetricName.parse(name), way="") == wanted
        ]
        return [metric, *names]

    def by_arm(self, frame: pd.DataFrame, metric: str | None, column: str) -> pd.DataFrame:
        """One row of ``frame`` for each arm, on the metric or the way in which it was measured.

        ``column`` is what a row must hold; arms that have it nowhere keep the row of the metric.
        """
        ways = self.ways(metric)
        rows = frame[frame["metric"].isin(ways)]
        empty = rows[column].fillna(0) == 0
        place = [ways.index(name) + len(ways) * none for name, none in zip(rows["metric"], empty)]
        ordered = rows.iloc[np.argsort(place, kind="stable")]
        return ordered.drop_duplicates("arm").sort_index()

    def identity(self, metric: str) -> dict[str, Any]:
        """The fields of a metric's identity; empty where nothing was measured."""
        rows = self.identities[self.identities["metric"] == metric]
        if rows.empty:
            return {}
        return {key: value for key, value in rows.iloc[0].items() if value != ""}


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    for column in frame.columns:
        if column in INTEGERS or column in NUMBERS:
            numbers = pd.to_numeric(frame[column].mask(frame[column] == ""))
            frame[column] = numbers.astype("Int64") if column in INTEGERS else numbers
    return frame


# --- writing ------------------------------------------------------------------------------------


def _write(out: Path, name: str, rows: list[dict[str, Any]], columns: list[str] | None = None):
    columns = columns or COLUMNS[name]
    frame = pd.DataFrame(rows, columns=columns)
    for column in columns:
        if column in INTEGERS:
            frame[column] = pd.to_numeric(frame[column]).astype("Int64")
        elif column in NUMBERS:
            frame[column] = pd.to_numeric(frame[column]).astype("float64")
    _write_csv(out / f"{name}.csv", frame)


def _write_csv(path: Path, frame: pd.DataFrame) -> None:
    with atomic(path) as temporary:
        frame.to_csv(temporary, index=False, float_format="%.10g", lineterminator="\n")


def _write_parquet(path: Path, frame: pd.DataFrame) -> None:
    with atomic(path) as temporary:
        frame.to_parquet(temporary, index=False)


def aggregate(manifest: str | Path | Mapping[str, Any], results: str | Path, out: str | Path):
    """Write every table of a study into ``out``: the names of ``TABLES`` as CSV, the thinned
    training dynamics and the rows of every probe as ``.parquet`` and ``.csv``.

    ``manifest`` is ``study.json`` or its content; ``results`` is ``results/<study>``. Returns the
    number of runs by status. Raises ``UserError`` where runs measured one metric in two ways.
    """
    results, out = Path(results), Path(out)
    if not isinstance(manifest, Mapping):
        manifest = read_json(manifest)
    problems: list[dict[str, Any]] = []
    found = [_Found.read(entry, results, problems) for entry in manifest["runs"]]
    found.sort(key=lambda one: one.run)
    labels = _labels(found)
    note = _dataset_note(manifest)

    runs = [_run_row(one, labels[one.run], note) for one in found]
    metrics, identities = _metric_rows(found, labels)
    summary = _summary_rows(metrics)
    specs = {labels[one.run]["arm"]: one.spec for one in found}
    seeds = {one.run: canonical_json(one.seeds) for one in found}
    comparisons = _comparison_rows(specs, seeds, metrics)
    dynamics, oscillation = _dynamics(found, problems)

    out.mkdir(parents=True, exist_ok=True)
    _write(out, "runs", runs)
    _write(out, "metrics", metrics)
    fields_seen = sorted({key for row in identities for key in row} - {"identity", "metric"})
    _write(out, "identities", identities, ["identity", "metric", *fields_seen])
    _write(out, "summary", summary)
    _write(out, "comparisons", comparisons)
    _write(out, "cost", [_cost_row(one, labels[one.run]) for one in found])
    _write_parquet(out / "dynamics.parquet", dynamics)
    _write_csv(out / "dynamics.csv", dynamics)
    _write(out, "oscillation", oscillation)
    probes = _probes(manifest, found, results, problems)
    for kind, frame in probes.items():
        _write_parquet(out / f"probe_{kind}.parquet", frame)
        _write_csv(out / f"probe_{kind}.csv", frame)
    for path in [*out.glob("probe_*.parquet"), *out.glob("probe_*.csv")]:
        if path.stem.removeprefix("probe_") not in probes:  # the study no longer has it
            path.unlink()
    imported = {one.run for one in found if "imported" in one.train}
    split = {one.run for one in found if one.splits}
    measures = stability.measure_rows(runs, oscillation, probes, imported, split)
    _write(out, "measures", measures)
    _write(out, "stability", stability.stability_rows(measures, specs, seeds))
    _write(out, "stability_pairs", stability.pair_rows(measures, specs, seeds))
    problems += _quality_checks(found, runs, metrics)
    problems += _log_spacings(oscillation)
    order = {"error": 0, "warning": 1, "note": 2}
    problems.sort(key=lambda row: (order[row["severity"]], row["check"], row["run"], row["detail"]))
    _write(out, "qc", problems)
    counts: dict[str, int] = defaultdict(int)
    for row in runs:
        counts[row["status"]] += 1
    return dict(counts)


# --- what one run left on disk --------------------------------------------------------------------


@dataclass
class _Found:
    """One manifest entry and the JSON files that exist for it."""

    run: str
    arm: str
    display: str
    axes: dict[str, str]
    spec: dict[str, Any]
    folder: Path
    train: dict[str, Any]
    generate: dict[str, Any]
    fidelity: dict[str, Any]
    progress: dict[str, Any]

    @classmethod
    def read(cls, entry: Mapping[str, Any], results: Path, problems: list) -> "_Found":
        folder = results / "runs" / entry["run"]

        def load(path: Path) -> dict[str, Any]:
            if not path.is_file():
                return {}
            try:
                content = read_json(path)
            except UserError as error:
                problems.append(_problem("error", "unreadable file", entry["run"], str(error)))
                return {}
            return content if isinstance(content, dict) else {}

        return cls(
            run=entry["run"],
            arm=entry.get("arm") or _without(entry["spec"], "seeds"),
            display=entry.get("display", entry["run"]),
            axes=dict(entry["axes"]),
            spec=entry["spec"],
            folder=folder,
            train=load(folder / "train" / "status.json"),
            generate=load(folder / "generate" / "generate.json"),
            fidelity=load(folder / "evaluate" / "fidelity.json"),
            progress=load(folder / "state" / "progress.json"),
        )

    def axis(self, name: str) -> str:
        return str(self.axes.get(name, ""))

    @property
    def axes_key(self) -> tuple[str, ...]:
        """The axes that people see; arms that share them differ in some other setting."""
        return tuple(self.axis(axis) for axis in [*AXES, "training"])

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

    @property
    def metrics(self) -> dict[str, float]:
        return dict(self.fidelity.get("metrics") or {})


def _problem(severity: str, check: str, run: str, detail: str) -> dict[str, str]:
    return {"severity": severity, "check": check, "run": run, "detail": detail}


def _dataset_note(manifest: Mapping[str, Any]) -> str:
    """The dataset's own remark (for example that it is a lossy copy), from config or spec."""
    places = [(manifest.get("config") or {}).get("dataset")]
    places += [entry["spec"].get("dataset") for entry in manifest["runs"][:1]]
    for place in places:
        if isinstance(place, Mapping) and place.get("note"):
            return " ".join(str(place["note"]).split())
    return ""


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(content, Mapping) and content:
        answer: dict[str, Any] = {}
        for key, value in content.items():
            answer.update(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
        return answer
    return {prefix: content}


def _without(spec: Mapping[str, Any], *sections: str) -> str:
    return canonical_json({key: value for key, value in spec.items() if key not in sections})


def _labels(found: list[_Found]) -> dict[str, dict[str, str]]:
    """The words for each run's arm.

    ``arm`` names everything but the seeds. Where the axes do not tell two arms apart, ``variant``
    holds the settings in which they differ. ``line`` is the row of an arm in a picture: its
    backbone, and its formulation and variant where the backbone has several. ``display`` is the
    arm's name for people, with the same settings behind it where other arms share that name.
    """
    formulations = defaultdict(set)
    by_axes = defaultdict(dict)
    for one in found:
        formulations[one.axis("backbone")].add(one.axis("formulation"))
        by_axes[one.axes_key][one.arm] = _flat(
            {key: value for key, value in one.spec.items() if key != "seeds"}
        )
    several = len({formulation for group in formulations.values() for formulation in group}) > 1
    labels = {}
    for one in found:
        axes = {axis: one.axis(axis) for axis in AXES}
        group = by_axes[one.axes_key]
        extra = [one.axis("training")] if one.axis("training") else []
        if len(group) > 1:
            keys = sorted({key for settings in group.values() for key in settings})
            unlike = [k for k in keys if len({repr(s.get(k)) for s in group.values()}) > 1]
            extra += [f"{key}={_word(group[one.arm].get(key))}" for key in unlike]
        variant = ", ".join(extra)
        line = [axes["backbone"]]
        line += [axes["formulation"]] if len(formulations[axes["backbone"]]) > 1 else []
        arm = [axes["backbone"], axes["skip_scaling"], axes["target"]]
        arm += [axes["formulation"]] if several else []
        tail = [variant] if variant else []
        labels[one.run] = {
            **axes,
            "arm": " / ".join(arm + tail),
            "variant": variant,
            "line": " / ".join(line + tail),
            "family": str((one.spec.get("backbone") or {}).get("family", "")),
            "method": str((one.spec.get("skip_scaling") or {}).get("method", "")),
            "target_kind": str((one.spec.get("target") or {}).get("kind", "")),
        }
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
    return labels


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _finite(value: Any) -> float | None:
    """JSON writes non-finite numbers as null; both mean that there is no value."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None


def _run_row(one: _Found, label: dict[str, str], note: str) -> dict[str, Any]:
    train, last = one.train, one.train.get("last_finite") or {}
    provenance = train.get("provenance") or {}
    git, packages = provenance.get("git") or {}, provenance.get("packages") or {}
    factors = train.get("skip_factors")
    generate = one.generate
    return {
        **label,
        "run": one.run,
        "seed": one.axis("seed"),
        "data_seed": one.seeds.get("data"),
        "init_seed": one.seeds.get("init"),
        "noise_seed": one.seeds.get("noise"),
        "conditional": str(bool((one.spec.get("training") or {}).get("conditional"))).lower(),
        "precision": (one.spec.get("training") or {}).get("precision", ""),
        "dataset": (one.spec.get("dataset") or {}).get("name", ""),
        "dataset_note": note,
        "status": one.status,
        "step": train.get("step", one.progress.get("step")),
        "steps": train.get("steps", (one.spec.get("training") or {}).get("steps")),
        "reason": train.get("reason") or "",
        "last_finite_step": last.get("step"),
        "last_finite_loss": _finite(last.get("loss")),
        "last_finite_grad_norm": _finite(last.get("grad_norm")),
        "final_loss": _finite(train.get("final_loss")),
        "parameters": train.get("parameters"),
        "skips": train.get("skips"),
        "skip_factors": ""
        if factors is None
        else " ".join("learned" if f is None else f"{f:.4g}" for f in factors),
        "images_seen": train.get("images_seen"),
        "generation": generate.get("status", "missing"),
        "evaluation": one.fidelity.get("status", "missing"),
        "images": generate.get("images"),
        "sampling_seed": generate.get("seed"),
        "sampler": canonical_json(generate["sampler"]) if generate.get("sampler") else "",
        "nfe": generate.get("nfe"),
        "git_commit": git.get("commit") or "",
        "git_changed": "" if git.get("changed") is None else str(bool(git["changed"])).lower(),
        "device": provenance.get("device") or provenance.get("processor") or "",
        "torch_version": packages.get("torch", ""),
        "versions": ", ".join(
            f"{name} {version}"
            for name, version in [("python", provenance.get("python")), *sorted(packages.items())]
        ),
    }


def _cost_row(one: _Found, label: dict[str, str]) -> dict[str, Any]:
    provenance = one.train.get("provenance") or {}
    train, generate = one.train, one.generate
    return {
        **label,
        "run": one.run,
        "seed": one.axis("seed"),
        "status": one.status,
        "device": provenance.get("device") or provenance.get("processor") or "",
        "parameters": train.get("parameters"),
        "skips": train.get("skips"),
        "steps": train.get("step"),
        "images_seen": train.get("images_seen"),
        "nfe": generate.get("nfe"),
        "train_seconds": _finite(train.get("train_seconds")),
        "train_images_per_second": _finite(train.get("images_per_second")),
        "median_step_seconds": _median_step(one.folder / "train" / "timing.parquet"),
        "train_peak_memory_mib": _finite(train.get("peak_memory_mib")),
        "generated_images": generate.get("images"),
        "generate_seconds": _finite(generate.get("seconds")),
        "generate_images_per_second": _finite(generate.get("images_per_second")),
        "generate_peak_memory_mib": _finite(generate.get("peak_memory_mib")),
    }


def _median_step(path: Path) -> float | None:
    """Median seconds per training step: unlike the total it forgives a machine that was busy."""
    try:
        frame = pd.read_parquet(path, columns=["quantity", "value"])
    except (OSError, ValueError, KeyError):
        return None
    values = frame.loc[frame["quantity"] == "step_seconds", "value"]
    return float(values.median()) if len(values) else None


# --- metrics --------------------------------------------------------------------------------------


def _part_identities(found: list[_Found]) -> None:
    """A metric that runs measured in unlike ways gets a name for each: <metric>_<identity>.

    So two identities never share a column, and no run is left out for having another. Raises
    ``UserError`` where a metric has no identity.
    """
    ways: dict[str, set[str]] = defaultdict(set)
    for one in found:
        for metric in one.metrics:
            identity = (one.fidelity.get("identity") or {}).get(metric)
            if not identity:
                raise UserError(
                    f"{one.folder / 'evaluate' / 'fidelity.json'}: metric {metric} has no identity"
                )
            ways[metric].add(_identity_id(identity))
    for one in found:
        for metric in one.metrics:
            if len(ways[metric]) == 1:
                continue
            name = f"{metric}_{_identity_id(one.fidelity['identity'][metric])}"
            for section in ("metrics", "identity", "notes", "spread"):
                values = one.fidelity.get(section) or {}
                if metric in values:
                    values[name] = values.pop(metric)


def _unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """In what the first of two identities differs from the second."""
    mine, theirs = _flat(one), _flat(other)
    return ", ".join(
        f"{key} {_word(mine.get(key))} instead of {_word(theirs.get(key))}"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    )


def _state(one: _Found, metric: str, identity: Mapping[str, Any]) -> tuple[str, str]:
    """What a run is in the column of a metric, and why it has no value there."""
    if one.status != "done":
        return one.status, ""
    if metric in one.metrics:
        note = (one.fidelity.get("notes") or {}).get(metric, "")
        return "done" if _finite(one.metrics[metric]) is not None else NOT_MEASURED, note
    wanted = replace(MetricName.parse(metric), way="")
    for name in sorted(one.metrics):
        if replace(MetricName.parse(name), way="") == wanted:
            unlike = _unlike(one.fidelity["identity"][name], identity)
            return OTHERWISE, f"measured as {name}: {unlike}"
    reason = one.fidelity.get("reason")
    return (NOT_MEASURED, reason) if reason else ("missing", "")


def _metric_rows(found: list[_Found], labels: dict) -> tuple[list[dict], list[dict]]:
    """Rows of ``metrics.csv`` and ``identities.csv``; every run has a row for every metric."""
    _part_identities(found)
    first: dict[str, tuple[str, dict[str, Any]]] = {}
    for one in found:
        for metric in one.metrics:
            first.setdefault(metric, (one.run, dict(one.fidelity["identity"][metric])))
    rows = []
    for one in found:
        for metric in sorted(first):
            identity = first[metric][1]
            state, note = _state(one, metric, identity)
            rows.append(
                {
                    **labels[one.run],
                    "run": one.run,
                    "seed": one.axis("seed"),
                    "status": state,
                    "metric": metric,
                    "base": MetricName.parse(metric).base,
                    "extractor": identity.get("extractor", ""),
                    "images": identity.get("images"),
                    "value": _finite(one.metrics.get(metric)) if state == "done" else None,
                    "identity": _identity_id(identity) if metric in one.metrics else "",
                    "note": note,
                }
            )
    rows.sort(key=lambda row: (row["metric"], row["run"]))
    identities = [
        {
            "identity": _identity_id(identity),
            "metric": metric,
            **{key: _word(value) for key, value in identity.items() if value is not None},
        }
        for metric, (_, identity) in sorted(first.items())
    ]
    return rows, identities


def _identity_id(identity: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:8]


def _groups(rows: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return groups


def _summary_rows(metrics: list[dict]) -> list[dict]:
    answer = []
    for (metric, _), rows in sorted(_groups(metrics, "metric", "arm").items()):
        values = [row["value"] for row in rows if row["value"] is not None]
        low, high = statistics.bootstrap_interval(values)
        identities = sorted({row["identity"] for row in rows if row["identity"]})
        answer.append(
            {
                **{key: rows[0][key] for key in ARM},
                "metric": metric,
                "identity": " ".join(identities),
                "better": better(metric),
                "n": len(values),
                "mean": float(np.mean(values)) if values else None,
                "standard_deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "min_of_n": min(values, default=None),
                "max_of_n": max(values, default=None),
                "ci_low": low,
                "ci_high": high,
                "n_runs": len(rows),
                "n_diverged": sum(row["status"] == "diverged" for row in rows),
                "n_missing": sum(row["status"] in ("missing", "running") for row in rows),
                "n_not_measured": sum(row["status"] == NOT_MEASURED for row in rows),
                "n_otherwise": sum(row["status"] == OTHERWISE for row in rows),
                "note": "; ".join(
                    dict.fromkeys(
                        row["note"] for row in rows if row["status"] in (NOT_MEASURED, OTHERWISE)
                    )
                ),
            }
        )
    return answer


def _comparison_rows(
    specs: dict[str, dict], seeds: dict[str, str], metrics: list[dict]
) -> list[dict]:
    """Every arm against the unscaled DSM arm that equals it in all else, paired by seeds.

    Holm's correction spans the tests that share a metric and a baseline: one backbone's question.
    Class-conditional arms of unlike targets have a difference and no test.
    """
    baselines = {
        _without(spec, "seeds", "skip_scaling", "target"): arm
        for arm, spec in sorted(specs.items())
        if spec["skip_scaling"].get("method") == "none" and spec["target"].get("kind") == "dsm"
    }
    by_arm = {
        key: {seeds[row["run"]]: row for row in rows}
        for key, rows in _groups(metrics, "metric", "arm").items()
    }
    answer = []
    for (metric, arm), rows in sorted(by_arm.items()):
        baseline = baselines.get(_without(specs[arm], "seeds", "skip_scaling", "target"))
        if baseline is None or baseline == arm:
            continue
        others = by_arm[metric, baseline]
        common = sorted(rows.keys() & others.keys())
        pairs = [(rows[seed], others[seed]) for seed in common]
        both = [(a, b) for a, b in pairs if a["value"] is not None and b["value"] is not None]
        result = statistics.paired([a["value"] - b["value"] for a, b in both])
        why = Counter(
            state
            for a, b in pairs
            for state in ("diverged", NOT_MEASURED, OTHERWISE)
            if state in (a["status"], b["status"])
        )
        lost = why["diverged"]
        # A measured pair is not called absent.
        notes = [result.note] if result.note and why.total() == lost else []
        notes += [f"{n} pair{'s' if n > 1 else ''} left out: {state}" for state, n in why.items()]
        blind = stability.blind(specs[arm], specs[baseline])
        notes = [stability.BLIND, *notes] if blind else notes
        answer.append(
            {
                **{key: labels_of[key] for labels_of in [next(iter(rows.values()))] for key in ARM},
                "baseline": baseline,
                "metric": metric,
                "identity": " ".join(sorted({row["identity"] for pair in both for row in pair})),
                "better": better(metric),
                "n_pairs": result.n,
                "n_diverged_pairs": lost,
                "mean_difference": result.mean,
                "ci_low": result.low,
                "ci_high": result.high,
                "p_value": math.nan if blind else result.p,
                "detectable_difference": math.nan if blind else result.detectable,
                "note": "; ".join(notes),
            }
        )
    for (metric, _), rows in _groups(answer, "metric", "baseline").items():
        adjusted = statistics.holm([row["p_value"] for row in rows])
        family = sum(math.isfinite(row["p_value"]) for row in rows)
        for row, p in zip(rows, adjusted, strict=True):
            row["p_holm"], row["tests_in_family"] = p, family
            row["verdict"] = _verdict(row["mean_difference"], p, better(metric))
    return answer


def _verdict(difference: float, p_holm: float, side: str) -> str:
    if not math.isfinite(p_holm):
        return "no test"
    if p_holm >= 1 - statistics.LEVEL:
        return "no difference shown"
    return "better" if (difference < 0) == (side == "lower") else "worse"


# --- training dynamics ----------------------------------------------------------------------------


def _dynamics(found: list[_Found], problems: list) -> tuple[pd.DataFrame, list[dict]]:
    thinned, oscillation = [], []
    for one in found:
        path = one.folder / "train" / "dynamics.parquet"
        if not path.is_file():
            continue
        try:
            frame = pd.read_parquet(path, columns=["step", "quantity", "where", "value"])
        except (OSError, ValueError, KeyError) as error:
            detail = f"{path.name}: {str(error).splitlines()[0]}"
            problems.append(_problem("error", "unreadable file", one.run, detail))
            continue
        if frame.empty:  # imported weights, which were not trained here
            continue
        frame["where"] = frame["where"].fillna("").astype(str)
        broken = ~np.isfinite(frame["value"].to_numpy(dtype=float))
        if broken.any() and one.status == "done":
            names = ", ".join(sorted(set(frame.loc[broken, "quantity"])))
            detail = f"{int(broken.sum())} non-finite values in {names}, yet the run is done"
            problems.append(_problem("error", "non-finite history", one.run, detail))
        thin = _thin(frame)
        thin.insert(0, "run", one.run)
        thinned.append(thin)
        if not one.splits:  # else the curves end with the last network only
            oscillation += [{"run": one.run, **row} for row in _oscillation(frame)]
    columns = COLUMNS["dynamics"]
    if not thinned:
        empty = {c: pd.Series(dtype="str" if c in columns[:3] else "float64") for c in columns}
        return pd.DataFrame(empty), oscillation
    answer = pd.concat(thinned, ignore_index=True)[columns]
    return answer, oscillation


def _natural(text: str) -> tuple:
    """Sort key under which "10" follows "9" and "block.10" follows "block.9"."""
    return tuple(
        (0, float(part), "") if re.fullmatch(r"[\d.]+(e[+-]?\d+)?", part) else (1, 0.0, part)
        for part in re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)
        if part and part != "."
    )


def _thin(frame: pd.DataFrame) -> pd.DataFrame:
    """At most ``CURVE_POINTS`` points per curve: mean, last raw value and range of each stretch."""
    places = {place: rank for rank, place in enumerate(sorted(set(frame["where"]), key=_natural))}
    frame = frame.assign(_place=frame["where"].map(places))
    frame = frame.sort_values(["quantity", "_place", "step"], kind="stable", ignore_index=True)
    new = (frame["quantity"] != frame["quantity"].shift()) | (
        frame["where"] != frame["where"].shift()
    )
    curve = new.cumsum().to_numpy() - 1
    first = np.flatnonzero(new.to_numpy())
    length = np.diff([*first, len(frame)])
    limit = np.where(frame["where"].to_numpy()[first] == "", CURVE_POINTS, PLACE_POINTS)
    keep = np.minimum(length, limit)
    position = np.arange(len(frame)) - first[curve]
    stretch = position * keep[curve] // length[curve]
    starts = np.flatnonzero(new.to_numpy() | (np.diff(stretch, prepend=-1) != 0))
    ends = np.append(starts[1:], len(frame)) - 1
    value = frame["value"].to_numpy(dtype=float)
    finite = np.isfinite(value)
    count = np.add.reduceat(finite.astype(int), starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(np.where(finite, value, 0.0), starts) / count
    low = np.minimum.reduceat(np.where(finite, value, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite, value, -np.inf), starts)
    return pd.DataFrame(
        {
            "quantity": frame["quantity"].to_numpy()[ends],
            "where": frame["where"].to_numpy()[ends],
            "step": frame["step"].to_numpy()[ends],
            "value": mean,
            "raw": np.where(finite[ends], value[ends], np.nan),
            "minimum": np.where(count > 0, low, np.nan),
            "maximum": np.where(count > 0, high, np.nan),
            "points": ends - starts + 1,
        }
    )


def _oscillation(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Level and wobble of curves at the end of training.

    Over the last ``WINDOW_STEPS`` steps or the last quarter of the run, whichever is shorter:
    ``level`` is the mean, ``oscillation`` the standard deviation about a straight line through
    the window, divided by the level. A curve with fewer than ``WINDOW_POINTS`` points there has
    none.
    """
    rows = []
    frame = frame[frame["quantity"].isin(OSCILLATING) & np.isfinite(frame["value"])]
    for quantity, group in frame.groupby("quantity", sort=True):
        first, last = int(group["step"].min()), int(group["step"].max())
        start = max(last - WINDOW_STEPS, last - (last - first) // 4)
        late = group[group["step"] >= start]
        late = late.drop_duplicates(["step", "where"], keep="last")
        wide = late.pivot(index="step", columns="where", values="value").dropna()
        if len(wide) < WINDOW_POINTS:
            continue
        values = wide.to_numpy()
        level, spread = values.mean(axis=0), statistics.wobble(wide.index.to_numpy(), values)
        for column in sorted(range(wide.shape[1]), key=lambda c: _natural(wide.columns[c])):
            rows.append(
                {
                    "quantity": quantity,
                    "where": wide.columns[column],
                    "window_first_step": int(wide.index[0]),
                    "window_last_step": last,
                    "points": len(wide),
                    "level": level[column],
                    "oscillation": spread[column] / level[column] if level[column] else None,
                }
            )
    return rows


# --- probes ---------------------------------------------------------------------------------------


def _probes(
    manifest: Mapping[str, Any], found: list[_Found], results: Path, problems: list
) -> dict[str, pd.DataFrame]:
    """The rows of every probe of the study; those of runs and arms say whose they are."""
    answer = {}
    lost = {one.run for one in found if one.status == "diverged"}
    for entry in (manifest.get("config") or {}).get("probes") or []:
        kind = entry["kind"]
        if OPTIONS[kind].subject in ("run", "arm"):
            wanted = entry.get("seeds")
            parts = {
                one.run: one.folder / "probes" / f"{kind}.parquet"
                for one in found
                if wanted is None or one.axis("seed") in {str(seed) for seed in wanted}
            }
        else:
            parts = {"": results / "probes" / f"{kind}.parquet"}
        frames = []
        for run, path in parts.items():
            if not path.is_file():
                detail = f"no probes/{kind}.parquet"
                problems.append(_problem("warning", "missing probe", run, detail))
                continue
            try:
                frame = pd.read_parquet(path)
            except (OSError, ValueError) as error:
                detail = f"probes/{path.name}: {str(error).splitlines()[0]}"
                problems.append(_problem("error", "unreadable file", run, detail))
                continue
            problems += _unmeasured(kind, run, path.with_suffix(".json"), lost)
            problems += _infinite_numbers(kind, run, frame)
            if run and len(frame.columns):
                frame.insert(0, "run", run)
            if len(frame):
                frames.append(frame)
        answer[kind] = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    return answer


def _unmeasured(kind: str, run: str, facts: Path, lost: Collection[str]) -> list[dict]:
    """What a probe says that it could not measure; of diverged runs (``lost``) that is known."""
    try:
        reason = read_json(facts).get("reason") if facts.is_file() and run not in lost else None
    except UserError as error:
        return [_problem("error", "unreadable file", run, str(error))]
    detail = f"{kind}: {reason}"
    return [_problem("warning", "probe not measured", run, detail)] if reason else []


def _infinite_numbers(kind: str, run: str, frame: pd.DataFrame) -> list[dict]:
    """A probe leaves out what it could not measure; an infinite measured number is a fault.

    Short trainings that diverged may say so with the number they ended on.
    """
    if "outcome" in frame.columns:
        frame = frame[frame["outcome"] != "diverged"]
    measured = [name for name in MEASURED if name in frame.columns]
    broken = [name for name in measured if np.isinf(frame[name].to_numpy(dtype=float)).any()]
    if not broken:
        return []
    detail = f"{kind}: infinite numbers in {', '.join(broken)}"
    return [_problem("error", "non-finite probe", run, detail)]


# --- quality checks -------------------------------------------------------------------------------


def _completed(spec: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of options that did not exist yet; a spec of another version as it is."""
    try:
        return complete(spec)
    except UserError:
        return spec


def _quality_checks(found: list[_Found], runs: list[dict], metrics: list[dict]) -> list[dict]:
    problems = []
    for one, row in zip(found, runs, strict=True):
        run = one.run
        if row["status"] == "missing":
            problems.append(_problem("warning", "missing run", run, "no train/status.json"))
        elif row["status"] == "running":
            detail = f"stopped or still running at step {row['step']} of {row['steps']}"
            problems.append(_problem("warning", "unfinished run", run, detail))
        elif row["status"] == "done":
            if not one.generate:
                detail = "trained, but no generate/generate.json"
                problems.append(_problem("warning", "no samples", run, detail))
            elif not one.fidelity:
                detail = "sampled, but no evaluate/fidelity.json"
                problems.append(_problem("warning", "no evaluation", run, detail))
            if one.generate.get("reason"):
                detail = one.generate["reason"]
                problems.append(_problem("warning", "samples not finite", run, detail))
            step, steps = row["step"], row["steps"]
            if step is not None and steps is not None and step < steps:
                detail = f"done at step {step} of {steps}"
                problems.append(_problem("error", "stopped early", run, detail))
            if row["final_loss"] is None and "imported" not in one.train:
                problems.append(_problem("error", "non-finite loss", run, "final loss is missing"))
        written = one.train.get("spec") if one.train else None
        if written is not None and _completed(written) != _completed(one.spec):
            detail = "the spec on disk is not the manifest's"
            problems.append(_problem("error", "other spec", run, detail))
    problems += _identical_weights(found)
    ways = defaultdict(set)
    for row in metrics:
        if row["status"] == OTHERWISE:
            ways[row["metric"]].add(row["note"])
        if row["status"] not in ("done", NOT_MEASURED):
            continue
        low, high = _PLAUSIBLE.get(row["base"], (-math.inf, math.inf))
        if row["value"] is None and row["note"]:
            detail = f"{row['metric']}: {row['note']}"
            problems.append(_problem("warning", "metric not measured", row["run"], detail))
        elif row["value"] is None:
            detail = f"{row['metric']} is not finite"
            problems.append(_problem("error", "implausible metric", row["run"], detail))
        elif not low <= row["value"] <= high:
            detail = f"{row['metric']} = {row['value']:.6g} outside [{low:g}, {high:g}]"
            problems.append(_problem("error", "implausible metric", row["run"], detail))
    for metric, notes in sorted(ways.items()):
        detail = f"{metric}: other runs were {'; '.join(sorted(notes))}"
        problems.append(_problem("note", "several ways of measuring", "", detail))
    for column, check in (
        ("git_commit", "several commits"),
        ("device", "several devices"),
        ("torch_version", "several versions of torch"),
        ("sampler", "several samplers"),
        ("sampling_seed", "several sampling seeds"),
    ):
        values = sorted({str(row[column]) for row in runs if row[column] not in ("", None)})
        if len(values) > 1:
            problems.append(_problem("note", check, "", ", ".join(values)))
    changed = sum(row["git_changed"] == "true" for row in runs)
    if changed:
        detail = f"{changed} runs were made from a source tree with uncommitted changes"
        problems.append(_problem("note", "uncommitted changes", "", detail))
    return problems


def _log_spacings(oscillation: list[dict]) -> list[dict]:
    """Oscillations depend on the steps between logged points, which are no part of a run's spec."""
    unlike = {
        quantity: stability.spacings(rows)
        for (quantity,), rows in sorted(_groups(oscillation, "quantity").items())
    }
    details = [
        f"{quantity} every {' or '.join(f'{steps:.3g}' for steps in found)} steps"
        for quantity, found in unlike.items()
        if len(found) > 1
    ]
    return [_problem("note", "several log spacings", "", "; ".join(details))] if details else []


def _identical_weights(found: list[_Found]) -> list[dict]:
    """Runs with equal weights: a fault where their seeds differ. Where they do not, the setting in
    which the arms differ had no effect, and one result is counted twice.
    """
    by_hash = defaultdict(list)
    for one in found:
        if one.generate.get("weights_sha256") and "imported" not in one.train:
            by_hash[one.generate["weights_sha256"]].append(one)
    answer = []
    for group in by_hash.values():
        others = ", ".join(one.run for one in group[1:])
        if len({canonical_json(one.seeds) for one in group}) > 1:
            detail = f"the same weights as {others}"
            answer.append(_problem("error", "identical weights", group[0].run, detail))
        elif len(group) > 1:
            detail = f"with the same seeds the same weights as {others}"
            answer.append(_problem("warning", "setting without effect", group[0].run, detail))
    return answer
