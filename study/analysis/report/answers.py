"""What came out, and what cannot be said? The numbers behind the first screen of the page."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from study.analysis import style
from study.analysis.report.study import Study
from study.analysis.tables.read import Tables
from study.analysis.verdicts import long_skips, patch_diffusion, scaling_laws, stf
from study.analysis.verdicts.base import CONVERGED, Verdict
from study.analysis.words import enumerate_words, interval, p_text, points_text, short, signed


def partial(study: Study) -> list[dict[str, str]]:
    """Runs that should have metrics and do not, and why."""
    answer = []
    for row in study.runs.itertuples():
        if row.status == "missing":
            why = "not started"
        elif row.status == "running":
            why = f"at step {row.step} of {row.steps}"
        elif row.status == "done" and row.evaluation == "missing":
            why = "not sampled" if row.generation == "missing" else "not evaluated"
        else:
            continue
        answer.append({"run": row.run, "display": row.display, "why": why})
    return answer


def missing(study: Study, most: int = 6) -> dict[str, Any]:
    """How many measurements are not there, and which first: those of runs that ended."""
    keys = ["run", "protocol", "measurement"]
    rows = study.tables.measurements
    rows = rows.assign(lacks=rows["status"].isin(["missing", "running"]))
    lacking = rows[rows["lacks"]].drop_duplicates(keys)
    runs = study.runs.set_index("run")
    unended = lacking["run"].map(runs["status"]).isin(["missing", "running"])
    lacking = lacking.assign(unended=unended).sort_values(["unended", "run"], kind="stable")
    groups = lacking.groupby(["run", "protocol"], sort=False)
    words = [
        f"{runs.loc[run, 'display']}, seed {runs.loc[run, 'seed']}: protocol {protocol}"
        + (f", {len(own)} measurements" if len(own) > 1 else "")
        for (run, protocol), own in groups
    ]
    return {
        "count": len(lacking.drop_duplicates(["run", "measurement"])),
        "of": len(rows.drop_duplicates(["run", "measurement"])),
        "which": words[:most],
        "more": len(words[most:]),
    }


def reference_points(study: Study) -> list[str]:
    """What the leading metric's numbers mean, and which backbones are no better than a Gaussian."""
    several = len(study.parts) > 1
    answer = []
    for part, metric in study.parts:
        points = part.reference_points(metric)
        if not points:
            continue
        label = style.metric_label(metric) + (
            f" on {part.runs['dataset'].iloc[0]}" if several else ""
        )
        words = f"{label}: {points_text(points)}."
        lines = beaten(part, metric, points)
        if lines:
            whole = [style.line_label(line) for line in lines]
            words += (
                f" No arm of {enumerate_words(whole)} is better than the Gaussian: their order says"
                " nothing about good images."
            )
        answer.append(words)
    return answer


def beaten(tables: Tables, metric: str, points: Mapping[str, float]) -> list[str]:
    """The backbones of which no arm's mean is better than the Gaussian."""
    limit, rows = points.get("gaussian"), tables.summary
    rows = rows[(rows["metric"] == metric) & rows["mean"].notna()]
    if limit is None or rows.empty:
        return []
    sign = 1 if rows["better"].iloc[0] == "lower" else -1
    best = (sign * rows["mean"]).groupby(rows["line"]).min()
    return style.order_lines(best[best >= sign * limit].index.to_series())


def outcome(study: Study) -> dict[str, Any]:
    """How many runs ended how, and which arms lost some."""
    runs = study.runs
    done, lost = runs[runs["status"] == "done"], runs[runs["status"] == "diverged"]
    seeds = lost.groupby("arm")["seed"].agg(list)
    return {
        "runs": len(runs),
        "arms": runs["arm"].nunique(),
        "finished": len(done),
        "diverged": len(lost),
        "broken": int(done["generation"].isin(["diverged", "skipped"]).sum()),
        "lost": [
            f"{row['backbone']}, {row['scaling']}, {row['target']} "
            f"({'seeds' if len(seeds[row['arm']]) > 1 else 'seed'} {', '.join(seeds[row['arm']])})"
            for row in study.arms
            if row["arm"] in seeds.index
        ],
    }


def tests(study: Study) -> dict[str, int]:
    """How many arms were compared with the unscaled DSM arm, and with what verdicts."""
    rows = study.by_arm("comparisons", "n_pairs")
    verdicts = rows["verdict"].value_counts()
    return {"arms": len(rows), **{word: int(n) for word, n in verdicts.items()}}


