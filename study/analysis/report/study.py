"""What every part of the page is made from."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from study.analysis import style
from study.analysis.tables.read import Tables


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
