"""Tables, statistics, figures, report and notebooks, on a made-up results tree."""

import copy
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import jinja2
import nbformat
import numpy as np
import pandas as pd
import pytest
import synthetic
from matplotlib.text import Text
from miniature import base
from scipy import stats

from study import arms, published
from study.analysis import figures, statistics, style
from study.analysis.figures import base as figures_base
from study.analysis.figures.samples import read_samples
from study.analysis.names import MetricName
from study.analysis.notebook import run_notebook
from study.analysis.report import answers, origins
from study.analysis.report.page import report
from study.analysis.report.study import Study
from study.analysis.tables.aggregate import aggregate
from study.analysis.tables.columns import TABLES
from study.analysis.tables.read import Tables
from study.analysis.verdicts.base import final_levels, metric_values, pairs, verdict
from study.analysis.verdicts.stability import stability_answer
from study.analysis.verdicts.stf import stable_quality
from study.files import UserError
from study.spec.study import load

ROOT = Path(__file__).resolve().parent.parent
METRIC = "fd_digits_1797"
DIVERGED = (("patch_unet", "none", "dsm", 0), ("udit", "none", "stf", 1))
MISSING = (("ncsnpp", "ls", "stf", 1),)
# A small tree for tests that change it.
SMALL = {"backbones": ("uvit", "udit"), "scalings": ("none", "cs(0.7)"), "logged": 30}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The whole grid with two seeds, aggregated; returns its study.json."""
    root = tmp_path_factory.mktemp("tree")
    manifest = synthetic.build(root, diverged=DIVERGED, missing=MISSING, logged=70, images=20)
    aggregate(manifest, manifest.parent, manifest.parent / "tables")
    return manifest


@pytest.fixture(scope="module")
def tables(tree) -> Tables:
    return Tables.read(tree.parent / "tables", tree.parent)


@pytest.fixture(scope="module")
def drawn(tree) -> Path:
    """The folder of all figures."""
    folder = tree.parent / "figures"
    figures.draw_all(tree.parent / "tables", tree.parent, folder, formats=("svg",))
    return folder


def small(root: Path, **options) -> Path:
    settings = {**SMALL, "diverged": (), "missing": (), **options}
    return synthetic.build(root, **settings)


def gather(manifest: Path) -> Tables:
    aggregate(manifest, manifest.parent, manifest.parent / "tables")
    return Tables.read(manifest.parent / "tables", manifest.parent)


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def run_folder(manifest: Path, number: int = 0) -> Path:
    entry = json.loads(manifest.read_text())["runs"][number]
    return manifest.parent / "runs" / entry["run"]


def folder_of(manifest: Path, number: int = 0, place: int = 0) -> Path:
    """The folder of a run's measurement, the main one by default."""
    entry = json.loads(manifest.read_text())["runs"][number]
    name = entry["measurements"][place]["measurement"]
    return run_folder(manifest, number) / "measurements" / name


# --- tables --------------------------------------------------------------------------------------


def test_a_backbones_own_names_stand_beside_its_family():
    assert style.line_label("uvit_deep(skip=False) / dsm") == "U-ViT deep (skip=False) / dsm"
    assert style.line_label("patch_unet") == "Patch U-Net"
    assert style.line_label("mine_2") == "mine_2"
    lines = ["udit", "uvit_deep", "uvit", "mine"]
    assert style.order_lines(lines) == ["uvit", "uvit_deep", "udit", "mine"]


def test_every_run_is_a_row_and_divergence_is_a_result(tables):
    runs = tables.runs
    assert len(runs) == 100
    assert runs["status"].value_counts().to_dict() == {"done": 97, "diverged": 2, "missing": 1}
    lost = runs[runs["status"] == "diverged"].iloc[0]
    assert lost["reason"] == "non-finite loss"
    assert 0 < lost["step"] < lost["steps"]
    assert math.isfinite(lost["last_finite_loss"])
    rows = tables.metrics[tables.metrics["run"] == lost["run"]]
    assert set(rows["status"]) == {"diverged"}
    assert len(rows) == 5
    assert rows["value"].isna().all()


def test_summary_counts_what_is_behind_a_mean(tables):
    rows = tables.summary[tables.summary["metric"] == METRIC].set_index("arm")
    assert len(rows) == 50
    half = rows.loc["patch_unet / none / dsm"]
    assert (half["n"], half["n_diverged"], half["n_missing"]) == (1, 1, 0)
    assert math.isnan(half["ci_low"])
    absent = rows.loc["ncsnpp / ls / stf"]
    assert (absent["n"], absent["n_diverged"], absent["n_missing"]) == (1, 0, 1)
    whole = rows.loc["uvit / none / dsm"]
    assert whole["n"] == 2
    assert whole["min_of_n"] <= whole["ci_low"] <= whole["mean"] <= whole["ci_high"]
    # A best of several is in a column that says so.
    assert not {"minimum", "maximum", "best"} & set(rows.columns)
    assert (whole["better"], tables.metric_names()[0]) == ("lower", METRIC)


def test_the_same_inputs_give_the_same_bytes_in_any_order(tmp_path):
    manifest = small(tmp_path, diverged=(("uvit", "none", "stf", 0),))
    gather(manifest)
    content = json.loads(manifest.read_text())
    content["runs"].reverse()
    aggregate(content, manifest.parent, tmp_path / "again")
    written = sorted((manifest.parent / "tables").iterdir())
    assert {path.stem for path in written} == {*TABLES, "dynamics"}
    for path in written:
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_two_ways_to_measure_never_share_a_column(tmp_path):
    manifest = small(tmp_path)

    def change(content):
        content["identity"][METRIC]["nfe"] = 35

    edit(folder_of(manifest, 1) / "digits.json", change)
    aggregate(manifest, manifest.parent, tmp_path / "tables")
    rows = pd.read_csv(tmp_path / "tables" / "metrics.csv")
    names = sorted(name for name in set(rows["metric"]) if name.startswith(METRIC))
    assert all(re.fullmatch(METRIC + "_[0-9a-f]{8}", name) for name in names)
    assert len(names) == 2
    measured = rows[rows["metric"].isin(names) & rows["value"].notna()]
    assert measured["run"].is_unique  # every run in one of the two columns
    assert (measured.groupby("metric")["identity"].nunique() == 1).all()


