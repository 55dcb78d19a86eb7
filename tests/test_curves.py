"""Many measurements of a run: their rows, the curves over them, their figures and their words."""

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic
from matplotlib.text import Text
from PIL import Image

from study.analysis import figures
from study.analysis.figures.picture import picture
from study.analysis.figures.samples import _first_samples
from study.analysis.report import answers, curves
from study.analysis.report.page import report
from study.analysis.report.study import Study
from study.analysis.tables.aggregate import aggregate
from study.analysis.tables.axes import OVER, settings
from study.analysis.tables.measurements import labels_text, sampler_text
from study.analysis.tables.read import Tables
from study.analysis.verdicts.stf import stable_quality
from study.fidelity.evaluate import metric_name
from study.fidelity.extractors import EXTRACTORS
from study.pictures import tile, untile
from study.spec.metrics import METRICS, numbers

FD = "fd_digits_500"
MAIN = "fd_digits_1797"
OVERS = [f"quality_over_{name}" for name in OVER]


def build(root: Path, **options) -> Path:
    """Two arms of one backbone, two seeds; returns their study.json."""
    plain = {"backbones": ("uvit",), "scalings": ("none", "cs(0.7)"), "targets": ("dsm",)}
    plain |= {"seeds": (0, 1), "diverged": (), "missing": (), "logged": 10, "images": 4}
    return synthetic.build(root, **{**plain, **options})


def gather(manifest: Path) -> Tables:
    aggregate(manifest, manifest.parent, manifest.parent / "tables")
    return Tables.read(manifest.parent / "tables", manifest.parent)


def entries(manifest: Path) -> dict:
    return json.loads(manifest.read_text())


def add(manifest: Path, asked: Iterable[dict], level: Callable[[dict, dict], float | None]) -> None:
    """Give every run further measurements, of the quality that ``level`` says; None: not made.

    A measurement that it has already is asked for by one more protocol.
    """
    content = entries(manifest)
    for entry in content["runs"]:
        folder = manifest.parent / "runs" / entry["run"]
        status = folder / "train" / "status.json"
        ended = json.loads(status.read_text())["status"] if status.is_file() else None
        known = {one["measurement"]: one for one in entry["measurements"]}
        for one in json.loads(json.dumps(list(asked))):
            if one["measurement"] in known:
                known[one["measurement"]]["protocols"] += one["protocols"]
                continue
            entry["measurements"].append(one)
            value = level(entry, one)
            if ended and value is not None:
                reason = "diverged" if ended == "diverged" else None
                synthetic.write_measurement(folder, one, value, reason=reason)
    manifest.write_text(json.dumps(content))


def places(manifest: Path, number: int) -> list[Path]:
    """The folders of a run's measurements, in the manifest's order."""
    entry = entries(manifest)["runs"][number]
    folder = manifest.parent / "runs" / entry["run"] / "measurements"
    return [folder / one["measurement"] for one in entry["measurements"]]


