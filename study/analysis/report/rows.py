"""What do the tables of the page hold? The rows of every table of a study, in words."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from study.analysis.names import NOT_MEASURED
from study.analysis.report.study import Study
from study.analysis.tables.measures import MEASURES, Measure
from study.analysis.words import absent, interval, measured, p_text, quantity, short, signed


def summary(study: Study) -> list[dict[str, Any]]:
    """One row per arm with every metric."""
    summary = study.tables.summary
    if summary.empty:
        return []
    by_arm = {arm: rows.set_index("metric") for arm, rows in summary.groupby("arm")}
    own = study.by_arm("summary", "n").set_index("arm")
    answer = []
    for row in study.arms:
        rows = by_arm.get(row["arm"])
        if rows is None:
            continue
        cells = []
        for metric in study.metrics:
            cell = rows.loc[metric]
            if pd.isna(cell["mean"]):
                text = absent(cell)
                bad = text in ("diverged", NOT_MEASURED)
                small = "" if text == "diverged" else cell["note"]
                cells.append({"text": text, "small": small, "value": "", "lost": bad})
                continue
            small = interval(cell["ci_low"], cell["ci_high"], cell["mean"])
            cells.append(
                {
                    "text": short(cell["mean"]),
                    "small": small,
                    "value": f"{cell['mean']:.10g}",
                    "lost": False,
                }
            )
        leading = own.loc[row["arm"]]
        counts = {
            "diverged": "n_diverged",
            "missing": "n_missing",
            NOT_MEASURED: "n_not_measured",
        }
        apart = [f"{leading[n]} {state}" for state, n in counts.items() if leading[n]]
        answer.append({**row, "n": int(leading["n"]), "apart": ", ".join(apart), "cells": cells})
    return answer


def footnotes(study: Study) -> list[dict[str, str]]:
    """How the metrics were measured; those measured alike share a footnote."""
    groups: dict[str, list[str]] = {}
    for metric in study.metrics:
        identity = study.tables.identity(metric)
        name = f"{metric} ({identity['identity']})" if identity else metric
        groups.setdefault(measured(identity), []).append(name)
    return [{"names": ", ".join(names), "text": text} for text, names in groups.items()]


def comparisons(study: Study) -> list[dict[str, Any]]:
    order = {row["arm"]: row for row in study.arms}
    place = {arm: index for index, arm in enumerate(order)}
    rows = study.tables.comparisons.to_dict("records")
    rows.sort(key=lambda row: (study.metrics.index(row["metric"]), place[row["arm"]]))
    return [
        {
            **order[row["arm"]],
            "metric": row["metric"],
            "pairs": row["n_pairs"],
            "difference": "" if pd.isna(row["mean_difference"]) else signed(row["mean_difference"]),
            "value": "" if pd.isna(row["mean_difference"]) else row["mean_difference"],
            "interval": interval(row["ci_low"], row["ci_high"], row["mean_difference"], signed),
            "p": p_text(row["p_value"]),
            "holm": p_text(row["p_holm"]),
            "holm_value": "" if pd.isna(row["p_holm"]) else row["p_holm"],
            "detectable": ""
            if pd.isna(row["detectable_difference"])
            else short(row["detectable_difference"]),
            "verdict": row["verdict"],
            "note": row["note"],
        }
        for row in rows
    ]


def stability_tables(study: Study) -> list[dict[str, Any]]:
    """The rows of ``stability.csv`` by measure: against the unscaled arms, and against DSM."""
    order = {row["arm"]: row for row in study.arms}
    place = {arm: index for index, arm in enumerate(order)}
    table = study.tables.stability
    answer = []
    for name, measure in MEASURES.items():
        here = table[table["measure"] == name]
        if here.empty:
            continue
        rows = sorted(here.to_dict("records"), key=lambda row: place[row["arm"]])
        cells = [{**order[row["arm"]], **_stability_cells(row, measure)} for row in rows]
        answer.append(
            {
                "name": name,
                "label": measure.label,
                "words": measure.words,
                "better": measure.better,
                "ratio": measure.ratio,
                "scalings": _with_every_arm(study, cells),
                "targets": [row for row in cells if row["against"] == "dsm"],
            }
        )
    return answer


def _with_every_arm(study: Study, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Comparisons with the unscaled arms; those arms themselves are there with their mean."""
    scaled = {row["arm"] for row in cells if row["against"] == "none"}
    compared = ("pairs", "factor", "interval", "p", "holm", "holm_value", "detectable")
    blank = dict.fromkeys((*compared, "verdict"), "")
    answer = []
    for row in cells:
        if row["against"] == "dsm" and row["arm"] not in scaled:
            answer.append({**row, **blank, "note": _unscaled(study, row)})
        elif row["against"] != "dsm":
            note = row["note"] or ("" if row["against"] else _unscaled(study, row))
            answer.append({**row, "note": note})
    return answer