def test_missing_and_broken_files_are_named_and_stop_nothing(tmp_path):
    manifest = small(tmp_path)
    (folder_of(manifest, 0) / "digits.json").unlink()
    (folder_of(manifest, 1) / "generate.json").unlink()
    (run_folder(manifest, 2) / "train" / "status.json").write_text('{"status": "do')
    (run_folder(manifest, 3) / "train" / "status.json").unlink()
    state = run_folder(manifest, 3) / "state"
    state.mkdir()
    (state / "progress.json").write_text('{"stage": "train", "step": 7, "steps": 1000}')
    (run_folder(manifest, 4) / "train" / "dynamics.parquet").write_bytes(b"not parquet")
    found = gather(manifest)
    checks = dict(zip(found.qc["run"], found.qc["check"], strict=True))
    names = [run_folder(manifest, number).name for number in range(5)]
    assert checks[names[0]] == checks[names[1]] == "missing measurements"
    detail = found.qc.set_index("run")["detail"]
    main = folder_of(manifest).name
    assert detail[names[0]] == f"1 of 5: {main} (not evaluated)"
    assert detail[names[1]] == f"1 of 5: {main} (not sampled)"
    assert "unreadable file" in set(found.qc.loc[found.qc["run"] == names[2], "check"])
    assert checks[names[3]] == "unfinished run"
    assert checks[names[4]] == "unreadable file"
    status = found.runs.set_index("run")["status"]
    assert (status[names[2]], status[names[3]]) == ("missing", "running")


def test_results_of_unlike_code_are_named(tmp_path):
    """After a change of the code and `--config only=...` a part of a study is of other code."""
    manifest = small(tmp_path, backbones=("uvit", "udit"), scalings=("none", "cs(0.7)", "ls"))
    paths, digests = {}, {"uvit": "aa", "udit": "bb"}
    for number, entry in enumerate(json.loads(manifest.read_text())["runs"]):
        axes = entry["axes"]
        # Learned scalings and stable targets need code that others do not.
        code = digests[axes["backbone"]] + axes["skip_scaling"][:2].replace("cs", "no")
        folder = run_folder(manifest, number)
        status = {"code": f"{code}{axes['target']}", "data_sha256": "d1"}
        edit(folder / "train" / "status.json", lambda c, new=status: c.update(new))
        for place in (folder / "measurements").iterdir():
            edit(place / "generate.json", lambda c, new=code: c.update(code=f"{new}-g"))
            edit(place / "digits.json", lambda c: c.update(code="ee"))
        paths.setdefault((axes["backbone"], axes["skip_scaling"], axes["target"]), folder)
    versions = "several versions of the "
    found = gather(manifest).qc
    assert not found["check"].str.startswith(versions).any()
    folder = paths["uvit", "cs(0.7)", "stf"]
    edit(folder / "train" / "status.json", lambda c: c.update(code="new", data_sha256="d2"))
    main = folder_of(manifest).name
    edit(folder / "measurements" / main / "generate.json", lambda c: c.update(code="new-g"))
    edit(folder / "measurements" / main / "digits.json", lambda c: c.update(code="new-e"))
    rows = gather(manifest).qc
    rows = rows[rows["check"].str.startswith(versions)]
    assert set(rows["severity"]) == {"warning"} and set(rows["run"]) == {""}
    found = {row.check.removeprefix(versions): row.detail for row in rows.itertuples()}
    assert found == {
        "training code": "uvit, edm, fixed scaling, stable target: 3 of aanostf, 1 of new",
        "generating code": "uvit, edm, fixed scaling, edm_heun: 39 of aano-g, 1 of new-g",
        "evaluating code": "metrics: 119 of ee, 1 of new-e",
        "data set": "digits: 23 of d1, 1 of d2",
    }


def test_a_study_without_any_result_still_has_its_tables_and_report(tmp_path):
    manifest = small(tmp_path)
    for entry in json.loads(manifest.read_text())["runs"]:
        for path in sorted((manifest.parent / "runs" / entry["run"]).rglob("*.*")):
            path.unlink()
    found = gather(manifest)
    assert set(found.runs["status"]) == {"missing"}
    page = report(manifest, manifest.parent, tmp_path / "report").read_text()
    assert "16 of 16 runs have no metrics yet" in page
    for draw in figures.FIGURES.values():
        draw(found)


def test_quality_checks_find_what_is_wrong(tmp_path):
    manifest = small(tmp_path)
    first, third = run_folder(manifest), run_folder(manifest, 2)
    weights = json.loads((folder_of(manifest) / "generate.json").read_text())["weights_sha256"]
    edit(folder_of(manifest, 1) / "generate.json", lambda c: c.update(weights_sha256=weights))
    edit(
        folder_of(manifest) / "digits.json",
        lambda c: c["metrics"].update(precision_digits_1797=1.5, recall_digits_1797=None),
    )
    frame = pd.read_parquet(third / "train" / "dynamics.parquet")
    frame.loc[3, "value"] = math.inf
    frame.to_parquet(third / "train" / "dynamics.parquet")
    edit(third / "train" / "status.json", lambda c: c.update(step=900))
    found = gather(manifest).qc
    assert {
        ("identical weights", first.name),
        ("implausible metric", first.name),
        ("non-finite history", third.name),
        ("stopped early", third.name),
    } == {(row.check, row.run) for row in found.itertuples() if row.severity == "error"}
    assert len(found[found["check"] == "implausible metric"]) == 2


