"""Read the tables of a study, whole or for some of its arms."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from study.analysis.names import MetricName, leading
from study.analysis.tables.columns import COLUMNS, INTEGERS, NUMBERS, TABLES
from study.files import UserError


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
    measurements: pd.DataFrame
    curves: pd.DataFrame
    points: pd.DataFrame
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
            whole = part.name in ("runs", "qc", "identities", "points")
            if whole or not isinstance(frame, pd.DataFrame):
                continue
            column = "run" if "run" in frame.columns else "arm"
            changed[part.name] = frame[frame[column].isin(set(runs[column]))]
        changed["probes"] = {
            kind: frame[frame["run"].isin(set(runs["run"]))] if "run" in frame.columns else frame
            for kind, frame in self.probes.items()
        }
        return replace(self, **changed)

    def by_dataset(self) -> dict[str, "Tables"]:
        """The tables of each data set by its name: numbers of unlike ones never compare."""
        return {name: self.only(dataset=name) for name in sorted(set(self.runs["dataset"]))}

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
        """Every metric of the study's main measurements, the leading one first."""
        counts = self.metrics.dropna(subset=["value"]).groupby("metric")["run"].count()
        return leading(self.metrics["metric"], counts)

    def leading_metric(self) -> str | None:
        """The study's leading metric, or None where nothing was measured."""
        return next(iter(self.metric_names()), None)

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

    def reference_points(self, metric: str) -> dict[str, float]:
        """What real images, a Gaussian fitted to the pixels, and noise have on a metric.

        Of the same reference, extractor and number of images; empty where it was not measured.
        """
        own, name = self.identity(metric), replace(MetricName.parse(metric), way="")
        wanted = (name, own.get("reference_sha256"), own.get("extractor_sha256", ""))
        return {
            row.point: row.value
            for row in self.points.itertuples()
            if pd.notna(row.value)
            and (MetricName.parse(row.metric), row.reference_sha256, row.extractor_sha256) == wanted
        }

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
