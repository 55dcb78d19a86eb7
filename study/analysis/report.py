"""The report: one HTML page that opens without a network, made from finished tables and figures."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from study import published
from study.analysis import style
from study.analysis.figures import FIGURES
from study.analysis.names import NOT_MEASURED, better
from study.analysis.tables.measures import MEASURES, Measure
from study.analysis.tables.read import Tables
from study.analysis.verdicts import long_skips, patch_diffusion, scaling_laws, stf
from study.analysis.verdicts.base import CONVERGED
from study.analysis.verdicts.stability import stability_answer
from study.analysis.words import absent, count, interval, measured, p_text, quantity, short, signed
from study.files import read_json, write_bytes, write_text

# A vector picture stays one up to this size; a larger one goes in as pixels.
SVG_BYTES = 230_000


def report(manifest: str | Path | Mapping[str, Any], results: str | Path, out: str | Path) -> Path:
    """Write ``out/index.html`` from ``results/tables`` and ``results/figures``.

    Copies of the figures as PNG go to ``out/figures``, to be linked or shown elsewhere.
    Runs without results are listed in a banner; a figure that was not drawn is left out. Notebooks
    rendered into ``out/notebooks`` are linked. Returns the page's path. Raises ``UserError`` where
    the tables are missing.
    """
    results, out = Path(results), Path(out)
    if not isinstance(manifest, Mapping):
        manifest = read_json(manifest)
    tables = Tables.read(results / "tables", results)
    context = _Page(manifest, tables, results, out).context()
    page = environment().get_template("report.html.j2").render(context)
    for figure in sorted((results / "figures").glob("*.png")):
        write_bytes(out / "figures" / figure.name, figure.read_bytes())
    write_text(out / "index.html", page)
    return out / "index.html"


def environment() -> jinja2.Environment:
    """The templates of this package, with everything escaped that they print."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("study.analysis"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