def test_arms_with_equal_axes_are_told_apart_by_their_settings(tmp_path):
    manifest = small(tmp_path, seeds=(0,))
    content = json.loads(manifest.read_text())
    other = copy.deepcopy(content["runs"][0])
    other["run"], other["arm"] = other["run"] + "x", other["arm"] + "x"
    other["spec"]["training"]["lr"] = 0.01
    content["runs"].append(other)
    folder = run_folder(manifest)
    synthetic.write_run(folder.with_name(other["run"]), other, 30, 4, False)
    aggregate(content, manifest.parent, tmp_path / "tables")
    found = Tables.read(tmp_path / "tables", manifest.parent)
    arms = found.runs.set_index("run")["arm"]
    assert arms[other["run"]] == "uvit / none / dsm / training.lr=0.01"
    assert arms[folder.name] == "uvit / none / dsm / training.lr=0.001"
    # The other learning rate has no unscaled arm but itself: it is no one's baseline.
    assert not found.comparisons["baseline"].str.contains("0.01").any()
    figures.quality_heatmap(found)


def test_curves_are_thinned_and_keep_their_level(tables, tree):
    lengths = tables.dynamics.groupby(["run", "quantity", "where"])["step"].count()
    assert lengths.max() <= 60
    assert lengths.xs("skip_norm", level="quantity").max() <= 30
    run = tables.runs.loc[tables.runs["status"] == "done", "run"].iloc[0]
    raw = pd.read_parquet(tree.parent / "runs" / run / "train" / "dynamics.parquet")
    raw = raw[raw["quantity"] == "loss"]
    thin = tables.dynamics[
        (tables.dynamics["run"] == run) & (tables.dynamics["quantity"] == "loss")
    ]
    assert thin["points"].sum() == len(raw)
    assert np.average(thin["value"], weights=thin["points"]) == pytest.approx(raw["value"].mean())
    assert thin["raw"].iloc[-1] == raw["value"].iloc[-1]
    assert thin["minimum"].min() == raw["value"].min()
    assert not np.isinf(tables.dynamics["value"]).any()


def test_oscillation_is_the_relative_wobble_at_the_end_of_training(tables):
    levels = final_levels(tables, "decoder_norm_after", "1", "oscillation")
    scaling = tables.runs.set_index("run")["skip_scaling"]
    means = levels.groupby(scaling).mean()
    # The tree wobbles with standard deviation 0.08 x growth.
    assert means["none"] == pytest.approx(0.08, rel=0.15)
    assert means["cs(0.7)"] == pytest.approx(0.04, rel=0.15)


# --- statistics ----------------------------------------------------------------------------------


def test_paired_test_is_students():
    a, b = np.array([3.1, 2.9, 3.4, 3.0]), np.array([2.8, 2.8, 3.0, 2.9])
    ours, theirs = statistics.paired(a - b), stats.ttest_rel(a, b)
    assert ours.p == pytest.approx(theirs.pvalue)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert ours.low < ours.mean < ours.high
    assert ours.detectable > 0


@pytest.mark.parametrize(
    ("differences", "words"),
    [([], "no common seed"), ([0.4], "one pair: no test"), ([1.0, 1.0], "no spread")],
)
def test_where_no_test_is_possible_there_is_no_p(differences, words):
    result = statistics.paired(differences)
    assert math.isnan(result.p)
    assert words in result.note


def test_holm_steps_down_and_skips_what_was_not_tested():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    adjusted = statistics.holm([0.01, math.nan, 0.5])
    assert adjusted[0] == pytest.approx(0.02)
    assert math.isnan(adjusted[1])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]


def test_bootstrap_is_seeded_and_needs_two_values():
    values = [1.0, 2.0, 4.0, 8.0]
    low, high = statistics.bootstrap_interval(values)
    assert (low, high) == statistics.bootstrap_interval(values)
    assert 1 <= low < np.mean(values) < high <= 8
    assert all(math.isnan(end) for end in statistics.bootstrap_interval([1.0]))


def test_smoothing_leaves_a_trend_alone_to_its_very_ends():
    line = np.arange(50.0)
    assert statistics.smooth(line, 5) == pytest.approx(line)
    noise = np.random.default_rng(0).normal(size=200)
    assert statistics.smooth(noise, 5)[5:-5].std() < 0.5 * noise.std()


def test_a_trend_is_no_wobble():
    steps = np.arange(100)
    noise = np.random.default_rng(0).normal(size=(100, 2)) * [0.0, 0.3]
    found = statistics.wobble(steps, 3.0 + 0.2 * steps[:, None] + noise)
    assert found == pytest.approx([0.0, 0.3], abs=0.03)


def test_comparisons_pair_runs_by_their_seeds(tables):
    rows = tables.comparisons.set_index(["metric", "arm"])
    row = rows.loc[(METRIC, "uvit / cs(0.7) / stf")]
    values = tables.metrics[tables.metrics["metric"] == METRIC].pivot_table(
        index="seed", columns="arm", values="value"
    )
    difference = values["uvit / cs(0.7) / stf"] - values["uvit / none / dsm"]
    assert row["n_pairs"] == 2
    assert row["mean_difference"] == pytest.approx(difference.mean())
    assert row["baseline"] == "uvit / none / dsm"
    assert row["p_value"] <= row["p_holm"] <= 1
    assert (METRIC, "uvit / none / dsm") not in rows.index
    lost = rows.loc[(METRIC, "patch_unet / ls / dsm")]
    assert (lost["n_pairs"], lost["n_diverged_pairs"], lost["verdict"]) == (1, 1, "no test")
    assert "one pair: no test is possible" in lost["note"]
    assert "diverged" in lost["note"]