def best(study: Study) -> list[dict[str, Any]]:
    """Per backbone, the arm with the best mean, and how it stands to the unscaled DSM arm.

    On the leading metric of each data set. A backbone that was measured otherwise has a row of its
    own: its numbers compare with none above.
    """
    answer = []
    for part, metric in study.parts:
        rows = part.summary[part.summary["mean"].notna()]
        for line in style.order_lines(rows["line"]):
            for way in part.ways(metric):
                here = rows[(rows["line"] == line) & (rows["metric"] == way)]
                if here.empty:
                    continue
                lower = here["better"].iloc[0] == "lower"
                row = here.loc[here["mean"].idxmin() if lower else here["mean"].idxmax()]
                otherwise = "" if way == metric else style.metric_label(way)
                answer.append({"way": otherwise, **_best_row(study, row)})
    return answer


def _best_row(study: Study, row: pd.Series) -> dict[str, Any]:
    """A row of the summary in words."""
    return {
        "backbone": style.line_label(row["line"]),
        "name": study.named.get(row["arm"], ""),
        "scaling": style.scaling_label(row["skip_scaling"]),
        "target": style.target_label(row["target"]),
        "mean": short(row["mean"]),
        "interval": interval(row["ci_low"], row["ci_high"], row["mean"]),
        "n": row["n"],
        **_against_unscaled(study, row),
    }


def _against_unscaled(study: Study, row: pd.Series) -> dict[str, str]:
    """The difference of an arm (a row of the summary) to the unscaled DSM arm, and its test."""
    tests = study.tables.comparisons
    tests = tests[(tests["arm"] == row["arm"]) & (tests["metric"] == row["metric"])]
    if tests.empty:
        if (row["skip_scaling"], row["target"]) != ("none", "dsm"):
            why = "no unscaled DSM arm to compare with"
        elif row["arm"] in study.skipless:
            why = "no long skips, nothing to scale"
        else:
            why = "this is the unscaled DSM arm"
        return {"difference": "", "test": why}
    test = tests.iloc[0]
    words = test["note"] or "no test"
    if test["verdict"] != "no test":
        words = f"{test['verdict']}, Holm p {p_text(test['p_holm'])} ({test['n_pairs']} pairs)"
        words += f"; {test['note']}" if test["note"] else ""
    mean = test["mean_difference"]
    if pd.isna(mean):
        return {"difference": "", "test": words}
    ends = interval(test["ci_low"], test["ci_high"], mean, signed)
    return {"difference": f"{signed(mean)} {ends}", "test": words}


def doubts(study: Study) -> dict[str, Any]:
    """What these numbers cannot say: the number behind each caveat, 0 where it does not hold."""
    wrong = study.tables.qc[study.tables.qc["severity"] == "error"]
    seeds = study.runs.groupby("arm")["run"].count().max()
    seen = study.runs.loc[study.runs["images_seen"] > 0, "images_seen"].max()
    images = {int(part.identity(metric).get("images") or 0) for part, metric in study.parts}
    few = sorted(number for number in images if 0 < number < 50_000)
    return {
        "errors": len(wrong),
        "checks": ", ".join(sorted(set(wrong["check"]))),
        "seeds": 0 if pd.isna(seeds) else int(seeds),
        "detectable": enumerate_words(study.by_dataset(_detectable)),
        "seen": int(seen) if pd.notna(seen) and seen < CONVERGED else 0,
        "not_fid": enumerate_words(study.by_dataset(_not_fid)),
        "images": " or ".join(map(str, few)),
    }


def _detectable(part: Tables, metric: str) -> str:
    """The difference that a typical test of the metric would have seen."""
    rows = part.by_arm(part.comparisons, metric, "n_pairs")
    median = rows["detectable_difference"].median()
    return "" if pd.isna(median) else short(median)


def _not_fid(part: Tables, metric: str) -> str:
    return "" if metric.startswith("fid") else style.metric_label(metric)


def _stable_quality(tables: Tables) -> list[Verdict]:
    """The first verdict on each data set: over all backbones, where there are several."""
    first: dict[str, Verdict] = {}
    for about, found in stf.stable_quality(tables):
        first.setdefault(about.get("data set", ""), found)
    return list(first.values())


def verdicts(study: Study) -> dict[str, list[dict[str, str]]]:
    """By section: what its figures say about the papers' claims, as the notebooks say it."""
    tables = study.tables
    found = {
        "comparisons": long_skips.long_skips(tables),
        "theory": [*scaling_laws.laws(tables), *scaling_laws.rank_summary(tables)],
        "targets": [
            *_stable_quality(tables),
            *stf.target_variance(tables),
            *patch_diffusion.blur(tables),
        ],
        "representation": long_skips.mirror_summary(tables),
    }
    return {
        section: [
            {"word": "", "text": one}
            if isinstance(one, str)
            else {"word": one.word, "text": one.reason}
            for one in answers
        ]
        for section, answers in found.items()
    }