class _Page:
    """What the template needs, computed from the tables."""

    def __init__(
        self, manifest: Mapping[str, Any], tables: Tables, results: Path, out: Path
    ) -> None:
        self.manifest, self.tables, self.results, self.out = manifest, tables, results, out
        self.runs = tables.runs
        self.metrics = tables.metric_names()
        self.metric = self.metrics[0] if self.metrics else None
        self.config = manifest.get("config") or {}
        self.answer = stability_answer(tables)
        given = {arm.get("name") for arm in self.config.get("arms") or ()}
        arms = self.runs.set_index("run")["arm"]
        self.named = {
            arms[entry["run"]]: entry["display"]
            for entry in manifest["runs"]
            if entry.get("display") in given - {None}
        }
        self.skipless = set(self.runs.loc[self.runs["skips"] == 0, "arm"])

    def context(self) -> dict[str, Any]:
        study = self.manifest["study"]
        return {
            "study": study,
            "title": self.config.get("title") or f"Study {study}",
            "notes": sorted(set(self.runs["dataset_note"]) - {""}),
            "partial": self.partial(),
            "counts": self.runs["status"].value_counts().to_dict(),
            "total": len(self.runs),
            "headlines": self.headlines(),
            "best": self.best(),
            "caveats": self.caveats(),
            "figures": self.figures(),
            "metric": self.metric,
            "metric_label": style.metric_label(self.metric) if self.metric else "",
            "metrics": [
                {
                    "name": metric,
                    "label": style.metric_label(metric),
                    "parts": style.metric_label(metric).split(", "),
                    "better": better(metric),
                }
                for metric in self.metrics
            ],
            "footnotes": self.footnotes(),
            "summary": self.summary(),
            "comparisons": self.comparisons(),
            "stability": self.answer,
            "stability_tables": self.stability_tables(),
            "label_bias": stf.label_bias(self.tables),
            "verdicts": self.verdicts(),
            "cost": self.cost(),
            "diverged": self.diverged(),
            "published": self.published(),
            "qc": self.tables.qc.to_dict("records"),
            "identities": self.identities(),
            "origins": self.origins(),
            "common": self.common_settings(),
            "specs": self.specs(),
            "config": json.dumps(self.config, indent=1, sort_keys=True, ensure_ascii=False),
            "notebooks": self.notebooks(),
            "css": environment().get_template("page.css").render(),
        }

    # --- first things first -------------------------------------------------------------------

    def partial(self) -> list[dict[str, str]]:
        """Runs that should have metrics and do not, and why."""
        answer = []
        for row in self.runs.itertuples():
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

    def headlines(self) -> list[str]:
        runs = self.runs
        state = runs["status"].value_counts()
        finished = int(state.get("done", 0))
        lost = runs[runs["status"] == "diverged"]
        words = [f"{count(len(runs), 'run')} of {count(runs['arm'].nunique(), 'arm')}"]
        words.append(f"{finished} finished")
        words.append(f"{len(lost)} diverged")
        rest = len(runs) - finished - len(lost)
        words += [f"{rest} missing or unfinished"] if rest else []
        answer = [", ".join(words) + "."]
        if len(lost):
            seeds = lost.groupby("arm")["seed"].agg(list)
            named = [
                f"{row['backbone']}, {row['scaling']}, {row['target']} "
                f"({'seeds' if len(seeds[row['arm']]) > 1 else 'seed'} "
                f"{', '.join(seeds[row['arm']])})"
                for row in self.arm_rows()
                if row["arm"] in seeds.index
            ]
            answer.append(
                f"Diverged: {'; '.join(named[:5])}"
                + (f"; and {len(named) - 5} more arms." if len(named) > 5 else ".")
            )
        rows = self.tables.by_arm(self.tables.comparisons, self.metric, "n_pairs")
        if len(rows):
            verdicts = rows["verdict"].value_counts()
            tested = len(rows) - int(verdicts.get("no test", 0))
            if tested:
                answer.append(
                    f"Against the unscaled DSM arm of the same backbone, {tested} of {len(rows)} "
                    f"arms could be tested on {style.metric_label(self.metric)}: "
                    f"{verdicts.get('better', 0)} better, {verdicts.get('worse', 0)} worse, "
                    f"{verdicts.get('no difference shown', 0)} with no difference shown "
                    "(paired t-test, Holm-corrected per backbone, 5 %)."
                )
            else:
                answer.append(
                    f"Tested against the unscaled DSM arm: 0 of {count(len(rows), 'arm')}, for a "
                    "test needs at least two seeds. Differences below are shown, not claimed."
                )
        broken = runs[(runs["status"] == "done") & runs["generation"].isin(["diverged", "skipped"])]
        if len(broken):
            answer.append(
                f"The samples of {count(len(broken), 'run')} are not all finite; no metric is made "
                "of the others alone (see the checks)."
            )
        if self.answer.matrix:
            answer.append(f"Stability: {self.answer.summary[0]}")
        return answer

    def best(self) -> list[dict[str, Any]]:
        """Per backbone, the arm with the best mean, and how it stands to the unscaled DSM arm.

        A backbone that was measured otherwise has a row of its own: its numbers compare with none
        above.
        """
        if self.metric is None:
            return []
        ways = self.tables.ways(self.metric)
        rows = self.tables.summary
        rows = rows[rows["metric"].isin(ways) & rows["mean"].notna()]
        tests = self.tables.comparisons.set_index(["arm", "metric"])
        answer = []
        groups = [
            (rows[(rows["line"] == line) & (rows["metric"] == way)], way)
            for line in style.order_lines(rows["line"])
            for way in ways
        ]
        for here, way in groups:
            if here.empty:
                continue
            lower = here["better"].iloc[0] == "lower"
            row = here.loc[here["mean"].idxmin() if lower else here["mean"].idxmax()]
            item = {
                "backbone": style.line_label(row["line"]),
                "way": "" if way == self.metric else style.metric_label(way),
                "name": self.named.get(row["arm"], ""),
                "scaling": style.scaling_label(row["skip_scaling"]),
                "target": style.target_label(row["target"]),
                "mean": short(row["mean"]),
                "interval": interval(row["ci_low"], row["ci_high"], row["mean"]),
                "n": row["n"],
                "difference": "",
                "test": "this is the unscaled DSM arm",
            }
            if row["arm"] in self.skipless:
                item["test"] = "no long skips, nothing to scale"
            if (row["arm"], way) in tests.index:
                test = tests.loc[row["arm"], way]
                if pd.notna(test["mean_difference"]):
                    item["difference"] = " ".join(
                        [
                            signed(test["mean_difference"]),
                            interval(
                                test["ci_low"], test["ci_high"], test["mean_difference"], signed
                            ),
                        ]
                    )
                item["test"] = self.test_words(test)
            elif (row["skip_scaling"], row["target"]) != ("none", "dsm"):
                item["test"] = "no unscaled DSM arm to compare with"
            answer.append(item)
        return answer

    @staticmethod
    def test_words(test: pd.Series) -> str:
        if test["verdict"] == "no test":
            return test["note"] or "no test"
        words = f"{test['verdict']}, Holm p {p_text(test['p_holm'])} ({test['n_pairs']} pairs)"
        return f"{words}; {test['note']}" if test["note"] else words

    def verdicts(self) -> dict[str, list[dict[str, str]]]:
        """By section: what its figures say about the papers' claims, as the notebooks say it."""
        tables = self.tables
        found = {
            "comparisons": long_skips.long_skips(tables),
            "theory": [*scaling_laws.laws(tables), *scaling_laws.rank_summary(tables)],
            "targets": [
                *(one for about, one in stf.stable_quality(tables)[:1]),
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

    def caveats(self) -> list[str]:
        """What these numbers cannot say."""
        answer = []
        wrong = self.tables.qc[self.tables.qc["severity"] == "error"]
        if len(wrong):
            kinds = ", ".join(sorted(set(wrong["check"])))
            answer.append(
                f"The checks at the end of this page found {count(len(wrong), 'error')} ({kinds}): "
                "read them before any number."
            )
        seeds = self.runs.groupby("arm")["run"].count()
        rows = self.tables.by_arm(self.tables.comparisons, self.metric, "n_pairs")
        if len(seeds) and seeds.max() == 1:
            answer.append(
                "One seed per arm: the spread between seeds is unknown, so no interval and no "
                "test exists, and no sentence of the form “A beats B” has support here. Add seeds "
                "to the study for that."
            )
        elif len(seeds) and seeds.max() < 5:
            text = (
                f"With n = {seeds.max()} seeds per arm the bootstrap intervals of mean quality are "
                "narrower than their 95 % promise."
            )
            detectable = rows["detectable_difference"].median()
            if pd.notna(detectable):
                text += (
                    f" For a typical arm a paired difference below {short(detectable)} would "
                    "mostly go unseen (80 % power, before Holm's correction)."
                )
            answer.append(text)
        if self.metric and len(seeds):
            answer.append(
                "The best arm of a backbone is picked after looking at all of them; its mean is "
                "biased towards looking good."
            )
        seen = self.runs.loc[self.runs["images_seen"] > 0, "images_seen"].max()
        if pd.notna(seen) and seen < CONVERGED:
            answer.append(
                f"No network trained here has seen more than {count(int(seen), 'image')}, those of "
                "the papers tens to hundreds of millions. What is said of their claims is about "
                "this setting, and the better of two backbones may be the one that learns faster."
            )
        if self.metric and not self.metric.startswith("fid"):
            label = style.metric_label(self.metric)
            answer.append(
                f"{label} is not FID: its features are not the Inception network's. It ranks arms "
                "within this study and compares with no published number."
            )
        identity = self.tables.identity(self.metric) if self.metric else {}
        if identity.get("images") and int(identity["images"]) < 50_000:
            answer.append(
                f"Fréchet distances from {identity['images']} images are biased upwards, and by "
                "an amount that depends on that number: never set them beside values from "
                "another number of images."
            )
        if (self.runs["status"] == "diverged").any():
            answer.append(
                "Means and tests hold the runs that finished; an arm that partly diverged looks "
                "better, and steadier, than it is."
            )
        bias = stf.label_bias(self.tables)
        if bias:
            answer.append(bias)
        answer.append(
            "Times are wall-clock times of the device named beside them; runs that shared the "
            "machine with others are slower."
        )
        return answer

    # --- figures ------------------------------------------------------------------------------

    def figures(self) -> dict[str, list[dict[str, str]]]:
        """Embedded figures by section of the page."""
        answer: dict[str, list[dict[str, str]]] = {}
        for name, function in FIGURES.items():
            source = embed(self.results / "figures", name)
            if source is None:
                continue
            caption = " ".join((function.__doc__ or name).split())
            answer.setdefault(function.section, []).append(
                {"name": name, "source": source, "caption": caption}
            )
        return answer

    # --- tables -------------------------------------------------------------------------------

    def summary(self) -> list[dict[str, Any]]:
        """One row per arm with every metric."""
        summary = self.tables.summary
        if summary.empty:
            return []
        by_arm = {arm: rows.set_index("metric") for arm, rows in summary.groupby("arm")}
        own = self.tables.by_arm(summary, self.metric, "n").set_index("arm")
        answer = []
        for row in self.arm_rows():
            rows = by_arm.get(row["arm"])
            if rows is None:
                continue
            cells = []
            for metric in self.metrics:
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
            answer.append(
                {**row, "n": int(leading["n"]), "apart": ", ".join(apart), "cells": cells}
            )
        return answer

    def footnotes(self) -> list[dict[str, str]]:
        """How the metrics were measured; those measured alike share a footnote."""
        groups: dict[str, list[str]] = {}
        for metric in self.metrics:
            identity = self.tables.identity(metric)
            name = f"{metric} ({identity['identity']})" if identity else metric
            groups.setdefault(measured(identity), []).append(name)
        return [{"names": ", ".join(names), "text": text} for text, names in groups.items()]

    def arm_rows(self) -> list[dict[str, str]]:
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

    def comparisons(self) -> list[dict[str, Any]]:
        order = {row["arm"]: row for row in self.arm_rows()}
        place = {arm: index for index, arm in enumerate(order)}
        rows = self.tables.comparisons.to_dict("records")
        rows.sort(key=lambda row: (self.metrics.index(row["metric"]), place[row["arm"]]))
        return [
            {
                **order[row["arm"]],
                "metric": row["metric"],
                "pairs": row["n_pairs"],
                "difference": ""
                if pd.isna(row["mean_difference"])
                else signed(row["mean_difference"]),
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

    def stability_tables(self) -> list[dict[str, Any]]:
        """The rows of ``stability.csv`` by measure: against the unscaled arms, and against DSM."""
        order = {row["arm"]: row for row in self.arm_rows()}
        place = {arm: index for index, arm in enumerate(order)}
        table = self.tables.stability
        answer = []
        for name, measure in MEASURES.items():
            here = table[table["measure"] == name]
            if here.empty:
                continue
            rows = sorted(here.to_dict("records"), key=lambda row: place[row["arm"]])
            cells = [{**order[row["arm"]], **self.stability_cells(row, measure)} for row in rows]
            answer.append(
                {
                    "name": name,
                    "label": measure.label,
                    "words": measure.words,
                    "better": measure.better,
                    "ratio": measure.ratio,
                    "scalings": self.with_every_arm(cells),
                    "targets": [row for row in cells if row["against"] == "dsm"],
                }
            )
        return answer

    def unscaled(self, row: Mapping[str, Any]) -> str:
        return "no long skips" if row["arm"] in self.skipless else "the unscaled arm"

    def with_every_arm(self, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Comparisons with the unscaled arms; those arms themselves are there with their mean."""
        scaled = {row["arm"] for row in cells if row["against"] == "none"}
        compared = ("pairs", "factor", "interval", "p", "holm", "holm_value", "detectable")
        blank = dict.fromkeys((*compared, "verdict"), "")
        answer = []
        for row in cells:
            if row["against"] == "dsm" and row["arm"] not in scaled:
                answer.append({**row, **blank, "note": self.unscaled(row)})
            elif row["against"] != "dsm":
                note = row["note"] or ("" if row["against"] else self.unscaled(row))
                answer.append({**row, "note": note})
        return answer

    @staticmethod
    def stability_cells(row: Mapping[str, Any], measure: Measure) -> dict[str, Any]:
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

    def cost(self) -> list[dict[str, Any]]:
        """Means per arm over the runs that finished."""
        done = self.tables.cost[self.tables.cost["status"] == "done"]
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
        for row in self.arm_rows():
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

    def diverged(self) -> list[dict[str, Any]]:
        lost = self.runs[self.runs["status"] == "diverged"]
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

    def published(self) -> dict[str, Any]:
        """Published numbers beside ours, or the reason why none may stand there."""
        dataset = dict(self.config.get("dataset") or {})
        specs = {entry["run"]: entry["spec"] for entry in self.manifest["runs"]}
        if not dataset and specs:
            dataset = dict(next(iter(specs.values()))["dataset"])
        if self.metric is None:
            return {"rows": [], "reason": "Nothing has been measured."}
        name = dataset.get("name", "")
        if not any(metric.startswith("fid") for metric in self.metrics):
            reason = (
                f"{style.metric_label(self.metric)} on data set {name} is not the Inception FID "
                "that the papers report"
            )
            return {"rows": [], "reason": f"{reason}: no published number may stand beside it."}
        rows = []
        summary = self.tables.summary.set_index(["arm", "metric"])
        first = self.runs.drop_duplicates("arm").set_index("arm")["run"]
        for arm in self.arm_rows():
            for metric in self.metrics:
                ours = summary.loc[(arm["arm"], metric)]
                if pd.isna(ours["mean"]):
                    continue
                identity = self.tables.identity(metric)
                if isinstance(identity.get("sampler"), str):
                    identity["sampler"] = json.loads(identity["sampler"])
                spec = specs[first[arm["arm"]]]
                for found in published.beside(dataset, spec, metric, identity):
                    rows.append(
                        {
                            **arm,
                            "metric": metric,
                            "ours": short(ours["mean"]),
                            "interval": interval(ours["ci_low"], ours["ci_high"], ours["mean"]),
                            "n": ours["n"],
                            "theirs": found["number"].value,
                            "model": found["number"].model,
                            "their_metric": found["number"].metric,
                            "where": f"{found['number'].paper}, {found['number'].table_or_figure}",
                            "source": found["number"].source,
                            "differences": found["differences"],
                        }
                    )
        if rows:
            return {"rows": rows, "reason": ""}
        if published.dataset_key(dataset) is None:
            reason = (
                f"Data set {name} as converted here is none that the papers measured on: its name "
                "is not enough, the source, the split, the side and the number of images count."
            )
        else:
            reason = (
                "The papers state no number for these backbones, targets, numbers of images and "
                f"references on {name}."
            )
        return {"rows": [], "reason": reason}

    # --- where the numbers came from ----------------------------------------------------------

    def identities(self) -> list[dict[str, Any]]:
        rows = self.tables.identities
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

    def origins(self) -> list[dict[str, Any]]:
        """Runs by the code, versions and device that made them."""
        columns = ["git_commit", "git_changed", "versions", "device"]
        made = self.runs[self.runs["status"].isin(["done", "diverged"])]
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

    def flat_specs(self) -> dict[str, dict[str, str]]:
        return {
            entry["run"]: {key: _value(value) for key, value in _flat(entry["spec"])}
            for entry in self.manifest["runs"]
        }

    def common_settings(self) -> list[tuple[str, str]]:
        """Settings that all runs share."""
        specs = list(self.flat_specs().values())
        if not specs:
            return []
        return [
            (key, value)
            for key, value in specs[0].items()
            if all(spec.get(key) == value for spec in specs)
        ]

    def specs(self) -> list[dict[str, Any]]:
        """Each run with the settings that are its own."""
        flat = self.flat_specs()
        common = {key for key, _ in self.common_settings()}
        rows = self.runs.set_index("run")
        return [
            {
                "run": entry["run"],
                "display": rows.loc[entry["run"], "display"],
                "status": rows.loc[entry["run"], "status"],
                "skips": ""
                if pd.isna(rows.loc[entry["run"], "skips"])
                else rows.loc[entry["run"], "skips"],
                "factors": rows.loc[entry["run"], "skip_factors"]
                or ("learned" if rows.loc[entry["run"], "method"].startswith("ls") else ""),
                "own": [
                    (key, value) for key, value in flat[entry["run"]].items() if key not in common
                ],
            }
            for entry in self.manifest["runs"]
        ]

    def notebooks(self) -> list[str]:
        """Rendered notebooks beside the page: those of the study first, in its order."""
        found = sorted(path.stem for path in (self.out / "notebooks").glob("*.html"))
        wanted = [name for name in self.config.get("notebooks") or [] if name in found]
        return wanted + [name for name in found if name not in wanted]


def embed(folder: Path, name: str) -> str | None:
    """A figure as a data address: vector where that is small, else pixels; None if not drawn."""
    vector, pixels = folder / f"{name}.svg", folder / f"{name}.png"
    small = vector.is_file() and vector.stat().st_size <= SVG_BYTES and name != "sample_grids"
    path = vector if small or not pixels.is_file() else pixels
    if not path.is_file():
        return None
    kind = "svg+xml" if path.suffix == ".svg" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    answer: list[tuple[str, Any]] = []
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            answer += _flat(value, f"{prefix}{key}.")
        else:
            answer.append((f"{prefix}{key}", value))
    return answer


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