def test_better_is_said_only_where_the_test_says_so(tables):
    tested = tables.comparisons[tables.comparisons["p_holm"].notna()]
    claimed = tested["verdict"].isin(["better", "worse"])
    assert (claimed == (tested["p_holm"] < 0.05)).all()
    untested = tables.comparisons[tables.comparisons["p_holm"].isna()]
    assert set(untested["verdict"]) == {"no test"}
    good = tested[claimed & (tested["better"] == "lower")]
    assert ((good["mean_difference"] < 0) == (good["verdict"] == "better")).all()


def test_verdicts_are_honest_about_few_pairs():
    judge = verdict
    assert judge([-1.0, -1.1, -0.9], "x", positive=False).word == "reproduced"
    assert judge([-1.0, -1.1, -0.9], "x", positive=True).word == "not reproduced"
    unclear = judge([-1.0, 1.1, -0.9], "x", positive=False)
    assert unclear.word == "not testable at this budget"
    assert "holds zero" in unclear.reason
    assert judge([-1.0], "x", positive=False).word == "not testable at this budget"


def test_pairs_differ_in_one_column_alone(tables):
    values = metric_values(tables)
    both = pairs(tables, values, "target", "stf", "dsm")
    # 25 arms x 2 seeds, less one missing and two diverged.
    assert len(both) == 47
    row = both[(both["line"] == "uvit") & (both["skip_scaling"] == "ls")].iloc[0]
    runs = tables.runs.set_index(["line", "skip_scaling", "target", "data_seed"])["run"]
    key = ("uvit", "ls", "stf", row["data_seed"])
    assert row["stf"] == values[runs[key]]
    assert row["difference"] == pytest.approx(row["stf"] - row["dsm"])


# --- several ways of measuring -------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ways(tmp_path_factory) -> Path:
    """Two backbones, of which one was measured in half precision; returns the study.json."""
    made = small(tmp_path_factory.mktemp("ways"), backbones=("uvit", "ncsnpp"), seeds=(0, 1, 2))
    for path in made.parent.glob("runs/ncsnpp-*/measurements/*/digits.json"):
        content = json.loads(path.read_text())
        for identity in content["identity"].values():
            identity["precision"] = "bf16"
        path.write_text(json.dumps(content))
    gather(made)
    figures.draw_all(
        made.parent / "tables", made.parent, made.parent / "figures", ["quality_heatmap"], ["svg"]
    )
    return made


def test_a_backbone_that_was_measured_otherwise_is_not_missing(two_ways):
    tables = Tables.read(two_ways.parent / "tables", two_ways.parent)
    first, second = [name for name in tables.metric_names() if name.startswith("fd_")]
    assert tables.ways(first) == [first, second]
    rows = tables.metrics[tables.metrics["metric"] == first].merge(
        tables.runs[["run", "family"]], on="run"
    )
    states = rows.groupby("family")["status"].agg(set).to_dict()
    other = {"uvit", "ncsnpp"} - {name for name, found in states.items() if found == {"done"}}
    assert len(other) == 1
    assert states[other.pop()] == {"measured otherwise"}
    note = rows.loc[rows["status"] == "measured otherwise", "note"].unique()
    assert len(note) == 1
    assert re.fullmatch(rf"measured as {second}: precision \S+ instead of \S+", note[0])
    assert not (tables.metrics["status"] == "missing").any()
    assert tables.summary["n_missing"].sum() == 0
    checks = tables.qc[tables.qc["check"] == "several ways of measuring"]
    assert len(checks) == 2 * 5 and set(checks["severity"]) == {"note"}
    # Each is compared with its own unscaled arm, whichever column that is in.
    own = tables.by_arm(tables.comparisons, first, "n_pairs")
    assert (own["n_pairs"] == 3).all() and set(own["line"]) == {"uvit", "ncsnpp"}
    away = tables.comparisons[tables.comparisons["n_pairs"] == 0]
    assert set(away["note"]) == {"3 pairs left out: measured otherwise"}
    values = metric_values(tables)
    assert len(values) == len(tables.runs)
    assert len(pairs(tables, values, "skip_scaling", "cs(0.7)", "none")) == 12
    assert pairs(tables, values, "line", "uvit", "ncsnpp").empty


def test_every_backbone_has_its_best_arm_however_it_was_measured(two_ways, tmp_path):
    html = report(two_ways, two_ways.parent, tmp_path).read_text()
    table = re.search(r"Best arm of each backbone.*?</table>", html, re.DOTALL)[0]
    assert "U-ViT" in table and "NCSN++" in table
    assert re.search(r"measured otherwise: FD \(digits\), 1797 images, identity [0-9a-f]{8}", table)
    assert re.search(r"(\d+) of \1 arms could be tested", html)
    tables = Tables.read(two_ways.parent / "tables", two_ways.parent)
    assert "measured\notherwise" in texts(figures.quality_heatmap(tables))
    small_print = texts(figures.quality_heatmap(tables)).replace("\n", " ")
    assert re.search(r"\d+ measured otherwise, not shown", small_print)
    assert "precision bf16" in html  # the ways are told apart where they are described