def edit(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def final(protocol: str, **changes) -> dict:
    return synthetic.measurement("final", 1000, True, [protocol], True, **changes)


def probe_costs(manifest: Path, macs: dict[str, float]) -> None:
    """Give every run what the probe ``cost`` leaves: multiply-adds by its backbone."""
    content = entries(manifest)
    for entry in content["runs"]:
        folder = manifest.parent / "runs" / entry["run"] / "probes"
        folder.mkdir(parents=True, exist_ok=True)
        row = {"quantity": "macs", "value": macs[entry["axes"]["backbone"]], "unit": "MAC/image"}
        pd.DataFrame([{**row, "batch": 1, "device": "cpu"}]).to_parquet(folder / "cost.parquet")
    content["config"]["probes"] = [{"kind": "cost", "seeds": None}]
    manifest.write_text(json.dumps(content))


def texts(figure) -> str:
    return "\n".join(artist.get_text() for artist in figure.findobj(Text))


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Tables:
    """A grid with a run that diverged, one that is missing and a protocol for every axis."""
    made = build(
        tmp_path_factory.mktemp("rich"),
        backbones=("uvit", "udit"),
        scalings=("none", "cs(0.9)", "cs(0.5)", "ls"),
        targets=("dsm", "stf"),
        diverged=(("udit", "none", "dsm", 1),),
        missing=(("udit", "ls", "stf", 1),),
    )
    guided = [None, 1.5, 4.0]
    guidance = [
        final("guided", guidance=scale and {"kind": "edm", "scale": scale, "channels": None})
        for scale in guided
    ]
    walks = [
        final("steps", sampler={"kind": "edm_heun", "steps": steps}, weights=weights)
        for steps in (5, 20)
        for weights in ("ema", "raw")
    ]
    add(made, [*guidance, *walks], lambda entry, one: 5.0 + len(one["measurement"]) / 100)
    content = entries(made)
    larger = [entry for entry in content["runs"] if entry["axes"]["target"] == "stf"]
    for entry in json.loads(json.dumps(larger)):
        entry["spec"]["target"]["reference"] = 64
        entry["run"], entry["arm"] = entry["run"] + "-64", entry["arm"] + "-64"
        synthetic.write_run(made.parent / "runs" / entry["run"], entry, 10, 4, False)
        content["runs"].append(entry)
    made.write_text(json.dumps(content))
    probe_costs(made, {"uvit": 3e6, "udit": 5e6})
    return gather(made)


# --- rows ----------------------------------------------------------------------------------------


def test_every_measurement_is_a_row_and_no_two_rows_are_one(tables):
    rows = tables.measurements
    assert not rows.duplicated(["run", "protocol", "measurement", "extractor", "metric"]).any()
    known = rows[rows["identity"] != ""]
    # What a run measured twice in one protocol, it measured in two ways or with two seeds.
    assert not known.duplicated(["run", "protocol", "metric", "identity", "sampling_seed"]).any()
    described = tables.identities.set_index("identity")
    assert described.index.is_unique and set(known["identity"]) == set(described.index)
    assert set(described.loc[known.loc[known["step"] == 250, "identity"], "snapshot"]) == {"250"}
    places = ["step", "best", "weights", "sampler", "sampler_steps", "guidance_scale", "labels"]
    keys = ["arm", "protocol", "metric", "identity", *places, "images"]
    assert not tables.curves.duplicated(keys).any()
    one = rows[(rows["run"] == rows["run"].iloc[0]) & (rows["protocol"] == "curve")]
    assert list(one["step"]) == [250, 500, 750, 1000]
    assert list(one["last"]) == ["false", "false", "false", "true"]
    assert list(one["images_seen"]) == [step * 64 for step in one["step"]]
    assert set(one["sampler"]) == {"edm_heun"} and set(one["sampler_steps"]) == {10}
    assert set(rows.loc[rows["protocol"] == "guided", "nfe"].dropna()) == {19, 38}


def test_the_main_measurement_speaks_for_a_run(tables):
    main = tables.metrics[tables.metrics["metric"] == MAIN].set_index("run")["value"]
    rows = tables.measurements
    own = rows[(rows["protocol"] == "final") & (rows["metric"] == MAIN)].set_index("run")["value"]
    pd.testing.assert_series_equal(main.dropna().sort_index(), own.dropna().sort_index())
    assert tables.leading_metric() == MAIN
    assert FD not in set(tables.metrics["metric"])


def test_a_missing_measurement_is_a_row_without_a_value(tmp_path):
    made = build(tmp_path)
    lost = places(made, 0)[2]
    (lost / "digits.json").unlink()
    gone = places(made, 1)[3]
    for path in gone.iterdir():
        path.unlink()
    found = gather(made)
    rows = found.measurements[found.measurements["status"] != "done"]
    assert list(rows["status"]) == ["missing"] * 2
    assert rows["value"].isna().all() and set(rows["identity"]) == {""}
    assert dict(zip(rows["step"], rows["note"], strict=True)) == {
        500: "not evaluated",
        750: "not sampled",
    }
    assert set(rows["metric"]) == {FD}
    curve = found.curves[(found.curves["metric"] == FD) & (found.curves["skip_scaling"] == "none")]
    counts = curve.set_index("step")[["n", "n_runs", "n_missing"]].astype(int)
    assert counts.loc[500].to_list() == counts.loc[750].to_list() == [1, 2, 1]
    assert counts.loc[1000].to_list() == [2, 2, 0]
    assert [(row.check, row.detail) for row in found.qc.itertuples()] == [
        ("missing measurements", f"1 of 5: {lost.name} (not evaluated)"),
        ("missing measurements", f"1 of 5: {gone.name} (not sampled)"),
    ]
    # The main measurements are whole: no run is missing from the tables that they fill.
    assert (found.summary["n"] == 2).all()
    page = report(made, made.parent, tmp_path / "report").read_text()
    assert "2 of 20 measurements are missing." in page
    assert "<li>uvit · none · dsm, seed 0: protocol curve</li>" in page


def test_runs_without_a_result_are_named_with_their_measurements(tmp_path):
    made = build(tmp_path, missing=(("uvit", "none", "dsm", 0),))
    found = gather(made)
    rows = found.measurements[found.measurements["status"] == "missing"]
    assert len(rows) == 5 + 4  # all numbers of the protocol final, a curve
    assert set(rows["metric"]) <= set(found.metrics["metric"]) | {FD}
    page = report(made, made.parent, tmp_path / "report").read_text()
    assert "1 of 4 runs has no metrics yet. 5 of 20 measurements are missing." in page
    assert "seed 0: protocol curve, 4 measurements" in page


def test_a_run_that_no_protocol_measures_is_not_missing(tmp_path):
    made = build(tmp_path)
    content = entries(made)
    content["runs"][0]["measurements"] = []
    content["runs"][2]["measurements"] = content["runs"][2]["measurements"][
        1:2
    ]  # an early snapshot
    made.write_text(json.dumps(content))
    found = gather(made)
    runs = found.runs.set_index("run").loc[[content["runs"][n]["run"] for n in (0, 2)]]
    assert list(runs["evaluation"]) == ["not asked for", "done"]
    rows = found.metrics[found.metrics["run"] == runs.index[0]]
    assert set(rows["status"]) == {"not measured"}
    assert found.qc[found.qc["run"] != ""].empty
    assert set(found.metrics.loc[found.metrics["metric"] == FD, "value"].notna()) == {True, False}
    page = report(made, made.parent, tmp_path / "report").read_text()
    assert "no metrics yet" not in page and "missing." not in page


def test_a_diverged_run_keeps_what_it_was_before(tables):
    lost = tables.runs[tables.runs["status"] == "diverged"].iloc[0]
    rows = tables.measurements
    rows = rows[(rows["run"] == lost["run"]) & (rows["protocol"] == "curve")].set_index("step")
    early = rows.index <= lost["step"]
    assert early.any() and not early.all()
    assert set(rows.loc[early, "status"]) == {"done"} and rows.loc[early, "value"].notna().all()
    assert set(rows.loc[~early, "status"]) == {"diverged"}
    assert rows.loc[~early, "value"].isna().all()
    curve = tables.curves
    curve = curve[(curve["arm"] == lost["arm"]) & (curve["protocol"] == "curve")].set_index("step")
    assert list(curve["n_diverged"]) == [int(not whole) for whole in early]
    assert list(curve["n"]) == [1 + whole for whole in early]


# --- means and intervals -------------------------------------------------------------------------


def test_intervals_are_of_training_seeds_and_sampling_seeds_are_averaged_first(tmp_path):
    made = build(tmp_path, scalings=("none",), seeds=(0, 1, 2))
    values = {("0", 1): 1.0, ("0", 2): 3.0, ("1", 1): 5.0, ("1", 2): 7.0, ("2", 1): 9.0}
    seeds = [final("often", seed=seed) for seed in (1, 2)]
    add(made, seeds, lambda entry, one: values.get((entry["axes"]["seed"], one["cell"]["seed"])))
    found = gather(made)
    (row,) = found.curves[found.curves["protocol"] == "often"].itertuples()
    # The third run lacks a sampling seed. Two numbers, 2 and 6: a sample of two with replacement
    # has the mean 2 or 6 with a quarter's chance each, so these are the percentile interval's ends.
    assert (row.n, row.n_runs, row.n_missing, row.sampling_seeds) == (2, 3, 1, 2)
    assert (row.mean, row.ci_low, row.ci_high) == (4.0, 2.0, 6.0)
    alone = gather(build(tmp_path / "alone", seeds=(0,))).curves
    assert (alone["n"] == 1).all()
    assert alone["ci_low"].isna().all() and alone["ci_high"].isna().all()


def test_unlike_ways_of_measuring_are_never_averaged(tmp_path):
    made = build(tmp_path, scalings=("none",))

    def other(content):
        for identity in content["identity"].values():
            identity["precision"] = "bf16"

    for place in places(made, 1)[1:]:
        edit(place / "digits.json", other)
    found = gather(made)
    curve = found.curves[found.curves["protocol"] == "curve"]
    names = set(curve["metric"])
    assert len(names) == 2 and all(re.fullmatch(FD + "_[0-9a-f]{8}", name) for name in names)
    assert (curve["n"] == 1).all() and (curve["n_otherwise"] == 1).all()
    # The figure shows one of them, at all of its snapshots.
    (setting,) = settings(found.curves, OVER["training"])
    assert list(setting.rows["x"]) == [250, 500, 750, 1000]
    assert setting.rows["metric"].nunique() == 1


def test_numbers_of_arms_stand_beside_their_curves(tables):
    arms = tables.curves.drop_duplicates("arm").set_index("arm")
    assert arms.loc["uvit / cs(0.5) / dsm", "kappa"] == 0.5
    assert arms.loc["uvit / none / dsm", "kappa"] == 1
    assert math.isnan(arms.loc["uvit / ls / dsm", "kappa"])
    assert arms.loc["uvit / ls / stf / target.reference=64", "reference_batch"] == 64
    assert pd.isna(arms.loc["uvit / ls / dsm", "reference_batch"])
    assert set(arms["macs"]) == {3e6, 5e6}
    assert (arms["parameters"] > 0).all()


def test_cells_have_short_words():
    assert sampler_text({"kind": "edm_heun", "steps": 7}) == "edm_heun"
    assert sampler_text({"kind": "edm_heun", "steps": 7, "S_churn": 40}) == "edm_heun(S_churn=40.0)"
    assert sampler_text({"kind": "unknown", "steps": 7, "a": 1}) == "unknown(a=1)"
    assert [labels_text(one) for one in ("data", {"classes": [3, 5]})] == ["data", "classes 3 5"]


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_what_is_missing_has_the_name_that_it_would_have(extractor):
    measured = {
        metric_name(base, extractor, 500).split("_")[0]
        for base in ("fd", "kid", "is", "precision", "recall")
    }
    assert {name for metric in METRICS for name in numbers(metric, extractor)} == measured


# --- axes and figures ----------------------------------------------------------------------------


def test_an_axis_is_drawn_only_where_a_study_has_it(tables, tmp_path):
    assert all(figures.FIGURES[name].applies(tables) for name in OVERS)
    made = build(tmp_path, scalings=("none", "ls"), seeds=(0,))
    content = entries(made)
    for entry in content["runs"]:
        entry["measurements"] = entry["measurements"][:1]
    made.write_text(json.dumps(content))
    plain = gather(made)
    assert not any(figures.FIGURES[name].applies(plain) for name in OVERS)
    out = tmp_path / "figures"
    figures.draw_all(made.parent / "tables", made.parent, out, formats=("svg",))
    drawn = {path.stem for path in out.glob("*.svg")}
    assert "quality_heatmap" in drawn and not drawn & set(OVERS)
    assert "fewer than two values" in picture(plain, "quality_over_training").data
    assert 'id="curves"' not in report(made, made.parent, tmp_path / "report").read_text()


def test_all_else_is_equal_along_an_axis(tables):
    walks = settings(tables.curves, OVER["nfe"])
    assert [one.label for one in walks] == ["steps, weights ema", "steps, weights raw"]
    for one in walks:
        assert set(one.rows["x"]) == {9, 39}
        assert one.rows["weights"].nunique() == 1
    (guided,) = settings(tables.curves, OVER["guidance"])
    assert set(guided.rows["x"]) == {1.0, 1.5, 4.0}  # no guidance is a scale of one
    (training,) = settings(tables.curves, OVER["training"])
    assert (training.protocol, training.metric) == ("curve", FD)
    (kappa,) = settings(tables.curves, OVER["kappa"])
    assert kappa.metric == MAIN  # of all protocols that which speaks for the study
    assert set(kappa.rows["x"]) == {0.5, 0.9, 1.0}
    assert "ls" not in set(kappa.rows["skip_scaling"])
    (reference,) = settings(tables.curves, OVER["reference"])
    assert set(reference.rows["x"]) == {64, 1024}
    assert set(reference.rows["line"]) == {"uvit", "udit"}


def test_arms_of_unlike_batches_are_followed_by_the_images_that_they_saw(tmp_path):
    made = build(tmp_path)

    def double(content):
        content["images_seen"] *= 2

    edit(places(made, 0)[0].parents[1] / "train" / "status.json", double)
    edit(places(made, 1)[0].parents[1] / "train" / "status.json", double)
    (setting,) = settings(gather(made).curves, OVER["training"])
    seen = setting.rows.groupby("skip_scaling")["x"].agg(list).to_dict()
    assert seen == {
        "none": [32_000, 64_000, 96_000, 128_000],
        "cs(0.7)": [16_000, 32_000, 48_000, 64_000],
    }
    assert setting.axis.label == "images seen in training"


def test_the_leading_metric_of_a_protocol_is_drawn(tmp_path):
    made = build(tmp_path, seeds=(0,))
    wide = [
        synthetic.measurement("final" if last else step, step, last, ["wide"], False)
        | {"extractors": {"digits": ["is", "kid"]}, "measurement": f"wide-{step}"}
        for step, last in ((500, False), (1000, True))
    ]
    add(made, wide, lambda entry, one: 4.0)
    found = {one.protocol: one.metric for one in settings(gather(made).curves, OVER["training"])}
    assert found == {"curve": FD, "wide": "kid_digits_1797"}


def test_constant_scalings_of_other_exponents_are_other_lines(tables):
    rows = tables.curves
    levels = rows["skip_scaling"].replace({"cs(0.9)": "cs(0.9, per_level)"})
    (setting,) = settings(rows.assign(skip_scaling=levels), OVER["kappa"])
    series = setting.rows.groupby("series")["skip_scaling"].agg(set).to_dict()
    assert series == {
        "cs()": {"none", "cs(0.5)"},
        "cs(, per_level)": {"none", "cs(0.9, per_level)"},
    }


def test_figures_say_how_it_was_measured_and_what_was_lost(tables):
    drawn = {name: figures.FIGURES[name](tables) for name in OVERS}
    training = drawn["quality_over_training"]
    words = texts(training).replace("\n", " ")
    assert "FD (digits) 500 images (lower is better)" in words
    assert "Protocol curve: FD (digits), 500 images, edm_heun (NFE 19), ema weights." in words
    assert "n = 2 seeds per arm" in words and "4 numbers of runs missing." in words
    assert "diverged" in words
    crosses = [
        line
        for axes in training.axes
        for line in axes.get_lines()
        if line.get_marker() == "X" and len(line.get_xdata())
    ]
    (cross,) = crosses
    lost = tables.runs.loc[tables.runs["status"] == "diverged", "step"].iloc[0]
    assert list(cross.get_xdata()) == [max(s for s in (250, 500, 750) if s <= lost)]
    for figure in drawn.values():
        assert figure.get_label()
    levels = drawn["quality_over_reference"].axes[0].get_lines()
    assert (
        sum(len(set(line.get_ydata())) == 1 and len(line.get_xdata()) == 2 for line in levels) >= 4
    )
    assert "hollow: STF" in "\n".join(
        text.get_text() for text in drawn["quality_over_macs"].legends[0].get_texts()
    )


def test_an_interval_of_one_run_has_no_band(tmp_path):
    few = gather(build(tmp_path, seeds=(0,)))
    axes = figures.quality_over_training(few).axes[0]
    assert all(len(one.get_paths()[0].vertices) == 0 for one in axes.collections if one.get_paths())
    many = gather(build(tmp_path / "many"))
    axes = figures.quality_over_training(many).axes[0]
    assert all(len(one.get_paths()[0].vertices) > 4 for one in axes.collections)


# --- the page ------------------------------------------------------------------------------------


def test_the_page_says_whether_the_order_holds_over_training(tmp_path):
    made = build(tmp_path, scalings=("none", "inv_sqrt2", "ls"))
    levels = {"none": (5.0, 4.0), "inv_sqrt2": (6.0, 3.0), "ls": (7.0, 3.5)}
    content = entries(made)
    for number, entry in enumerate(content["runs"]):
        first, last = levels[entry["axes"]["skip_scaling"]]
        for place, value in zip(places(made, number)[1:], (first, first, first, last), strict=True):
            edit(place / "digits.json", lambda c, value=value: c["metrics"].update({FD: value}))
    gather(made)
    folder = made.parent / "figures"
    figures.draw_all(made.parent / "tables", made.parent, folder, OVERS[:1], ("svg",))
    page = report(made, made.parent, tmp_path / "report").read_text()
    section = page[page.index('<section id="curves">') :]
    assert page.index('<section id="quality">') < page.index('<section id="curves">')
    assert (
        "By mean FD (digits), 500 images (lower is better), the best arm is on U-ViT none with DSM "
        "at step 250, 1/√2 with DSM at step 1\N{NO-BREAK SPACE}000." in section
    )
    assert '<figure id="figure-quality_over_training">' in section


def test_the_page_names_the_best_place_of_an_axis(tmp_path):
    made = build(tmp_path)
    scales = [
        final("guided", guidance={"kind": "edm", "scale": scale, "channels": None})
        for scale in (1.5, 3.0)
    ]
    add(made, scales, lambda entry, one: {1.5: 4.0, 3.0: 2.0}[one["cell"]["guidance"]["scale"]])
    gather(made)
    folder = made.parent / "figures"
    figures.draw_all(
        made.parent / "tables", made.parent, folder, ["quality_over_guidance"], ("svg",)
    )
    page = report(made, made.parent, tmp_path / "report").read_text()
    best = r"U-ViT 2\.00 \[2\.00, 2\.00\] at 3 \((none|CS 0\.7) with DSM, n = 2\)"
    assert re.search(f"best over guidance scale: {best}", page)


@pytest.mark.parametrize("lost", ["diverged", "missing"])
def test_a_backbone_with_costs_and_without_numbers_is_left_out(tmp_path, lost):
    """Costs are probed before training: at first all backbones but one may have no number."""
    runs = [("patch_unet", "none", "dsm", seed) for seed in (0, 1)]
    options = {"backbones": ("uvit", "udit", "patch_unet"), "scalings": ("none",)}
    made = build(tmp_path, **options, **{lost: runs})
    probe_costs(made, {"uvit": 3e6, "udit": 5e6, "patch_unet": 4e6})
    content = entries(made)
    for entry in content["runs"]:  # the curve would hold numbers from before the divergence
        entry["measurements"] = entry["measurements"][:1]
    made.write_text(json.dumps(content))
    found = gather(made)
    (setting,) = settings(found.curves, OVER["macs"])
    assert set(setting.rows["line"]) == {"uvit", "udit"}
    figures.draw_all(made.parent / "tables", made.parent, made.parent / "figures", formats=("svg",))
    page = report(made, made.parent, tmp_path / "report").read_text()
    (best,) = re.findall(r"best over multiply-adds per image: ([^<]*)\.</", page)
    why = r"\(none with DSM, n = 2\)"
    assert re.fullmatch(rf"U-ViT [^;]* at 3M {why}; U-DiT [^;]* at 5M {why}", best)


# --- several data sets ----------------------------------------------------------------------------

BIRDS = {"name": "birds", "source": "folder", "resolution": 32, "color": None}
ALIKE, UNLIKE = 1797, 4000
SETS = ["birds", "digits"]


@pytest.fixture(scope="module", params=[ALIKE, UNLIKE], ids=["alike", "unlike"])
def two(request, tmp_path_factory) -> tuple[Path, Tables]:
    """A study on the digits and on as many, or on more, pictures of birds."""
    made = build(
        tmp_path_factory.mktemp("two"),
        backbones=("uvit", "udit"),
        scalings=("none", "cs(0.5)"),
        targets=("dsm", "stf"),
    )
    synthetic.also_on(made, BIRDS, request.param, note="drawn by hand")
    probe_costs(made, {"uvit": 3e6, "udit": 5e6})
    return made, gather(made)


def test_every_data_set_has_settings_and_a_leading_metric_of_its_own(two):
    _, tables = two
    assert set(tables.runs["line"]) == {f"{a} / {b}" for a in ("uvit", "udit") for b in SETS}
    assert tables.runs["arm"].nunique() == len(tables.runs) / 2
    for name in ("training", "kappa", "macs"):
        found = settings(tables.curves, OVER[name])
        protocol = "curve" if name == "training" else "final"
        assert [one.label for one in found] == [f"{protocol}, data set {name}" for name in SETS]
        for one, dataset in zip(found, SETS, strict=True):
            whole = tables.curves[tables.curves["arm"].isin(one.rows["arm"])]
            assert set(whole["dataset"]) == {dataset}
            assert one.rows["identity"].map(reference(tables)).unique().tolist() == [dataset]
            assert one.rows["metric"].nunique() == 1
            assert set(one.rows["line"]) == {"uvit", "udit"}


def reference(tables: Tables) -> dict[str, str]:
    return tables.identities.set_index("identity")["reference"].to_dict()


def test_pictures_keep_data_sets_apart(two):
    _, tables = two
    costs = figures.quality_over_macs(tables)
    titles = [axes.get_title("left") for axes in costs.axes]
    assert titles == [f"final, data set {one}" for one in SETS]
    for axes in [*costs.axes, *figures.cost(tables).axes]:
        values = np.concatenate([line.get_ydata() for line in axes.get_lines()])
        assert max(values) < 4 * min(values)  # those of birds are ten times those of digits
    kappa = figures.quality_over_kappa(tables)
    assert len(kappa.axes) == 4
    words = texts(kappa).replace("\n", " ")
    assert "final, data set birds FD" in words and "final, data set digits FD" in words
    heat = figures.quality_heatmap(tables)
    words = texts(heat)
    titles = [re.split(r"[:\n]", axes.get_title("left")) for axes in heat.axes]
    assert [(one[0], one[-1]) for one in titles] == [
        *(("birds", "DSM"), ("STF", "STF")),
        *(("digits", "DSM"), ("STF", "STF")),
    ]
    assert "measured otherwise" not in words.replace("\n", " ") and "not measured" not in words
    assert "birds: drawn by hand" in words.replace("\n", " ")
    shown = texts(figures.comparisons(tables))
    assert all(f"{one} / {name}" in shown for one in ("U-ViT", "U-DiT") for name in SETS)


def test_sentences_rank_within_a_data_set_and_say_which(two, tmp_path):
    made, tables = two
    study = Study(entries(made), tables)
    best = answers.best(study)
    names = [f"{one} / {name}" for name in SETS for one in ("U-ViT", "U-DiT")]
    assert [row["backbone"] for row in best] == names
    assert not any(row["way"] for row in best)
    means = [float(row["mean"]) for row in best]
    assert min(means[:2]) > max(means[2:])
    assert answers.tests(study)["arms"] == 2 * 2 * 3
    unseen = answers.doubts(study)["detectable"]
    assert re.fullmatch(r"[\d.]+ on birds and [\d.]+ on digits", unseen)
    for name in ("training", "kappa", "macs"):
        said = curves.blocks(study)[f"quality_over_{name}"]["sentences"]
        assert len(said) == 2
        assert ["data set birds" in one for one in said] == [True, False]
        assert ["data set digits" in one for one in said] == [False, True]
    means = [(about, found) for about, found in stable_quality(tables) if about["data set"]]
    means = [(about, found) for about, found in means if about["backbone"] == "all backbones"]
    assert [about["data set"] for about, _ in means] == SETS
    assert abs(means[0][1].evidence.mean) > 3 * abs(means[1][1].evidence.mean)
    page = report(made, made.parent, tmp_path / "report").read_text()
    assert re.search(r"could be tested on FD [^:]* on birds and FD [^:]* on digits:", page)
    assert "birds: drawn by hand" in page
    assert page.count("<td>U-ViT / birds</td>") >= 3


def test_a_data_set_without_numbers_takes_none_from_another(tmp_path):
    made = build(tmp_path, backbones=("uvit", "udit"))
    synthetic.also_on(made, BIRDS, UNLIKE, without=("uvit", "udit"))
    tables = gather(made)
    assert [one.label for one in settings(tables.curves, OVER["training"])] == [
        "curve, data set digits"
    ]
    words = texts(figures.quality_heatmap(tables))
    assert "birds: nothing measured" in words and words.count("missing") >= 4
    figures.draw_all(made.parent / "tables", made.parent, made.parent / "figures", formats=("svg",))
    page = report(made, made.parent, tmp_path / "report").read_text()
    assert "(curve, data set digits, lower is better)" in page
    assert "U-ViT / birds" in page


def test_lines_that_were_measured_in_another_way_are_not_ranked_together(tmp_path):
    made = build(tmp_path, backbones=("uvit", "udit", "patch_unet", "ddpmpp"))
    macs = {"uvit": 3e6, "udit": 5e6, "patch_unet": 4e6, "ddpmpp": 6e6}
    probe_costs(made, macs)

    def other(content):
        for identity in content["identity"].values():
            identity["precision"] = "bf16"

    for entry in entries(made)["runs"]:
        if entry["axes"]["backbone"] in ("uvit", "ddpmpp"):
            folder = made.parent / "runs" / entry["run"] / "measurements"
            for path in folder.glob("*/digits.json"):
                edit(path, other)
    tables = gather(made)
    for name, protocol in (("macs", "final"), ("kappa", "final"), ("training", "curve")):
        found = settings(tables.curves, OVER[name])
        assert all(one.rows["metric"].nunique() == 1 for one in found)
        assert {frozenset(one.rows["line"]) for one in found} == {
            frozenset({"uvit", "ddpmpp"}),
            frozenset({"udit", "patch_unet"}),
        }
        assert all(re.fullmatch(rf"{protocol}, identity [0-9a-f]{{8}}", one.label) for one in found)
    assert len(figures.quality_over_macs(tables).axes) == 2


# --- samples that were dropped --------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_gives_its_samples_back(channels):
    images = np.random.default_rng(0).integers(0, 256, (23, 8, 8, channels)).astype(np.uint8)
    found = untile(tile(images))
    factor = found.shape[1] // 8
    assert found.shape == (30, 8 * factor, 8 * factor, channels)
    assert (found[:23, ::factor, ::factor] == images).all()
    assert (found[23:] == 255).all()
    with pytest.raises(ValueError, match="no 10 columns"):
        untile(Image.new("L", (480, 480)))


def test_samples_that_were_dropped_are_shown_from_their_grid(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=images, arr_1=np.zeros(12))
    (tmp_path / "generate.json").write_text('{"images": 12, "seed": 0}')
    tile(images).save(tmp_path / "grid.png")
    kept = _first_samples(tmp_path)
    (tmp_path / "samples.npz").unlink()
    shown = _first_samples(tmp_path)
    factor = shown.shape[1] // 8
    assert (shown[:, ::factor, ::factor] == kept[:9]).all()
    (tmp_path / "grid.png").unlink()
    assert len(_first_samples(tmp_path)) == 0


def test_an_arm_without_a_second_value_is_not_on_an_axis_of_arms(tables):
    kappa = OVER["kappa"]
    targets = {target for one in settings(tables.curves, kappa) for target in one.rows["target"]}
    assert len(targets) == 2
    stable = tables.curves["target"] != "dsm"
    scaled = tables.curves["skip_scaling"].str.startswith("cs")
    alone = tables.curves[~(stable & scaled)]  # the stable target at kappa 1 only
    assert {target for one in settings(alone, kappa) for target in one.rows["target"]} == {"dsm"}
