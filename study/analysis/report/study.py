"""What every part of the page is made from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from study.analysis import style
from study.analysis.tables.read import Tables
from study.analysis.words import enumerate_words


@dataclass(frozen=True)
class Study:
    """A study's manifest and tables, and what several parts of the page read off them."""

    manifest: Mapping[str, Any]
    tables: Tables

    @property
    def runs(self) -> pd.DataFrame:
        return self.tables.runs

    @property
    def config(self) -> Mapping[str, Any]:
        return self.manifest.get("config") or {}

    @cached_property
    def metrics(self) -> list[str]:
        return self.tables.metric_names()

    @property
    def metric(self) -> str | None:
        return self.metrics[0] if self.metrics else None

    @cached_property
    def parts(self) -> list[tuple[Tables, str]]:
        """The tables of every data set, with its leading metric."""
        parts = self.tables.by_dataset().values()
        return [(part, metric) for part in parts if (metric := part.leading_metric())]

    @property
    def metric_label(self) -> str:
        """The leading metric in words; of several data sets each, with the data set."""
        return enumerate_words(self.by_dataset(lambda part, metric: style.metric_label(metric)))

    def by_dataset(self, say: Callable[[Tables, str], str]) -> list[str]:
        """What ``say`` says of each part that has numbers, with the data set if there are several.

        Empty texts are left out.
        """
        several = len(self.parts) > 1
        said = [
            (part.runs["dataset"].iloc[0], say(part, metric))
            for part, metric in self.parts
            if part.metrics["value"].notna().any()
        ]
        return [f"{text} on {name}" if several else text for name, text in said if text]

    def by_arm(self, table: str, column: str) -> pd.DataFrame:
        """One row of a table for each arm, on the leading metric of its data set."""
        rows = [part.by_arm(getattr(part, table), metric, column) for part, metric in self.parts]
        return pd.concat(rows) if rows else getattr(self.tables, table)[:0]

    @cached_property
    def skipless(self) -> set[str]:
        """The arms that have no long skips."""
        return set(self.runs.loc[self.runs["skips"] == 0, "arm"])

    @cached_property
    def named(self) -> dict[str, str]:
        """Arms that the study's file names, with that name."""
        given = {arm.get("name") for arm in self.config.get("arms") or ()}
        arms = self.runs.set_index("run")["arm"]
        return {
            arms[entry["run"]]: entry["display"]
            for entry in self.manifest["runs"]
            if entry.get("display") in given - {None}
        }

    @cached_property
    def arms(self) -> list[dict[str, str]]:
        """The arms in the order of the pictures, with their words."""
        arms = self.runs.drop_duplicates("arm")
        lines = style.order_lines(arms["line"])
        scalings = style.order_scalings(arms["skip_scaling"])
        targets = style.order_targets(arms["target"])
        ordered = sorted(
            arms.itertuples(),
            key=lambda row: (
                lines.index(row.line),
                targets.index(row.target),
                scalings.index(row.skip_scaling),
                row.arm,
            ),
        )
        return [
            {
                "arm": row.arm,
                "backbone": style.line_label(row.line),
                "name": self.named.get(row.arm, ""),
                "scaling": style.scaling_label(row.skip_scaling),
                "target": style.target_label(row.target),
                "formulation": row.formulation,
            }
            for row in ordered
        ]