@pytest.mark.parametrize(
    ("name", "parts", "label"),
    [
        ("fd_digits_1797", ("fd", "digits", 1797, ""), "FD (digits), 1797 images"),
        ("fid_50000", ("fid", "", 50000, ""), "FID, 50000 images"),
        ("fid_50000_ab12cd34", ("fid", "", 50000, "ab12cd34"), None),
        ("kid_digits_1797_12345678", ("kid", "digits", 1797, "12345678"), None),
    ],
)
def test_parts_of_a_metrics_name(name, parts, label):
    assert astuple(MetricName.parse(name)) == parts
    shown = style.metric_label(name)
    assert shown == label if label else shown.endswith(f" images, identity {parts[3]}")


def test_tables_of_another_version_are_named(two_ways, tmp_path):
    shutil.copytree(two_ways.parent / "tables", tmp_path / "tables")
    path = tmp_path / "tables" / "summary.csv"
    pd.read_csv(path).drop(columns="n_otherwise").to_csv(path, index=False)
    with pytest.raises(UserError, match=r"summary\.csv: has no column n_otherwise"):
        Tables.read(tmp_path / "tables")


# --- what is not judged --------------------------------------------------------------------------


def test_stable_targets_are_not_judged_on_arms_that_know_the_class(tmp_path):
    made = small(tmp_path, backbones=("uvit", "ddpmpp"), seeds=(0, 1, 2, 3))
    content = json.loads(made.read_text())
    for entry in content["runs"]:
        entry["spec"]["training"]["conditional"] = True
        path = made.parent / "runs" / entry["run"] / "train" / "status.json"
        if path.is_file():
            status = json.loads(path.read_text())
            path.write_text(json.dumps(status | {"spec": entry["spec"]}))
    made.write_text(json.dumps(content))
    tables = gather(made)
    rows = tables.comparisons
    stf = rows["target"] == "stf"
    assert set(rows.loc[stf, "verdict"]) == {"no test"}
    assert rows.loc[stf, "p_value"].isna().all()
    assert rows.loc[stf, "mean_difference"].notna().all()  # shown, not judged
    assert rows.loc[stf, "note"].str.startswith("no verdict: these arms are told the class").all()
    assert rows.loc[~stf, "p_value"].notna().any()
    against = tables.stability[tables.stability["against"] == "dsm"]
    assert len(against) and set(against["verdict"]) == {"no test"}
    assert not (tables.stability_pairs["against"] == "dsm").any()
    said = " ".join(stability_answer(tables).summary)
    assert "STF against DSM at the same backbone and scaling: no verdict" in said
    ((_, found),) = stable_quality(tables)
    assert found.word == "not testable at this budget"
    assert "told the class" in found.reason
    page = report(made, made.parent, tmp_path / "page").read_text()
    assert "biased for a class-conditional network" in page
    assert "shown and not judged" in page


def test_arms_that_share_a_name_are_told_apart(tmp_path):
    study = load(
        base()
        | {
            "grid": {
                "backbone": ["uvit", "twin"],
                "skip_scaling": ["none", "cs(0.7)"],
                "target": ["dsm", "stf(64)", "stf(128)"],
                "formulation": ["edm", {"kind": "edm", "P_mean": -0.8}, "vp"],
                "training": [{"lr": 1e-3}, {"lr": 2e-3}],
            },
            "backbones": {"uvit": {"preset": "tiny"}, "twin": {"family": "uvit"}},
        }
    )
    content = arms.manifest(study, arms.runs(study))
    for entry in content["runs"]:
        entry["display"] = "a name"
    aggregate(content, tmp_path, tmp_path / "tables")
    tables = Tables.read(tmp_path / "tables")
    runs = tables.runs
    assert runs["arm"].nunique() == len(runs) == 2 * 2 * 3 * 3 * 2
    assert runs["display"].nunique() == len(runs)
    words = [
        (style.line_label(row.line), style.scaling_label(row.skip_scaling), row.target)
        for row in runs.itertuples()
    ]
    assert len(set(words)) == len(words)
    families = runs.drop_duplicates("line").set_index("line")["family"].to_dict()
    assert set(style.markers(families, families)) == set(families)
    some = dict(list(families.items())[:3])
    assert len(set(style.markers(some, some).values())) == 3


# --- figures -------------------------------------------------------------------------------------


def texts(figure) -> str:
    return "\n".join(artist.get_text() for artist in figure.findobj(Text))


def test_every_figure_is_drawn_and_says_what_it_is_made_of(tables, drawn):
    without_probe = {name for name, one in figures.FIGURES.items() if one.applies(tables)}
    assert {path.stem for path in drawn.glob("*.svg")} == without_probe
    assert {"quality_over_training", "quality_over_kappa"} < without_probe
    assert "quality_over_guidance" not in without_probe
    some = tables.only(family=["udit", "ncsnpp"], skip_scaling=["none", "ls"])
    for name in sorted(without_probe):
        small_print = texts(figures.FIGURES[name](some)).replace("\n", " ")
        assert "15 of 16 runs (1 diverged, 1 missing), n = 2 seeds per arm" in small_print, name


def test_quality_figures_name_their_metric_and_mark_divergence(tables):
    words = texts(figures.quality_heatmap(tables))
    assert "FD (digits), 1797 images (lower is better)" in words
    assert tables.identity(METRIC)["identity"] in words
    assert "FID" not in words
    assert "1/2 diverged" in words
    assert "diverged\nat step" in texts(figures.sample_grids(tables))
    assert "Patch U-Net, none, DSM, seed 0" in texts(figures.divergence(tables))
    calm = tables.only(family="uvit")
    assert "No run diverged" in texts(figures.divergence(calm))