def _unscaled(study: Study, row: Mapping[str, Any]) -> str:
    return "no long skips" if row["arm"] in study.skipless else "the unscaled arm"


def _stability_cells(row: Mapping[str, Any], measure: Measure) -> dict[str, Any]:
    """One row of ``stability.csv`` in words."""

    def number(value: float) -> str:
        return "" if pd.isna(value) else f"{value:.3g}"

    ends = (number(row["factor_low"]), number(row["factor_high"]))
    if measure.ratio:
        mean = short(row["mean"]) if pd.notna(row["mean"]) else ""
        small = interval(row["mean_low"], row["mean_high"], row["mean"])
    else:
        mean = f"{row['n_diverged']} of {row['n']}"
        small = ""
    lost = int(row["n_diverged"]) if measure.ratio else 0
    rest = int(row["n_missing"])
    apart = [f"{lost} diverged"] if lost else []
    apart += [f"{rest} missing"] if rest else []
    return {
        "against": row["against"],
        "n": row["n"],
        "apart": ", ".join(apart),
        "mean": mean,
        "small": small,
        "value": number(row["mean"]),
        "pairs": "" if pd.isna(row["n_pairs"]) else row["n_pairs"],
        "factor": number(row["factor"]),
        "interval": f"[{ends[0]}, {ends[1]}]" if ends[0] else "",
        "p": p_text(row["p_value"]),
        "holm": p_text(row["p_holm"]),
        "holm_value": "" if pd.isna(row["p_holm"]) else row["p_holm"],
        "detectable": number(row["detectable_factor"]),
        "verdict": row["verdict"],
        "note": row["note"],
    }


def cost(study: Study) -> list[dict[str, Any]]:
    """Means per arm over the runs that finished."""
    done = study.tables.cost[study.tables.cost["status"] == "done"]
    columns = [
        "parameters",
        "train_seconds",
        "median_step_seconds",
        "train_images_per_second",
        "train_peak_memory_mib",
        "nfe",
        "generate_seconds",
        "generate_images_per_second",
        "generate_peak_memory_mib",
    ]
    means = done.astype(dict.fromkeys(columns, float)).groupby("arm")[columns].mean()
    devices = done.groupby("arm")["device"].agg(lambda names: ", ".join(sorted(set(names))))
    counts = done.groupby("arm")["run"].count()
    answer = []
    for row in study.arms:
        if row["arm"] not in means.index:
            continue
        values = means.loc[row["arm"]]
        answer.append(
            {
                **row,
                "n": int(counts[row["arm"]]),
                "device": devices[row["arm"]],
                "cells": [
                    {"text": quantity(value), "value": "" if pd.isna(value) else value}
                    for value in values
                ],
            }
        )
    return answer


def diverged(study: Study) -> list[dict[str, Any]]:
    lost = study.runs[study.runs["status"] == "diverged"]
    return [
        {
            "run": row.run,
            "display": row.display,
            "seed": row.seed,
            "step": row.step,
            "steps": row.steps,
            "reason": row.reason,
            "last_step": row.last_finite_step,
            "last_loss": quantity(row.last_finite_loss),
            "last_grad": quantity(row.last_finite_grad_norm),
        }
        for row in lost.itertuples()
    ]
