"""Where did the numbers come from, and which published ones may stand beside them?"""

import json
from typing import Any

import pandas as pd

from study import published as papers
from study.analysis import style
from study.analysis.names import flat
from study.analysis.report.study import Study
from study.analysis.tables.runs import dataset_of
from study.analysis.words import enumerate_words, interval, short


def published(study: Study) -> dict[str, Any]:
    """Published numbers beside ours, or the reason why none may stand there."""
    runs, config = study.manifest["runs"], study.config
    sections = {entry["run"]: dataset_of(config, entry["spec"]) for entry in runs}
    datasets = {one.get("name", ""): one for one in sections.values()}
    words = f"data set{'s' * (len(datasets) > 1)} {enumerate_words(datasets)}"
    if study.metric is None:
        reason = "Nothing has been measured."
    elif not any(metric.startswith("fid") for metric in study.metrics):
        reason = (
            f"{style.metric_label(study.metric)} on {words} is not the Inception FID "
            "that the papers report: no published number may stand beside it."
        )
    elif rows := _beside(study, sections):
        return {"rows": rows, "reason": ""}
    elif not any(map(papers.dataset_key, datasets.values())):
        reason = (
            f"The papers did not measure on {words} as converted here: a name "
            "is not enough, the source, the split, the side and the number of images count."
        )
    else:
        reason = (
            "The papers state no number for these backbones, targets, numbers of images and "
            f"references on {words}."
        )
    return {"rows": [], "reason": reason}


def _beside(study: Study, sections: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Our means with every published number that may stand beside them.

    ``sections`` holds what the study says of each run's data set.
    """
    rows = []
    specs = {entry["run"]: entry["spec"] for entry in study.manifest["runs"]}
    summary = study.tables.summary.set_index(["arm", "metric"])
    first = study.runs.drop_duplicates("arm").set_index("arm")["run"]
    for arm in study.arms:
        for metric in study.metrics:
            ours = summary.loc[(arm["arm"], metric)]
            if pd.isna(ours["mean"]):
                continue
            identity = study.tables.identity(metric)
            if isinstance(identity.get("sampler"), str):
                identity["sampler"] = json.loads(identity["sampler"])
            run = first[arm["arm"]]
            for found in papers.beside(sections[run], specs[run], metric, identity):
                number = found["number"]
                rows.append(
                    {
                        **arm,
                        "metric": metric,
                        "ours": short(ours["mean"]),
                        "interval": interval(ours["ci_low"], ours["ci_high"], ours["mean"]),
                        "n": ours["n"],
                        "theirs": number.value,
                        "model": number.model,
                        "their_metric": number.metric,
                        "where": f"{number.paper}, {number.table_or_figure}",
                        "source": number.source,
                        "differences": found["differences"],
                    }
                )
    return rows


def identities(study: Study) -> list[dict[str, Any]]:
    """How the metrics of the main measurements were measured, field by field."""
    rows = study.tables.identities.drop_duplicates("metric")
    rows = rows[rows["metric"].isin(study.metrics)]
    fields = [column for column in rows.columns if column not in ("identity", "metric")]
    same = [field for field in fields if rows[field].nunique() <= 1]
    return [
        {
            "metric": row["metric"],
            "identity": row["identity"],
            "own": [(field, row[field]) for field in fields if field not in same],
            "shared": [(field, row[field]) for field in same],
        }
        for row in rows.to_dict("records")
    ]


def makers(study: Study) -> list[dict[str, Any]]:
    """Runs by the code, versions and device that made them."""
    columns = ["git_commit", "git_changed", "versions", "device"]
    made = study.runs[study.runs["status"].isin(["done", "diverged"])]
    return [
        {
            "commit": commit or "unknown",
            "changed": changed == "true",
            "versions": versions,
            "device": device,
            "runs": len(rows),
        }
        for (commit, changed, versions, device), rows in made.groupby(columns)
    ]


def settings(study: Study) -> dict[str, dict[str, str]]:
    """The settings of every run, flat and in words."""
    return {
        entry["run"]: {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in flat(entry["spec"]).items()
        }
        for entry in study.manifest["runs"]
    }


def common(study: Study) -> dict[str, str]:
    """Settings that all runs share."""
    specs = list(settings(study).values())
    return {
        key: value
        for key, value in (specs[0] if specs else {}).items()
        if all(spec.get(key) == value for spec in specs)
    }


def specs(study: Study) -> list[dict[str, Any]]:
    """Each run with the settings that are its own."""
    own, shared = settings(study), common(study)
    rows = study.runs.set_index("run")
    answer = []
    for entry in study.manifest["runs"]:
        row = rows.loc[entry["run"]]
        answer.append(
            {
                "run": entry["run"],
                "display": row["display"],
                "status": row["status"],
                "skips": "" if pd.isna(row["skips"]) else row["skips"],
                "factors": row["skip_factors"]
                or ("learned" if row["method"].startswith("ls") else ""),
                "own": [(k, value) for k, value in own[entry["run"]].items() if k not in shared],
            }
        )
    return answer