def test_two_builds_give_the_same_files_without_dates(tree, drawn, tmp_path):
    figures.draw_all(tree.parent / "tables", tree.parent, tmp_path / "svg", formats=["svg"])
    for path in drawn.glob("*.svg"):
        assert (tmp_path / "svg" / path.name).read_bytes() == path.read_bytes(), path.name
    for folder in ("a", "b"):
        figures.draw_all(
            tree.parent / "tables", tree.parent, tmp_path / folder, only=["quality_heatmap"]
        )
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [f"quality_heatmap.{suffix}" for suffix in ("pdf", "png", "svg")]
    for name in names:
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes()
        assert b"CreationDate" not in content
        assert b"dc:date" not in content


def test_a_new_figure_is_one_function_and_one_line(tables):

    @figures_base.drawn("samples")
    def all_seeds(tables):
        """Seeds."""
        return figures_base.text_figure("Seeds", str(sorted(set(tables.runs["seed"]))))

    assert all_seeds.section == "samples" and all_seeds.probe is None
    assert "['0', '1']" in texts(all_seeds(tables))


def test_unknown_figure_is_named(tree, tmp_path):
    with pytest.raises(UserError, match="'nonsense' is unknown; there are quality_heatmap"):
        figures.draw_all(tree.parent / "tables", tree.parent, tmp_path, only=["nonsense"])


def test_only_the_first_samples_are_read(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3)).astype(np.uint8)
    for name, save in (("a", np.savez), ("b", np.savez_compressed)):
        save(tmp_path / f"{name}.npz", arr_0=images, arr_1=np.zeros(50))
        assert (read_samples(tmp_path / f"{name}.npz", 7) == images[:7]).all()
    np.savez(tmp_path / "none.npz", arr_0=images[:0])
    assert read_samples(tmp_path / "none.npz", 7).shape == (0, 8, 8, 3)
    np.savez(tmp_path / "float.npz", arr_0=images.astype(float))
    with pytest.raises(UserError, match="samples are uint8"):
        read_samples(tmp_path / "float.npz", 7)


def test_words_and_colours_are_fixed():
    assert style.metric_label("fd_digits_1797") == "FD (digits), 1797 images"
    assert style.metric_label("fid_50000") == "FID, 50000 images"
    assert style.scaling_label("cs(0.5, per_level)") == "CS 0.5, per_level"
    assert style.line_label("ddpmpp(dropout=0.1) / vp") == "DDPM++ (dropout=0.1) / vp"
    assert style.order_scalings(["ls", "cs(0.5)", "none", "cs(0.9)", "inv_sqrt2"]) == [
        *("none", "inv_sqrt2", "cs(0.9)", "cs(0.5)", "ls")
    ]
    colours = style.scaling_colours(["cs(0.9)", "cs(0.5)", "ls", "none"])
    assert len(set(colours.values())) == 4
    assert colours["cs(0.9)"] == style.COLOURS["cs"]
    families = {"uvit": "uvit", "deep": "uvit", "mine": "mine"}
    markers = style.markers(families, families)
    assert len(set(markers.values())) == 3
    assert markers["uvit"] == style.MARKERS["uvit"]


def test_analysis_needs_no_torch():
    code = (
        "import sys, study.analysis.report.page, study.analysis.figures.picture;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- report --------------------------------------------------------------------------------------


def test_the_report_is_one_file_that_needs_nothing_else(tree, drawn, tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "overview.html").write_text("x")
    path = report(tree, tree.parent, tmp_path)
    page = path.read_text()
    assert path.stat().st_size < 4e6
    assert not re.search(r"https?://", page)
    assert set(re.findall(r'(?:src|href)="([^"#]{1,30})', page)) == {
        *("data:image/svg+xml;base64,PD94", "notebooks/overview.html")
    }
    assert page.count('src="data:image/') == len(list(drawn.glob("*.svg")))
    assert "more" not in {one.section for one in figures.FIGURES.values()}
    assert "100 runs of 50 arms, 97 finished, 2 diverged, 1 missing or unfinished" in page
    assert "1 of 100 runs has no metrics yet" in page
    assert "ncsnpp-ls-stf-s1" in page
    assert "non-finite loss" in page
    assert synthetic.PROVENANCE["git"]["commit"] in page
    # What is not FID is called FID only where the page says that it is not.
    for found in re.finditer(r"\bFID\b", page):
        assert re.search(r"is not (the Inception )?FID", page[found.start() - 30 : found.end()])


def test_the_report_claims_nothing_from_one_seed(tmp_path):
    manifest = small(tmp_path, seeds=(0,))
    gather(manifest)
    page = report(manifest, manifest.parent, tmp_path / "report").read_text()
    assert "a test needs at least two seeds" in page
    assert "One seed per arm" in page
    assert "one pair: no test is possible" in page
    assert 'class="verdict better"' not in page


def test_the_data_sets_note_stands_wherever_its_metrics_do(tmp_path):
    manifest = small(tmp_path, seeds=(0,))
    note = "a lossy copy <of> the data"
    edit(manifest, lambda c: c["config"]["dataset"].update(note=note))
    found = gather(manifest)
    page = report(manifest, manifest.parent, tmp_path / "report").read_text()
    assert page.count("a lossy copy &lt;of&gt; the data") >= 4
    assert note in texts(figures.quality_heatmap(found)).replace("\n", " ")


def test_an_arm_is_shown_with_the_name_that_it_was_given(tmp_path):
    manifest = synthetic.build(
        tmp_path, backbones=("uvit",), targets=("dsm",), seeds=(0,), diverged=(), missing=()
    )
    content = json.loads(manifest.read_text())
    named = next(run for run in content["runs"] if run["axes"]["skip_scaling"] != "none")
    named["display"] = "my <own> arm"
    content["config"]["arms"] = [{"name": "my <own> arm"}, {"name": None}]
    aggregate(content, manifest.parent, manifest.parent / "tables")
    page = report(content, manifest.parent, tmp_path / "report").read_text()
    told = "<td>U-ViT<br><small>my &lt;own&gt; arm</small></td>"
    assert page.count(told) >= 3  # quality, comparisons, cost
    assert page.count("<td>U-ViT</td>") > page.count(told)


def test_the_report_asks_for_its_tables(tmp_path):
    manifest = small(tmp_path, seeds=(0,))
    with pytest.raises(UserError, match=r"runs.csv: no such table; `study aggregate` writes it"):
        report(manifest, manifest.parent, tmp_path / "report")


# --- published numbers ---------------------------------------------------------------------------


def test_published_numbers_have_sources_and_none_is_from_memory():
    rows = published.numbers()
    assert len(rows) > 700
    assert all(row.source and row.paper and row.value for row in rows)
    assert {row.origin for row in rows} == {"stated", "digitised"}
    assert all(row.reading_error for row in rows if row.origin == "digitised")
    assert not any("[R]" in text for row in rows for text in vars(row).values())
    (stf,) = published.numbers(paper="STF", metric="FID-50K")
    assert stf.number == 1.9


CIFAR10 = synthetic.identity() | {"reference": "cifar10", "reference_images": 50_000}
FOLDER = {"name": "cifar10", "source": "folder", "resolution": 32}


@pytest.mark.parametrize(
    ("dataset", "metric", "expected"),
    [
        ({"name": "cifar10", "source": "cifar10"}, "fid_50000", {"3.11"}),
        ({"name": "cifar10", "source": "cifar10"}, "fid_10000", set()),
        ({"name": "cifar10", "source": "cifar10"}, "fd_pixels_50000", set()),
        ({"name": "cifar10-jpeg", "source": "zip", "resolution": 32}, "fid_50000", set()),
        ({"name": "cifar10", "source": "cifar10", "note": "JPEG copy"}, "fid_50000", set()),
        ({"name": "digits", "source": "digits"}, "fid_50000", set()),
        # A name is not enough.
        ({"name": "cifar10", "source": "folder", "resolution": 32}, "fid_50000", {"3.11"}),
        ({**FOLDER, "max_images": 1000}, "fid_50000", set()),
        ({**FOLDER, "split": "test"}, "fid_50000", set()),
        ({**FOLDER, "resolution": 64}, "fid_50000", set()),
        ({**FOLDER, "resolution": None}, "fid_50000", set()),
        ({**FOLDER, "path": "/data/cifar10_jpg"}, "fid_50000", set()),
        ({**FOLDER, "note": "a lossy copy"}, "fid_50000", set()),
        ({**FOLDER, "color": "grey"}, "fid_50000", set()),
        ({**FOLDER, "source": "lsun"}, "fid_50000", set()),
        ({**FOLDER, "name": "cifar100"}, "fid_50000", set()),
        ({"name": "celeba64", "source": "cifar10", "resolution": 64}, "fid_50000", set()),
    ],
)
def test_only_comparable_numbers_stand_beside_ours(dataset, metric, expected):
    spec = synthetic.spec("uvit", "none", "dsm", 0, 1000)
    found = published.beside(dataset, spec, metric, CIFAR10)
    foreign = "images: theirs the data set's own files; ours a folder named cifar10"
    assert all((foreign in row["differences"]) == (dataset["source"] == "folder") for row in found)
    assert {row["number"].value for row in found} == expected
    for row in found:
        differences = "\n".join(row["differences"])
        assert "theirs Euler–Maruyama" in differences
        assert "ours 1000 steps of 64 images" in differences


def test_stable_targets_stand_beside_stf_and_plain_ones_beside_edm():
    dataset = {"name": "cifar10", "source": "cifar10"}
    for target, value in (("stf", "1.9"), ("dsm", "1.97")):
        spec = synthetic.spec("ddpmpp", "none", target, 0, 1000)
        found = published.beside(dataset, spec, "fid_50000", CIFAR10)
        assert {row["number"].value for row in found} == {value}


def test_another_reference_or_guidance_is_another_measurement():
    dataset = {"name": "cifar10", "source": "cifar10"}
    spec = synthetic.spec("uvit", "none", "dsm", 0, 1000)
    few = {**CIFAR10, "reference_images": 1000}
    assert published.beside(dataset, spec, "fid_50000", few) == []
    (row,) = published.beside(dataset, spec, "fid_50000", {**CIFAR10, "guidance": "3.0"})
    assert any(text.startswith("guidance: ") for text in row["differences"])
    # Where a study measured in several ways, the name of the metric says so.
    assert published.beside(dataset, spec, "fid_50000_ab12cd34", CIFAR10)


OWN = {"name": "cifar10", "source": "cifar10", "resolution": 32, "color": None}
OTHERS = {"name": "birds", "source": "folder", "resolution": 32, "color": None}
COPY = {"name": "cifar10-copy", "source": "folder", "resolution": 32, "color": None}


@pytest.mark.parametrize("order", [(OWN, OTHERS, COPY), (COPY, OTHERS, OWN)])
def test_published_numbers_stand_beside_the_arms_of_their_data_set_alone(tmp_path, order):
    manifest = small(tmp_path, backbones=("uvit",), scalings=("none",), targets=("dsm",))
    for dataset in order:
        note = "a lossy copy" if dataset is COPY else ""
        synthetic.also_on(manifest, dataset, 50_000, "inception", note)

    def without(dataset):
        def change(content):
            runs = content["runs"]
            content["runs"] = [one for one in runs if one["spec"]["dataset"] != dataset]

        edit(manifest, change)

    without(synthetic.DIGITS)
    found = gather(manifest)
    notes = found.runs.set_index("dataset")["dataset_note"].to_dict()
    assert notes == {"cifar10": "", "birds": "", "cifar10-copy": "a lossy copy"}
    content = json.loads(manifest.read_text())
    answer = origins.published(Study(content, found))
    (row,) = answer["rows"]
    assert (row["theirs"], row["model"]) == ("3.11", "U-ViT-S/2")
    runs = found.runs.set_index("run")
    assert runs.loc[runs["arm"] == row["arm"], "dataset"].unique().tolist() == ["cifar10"]

    without(OWN)
    answer = origins.published(Study(json.loads(manifest.read_text()), gather(manifest)))
    assert answer["rows"] == []
    assert all(one["name"] in answer["reason"] for one in (OTHERS, COPY))


# --- notebooks and captions ----------------------------------------------------------------------

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_lie_in_the_repository_without_outputs(path):
    content = nbformat.read(path, as_version=4)
    nbformat.validate(content)
    code = [cell for cell in content.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert [cell.metadata.get("tags") for cell in code].count(["parameters"]) == 1


def test_a_notebook_runs_here_and_renders_offline(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tree.parent)
    parameters = {"tables": "tables", "results": ".", "figures": "figures"}
    out, page = tmp_path / "uvit.ipynb", tmp_path / "html" / "uvit.html"
    run_notebook(ROOT / "notebooks" / "uvit.ipynb", out, page, parameters)
    content = nbformat.read(out, as_version=4)
    assert not any("papermill" in cell.metadata for cell in content.cells)
    html = page.read_text()
    assert not re.search(r"https?://|<script", html)
    assert 'src="data:image/png;base64,' in html
    assert "no arm of this study trains a U-ViT without long skips" in html
    assert "Not testable at this budget" in html


def test_a_failing_notebook_leaves_what_it_did(tmp_path):
    cells = [nbformat.v4.new_code_cell("print('so far')"), nbformat.v4.new_code_cell("1 / 0")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "bad.ipynb")
    with pytest.raises(UserError, match="cell 2 failed: ZeroDivisionError"):
        run_notebook(tmp_path / "bad.ipynb", tmp_path / "out.ipynb", tmp_path / "out.html")
    kept = nbformat.read(tmp_path / "out.failed.ipynb", as_version=4)
    assert "so far" in json.dumps(kept.cells)
    assert not (tmp_path / "out.ipynb").exists()
    assert not (tmp_path / "out.html").exists()


def test_every_figure_and_table_of_the_workflow_has_a_caption():
    class Wildcards:
        pass

    class Snakemake:
        wildcards = Wildcards()

    source = (ROOT / "workflow" / "report" / "figure.rst").read_text()
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(source)
    captions = set()
    for name in figures.FIGURES:
        Snakemake.wildcards.figure = name
        caption = template.render(snakemake=Snakemake).strip()
        assert not caption.startswith("Drawn from"), name
        captions.add(caption)
    assert len(captions) == len(figures.FIGURES)
    for name in (
        *("summary", "comparisons", "measurements", "curves"),
        *("stability", "measures", "cost", "qc"),
    ):
        assert name in TABLES
        assert (ROOT / "workflow" / "report" / f"{name}.rst").is_file()


# --- reference points ------------------------------------------------------------------------


def with_points(manifest: Path, gaussian: float, **changed) -> Tables:
    """The tables of a study that knows what numbers mean."""
    tables = gather(manifest)
    identity = tables.identity(METRIC)
    reference = {
        "dataset": identity["reference"],
        "dataset_sha256": identity["reference_sha256"],
        "extractor": identity["extractor"],
        "extractor_sha256": identity["extractor_sha256"],
    }
    record = {
        "reference": reference | changed,
        "images": 1797,
        "metrics": {"fd": METRIC},
        "points": {"real": {"fd": 1e-12}, "gaussian": {"fd": gaussian}, "noise": {"fd": 90.0}},
    }
    folder = manifest.parent / "points"
    folder.mkdir(exist_ok=True)
    (folder / "digits.digits-all.json").write_text(json.dumps(record), encoding="utf-8")
    return gather(manifest)


def test_numbers_stand_beside_those_of_real_images_a_gaussian_and_noise(tmp_path):
    manifest = small(tmp_path)
    means = gather(manifest).summary.query("metric == @METRIC").groupby("line")["mean"].min()
    limit = means.sort_values().mean()  # between the two backbones
    tables = with_points(manifest, limit)
    assert tables.reference_points(METRIC) == {
        "real": 1e-12,
        "gaussian": pytest.approx(limit),
        "noise": 90,
    }
    assert tables.reference_points("kid_digits_1797") == {}
    (said,) = answers.reference_points(Study(json.loads(manifest.read_text()), tables))
    assert "real images 0, a Gaussian fitted to their pixels" in said
    worse = style.line_label(means.idxmax())
    assert f"No arm of {worse} is better than the Gaussian" in said
    assert answers.beaten(tables, METRIC, {"gaussian": 1e9}) == []
    assert len(answers.beaten(tables, METRIC, {"gaussian": 0.0})) == 2
    figure = figures.quality.quality_heatmap(tables)
    assert any("For comparison: real images 0" in text.get_text() for text in figure.texts)


def test_points_of_another_reference_say_nothing(tmp_path):
    tables = with_points(small(tmp_path), 5.0, dataset_sha256="of other images")
    assert tables.reference_points(METRIC) == {} and len(tables.points) == 3
    assert answers.reference_points(Study({"study": "x", "runs": []}, tables)) == []
