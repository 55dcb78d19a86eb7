"""Measures of stability, their comparison between arms, and what the report says about them."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic
from markupsafe import escape
from matplotlib.text import Text
from miniature import base
from scipy import stats

from study.analysis import figures, statistics
from study.analysis.names import ALL
from study.analysis.report.page import report
from study.analysis.tables import stability
from study.analysis.tables.aggregate import aggregate
from study.analysis.tables.measures import (
    EVERY_RATE,
    MEASURES,
    NO_RATE,
    SPLITS,
    largest_rate,
    measure_rows,
)
from study.analysis.tables.read import Tables
from study.analysis.verdicts.base import averaged, final_levels
from study.analysis.verdicts.scalelong import (
    _judge,
    factor_table,
    findings_table,
    scalelong_findings,
)
from study.analysis.verdicts.stability import _cells, _matrix_cell, arm_words, stability_answer
from study.analysis.verdicts.stf import label_bias
from study.data.convert import convert
from study.probes.base import probe

ROOT = Path(__file__).parents[1]
GRID = {"backbones": ("uvit", "udit"), "scalings": ("none", "inv_sqrt2", "cs(0.7)")}
SEEDS = (0, 1, 2)
RATES = (1e-3, 4e-3, 1.6e-2)
DIVERGED = (("udit", "none", "dsm", 1),)
MISSING = (("udit", "cs(0.7)", "dsm", 2),)
# What the made-up probes say: gains of every scaling, and how many of the rates train.
GAIN = {"none": 4.0, "inv_sqrt2": 3.0, "cs(0.7)": 2.0}
TRAINED = {"none": 1, "inv_sqrt2": 2, "cs(0.7)": 3}


def probe_tables(folder: Path, scaling: str, seed: int, diverged: bool) -> None:
    """What the probes of one run leave: gains at two sizes and sigmas, and rates that train."""
    (folder / "probes").mkdir(exist_ok=True)
    spread = 1 + 0.01 * seed * GAIN[scaling]
    gains = pd.DataFrame(
        [
            # Twice and half: the geometric mean over sigma is the scaling's own gain.
            (
                sigma,
                relative,
                space,
                GAIN[scaling] * spread * ratio * (10 if relative > 0.05 else 1),
            )
            for sigma, ratio in ((0.1, 2.0), (1.0, 0.5))
            for relative in (0.01, 0.1)
            for space in ("noise", "network")
        ],
        columns=["sigma", "relative", "space", "gain"],
    )
    (gains.iloc[:0] if diverged else gains).to_parquet(folder / "probes" / "robustness.parquet")
    outcomes = ["trained"] * TRAINED[scaling] + ["stalled", "diverged", "trained"]
    rates = pd.DataFrame({"lr": RATES, "outcome": outcomes[: len(RATES)], "steps": 50})
    rates.to_parquet(folder / "probes" / "stability_frontier.parquet")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Three seeds of a small grid with probes; one run diverged, one is missing."""
    root = tmp_path_factory.mktemp("stability")
    manifest = synthetic.build(
        root, **GRID, seeds=SEEDS, diverged=DIVERGED, missing=MISSING, logged=60, images=4
    )
    content = json.loads(manifest.read_text())
    content["config"]["probes"] = [{"kind": "robustness"}, {"kind": "stability_frontier"}]
    for entry in content["runs"]:
        axes = entry["axes"]
        key = (axes["backbone"], axes["skip_scaling"], axes["target"], int(axes["seed"]))
        folder = manifest.parent / "runs" / entry["run"]
        if key not in MISSING:
            probe_tables(folder, key[1], key[3], key in DIVERGED)
    manifest.write_text(json.dumps(content))
    aggregate(manifest, manifest.parent, manifest.parent / "tables")
    return manifest


@pytest.fixture(scope="module")
def tables(tree) -> Tables:
    return Tables.read(tree.parent / "tables", tree.parent)


def row_of(tables: Tables, measure: str, arm: str, against: str = "none") -> pd.Series:
    rows = tables.stability
    rows = rows[(rows["measure"] == measure) & (rows["arm"] == arm) & (rows["against"] == against)]
    assert len(rows) == 1
    return rows.iloc[0]


def made_up(
    values: dict[str, list],
    measure: str = "feature_norm",
    notes: dict[tuple[str, int], str] | None = None,
    spacings: dict[str, float] | None = None,
) -> list[dict]:
    """Rows of ``stability.csv`` for scalings of one backbone, a value per seed.

    ``notes`` by scaling and seed; None without a note: diverged. ``spacings`` by scaling.
    """
    better = MEASURES[measure].better
    rows, seeds, specs = [], {}, {}
    for scaling, numbers in values.items():
        specs[scaling] = {
            "backbone": "uvit",
            "skip_scaling": {"method": scaling},
            "target": {"kind": "dsm"},
        }
        for seed, value in enumerate(numbers):
            run = f"{scaling}-s{seed}"
            seeds[run] = str(seed)
            note = (notes or {}).get((scaling, seed), "")
            status = "diverged" if value is None and not note else "done"
            rows.append(
                {"run": run, "arm": scaling, "line": "uvit", "status": status, "better": better}
                | {"measure": measure, "value": value, "note": note}
                | {"spacing": (spacings or {}).get(scaling)}
            )
    return stability.stability_rows(rows, specs, seeds)


def compared(*arguments, **options) -> dict:
    """The one compared row of :func:`made_up`."""
    (row,) = [row for row in made_up(*arguments, **options) if row["against"]]
    return row


# --- statistics, by hand --------------------------------------------------------------------------


def test_a_paired_t_test_by_hand():
    # Differences 1, 2, 3: mean 2, s = 1, t = 2 sqrt(3); with 2 degrees of freedom
    # P(T > t) = 1/2 - t / (2 sqrt(2 + t^2)).
    t = 2 * math.sqrt(3)
    result = statistics.paired([1.0, 2.0, 3.0])
    assert result.mean == 2
    assert result.p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert result.high - result.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_factors_are_exponents_of_log_ratios():
    result = statistics.paired_factor(np.log([2.0, 8.0]))
    assert result.mean == pytest.approx(4)
    # Logs ln 2 and ln 8: s / sqrt(2) = ln 2, and t* = 12.7062 with one degree of freedom.
    assert result.high / result.mean == pytest.approx(2**12.7062, rel=1e-4)
    assert result.low * result.high == pytest.approx(16)
    assert result.p == pytest.approx(stats.ttest_1samp(np.log([2.0, 8.0]), 0).pvalue)


def test_equal_factors_have_no_test_whatever_their_rounding():
    result = statistics.paired_factor([math.log(0.2 / 0.1), math.log(0.6 / 0.3), math.log(4 / 2)])
    assert result.mean == pytest.approx(2)
    assert math.isnan(result.p)
    assert "no spread" in result.note


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_detectable_difference_is_found_four_times_in_five(n):
    # True spread 1: the mean over many studies is drawn in standard errors, the spread with it.
    rng = np.random.default_rng(0)
    seen = statistics.paired(np.arange(n, dtype=float))
    error = np.arange(n).std(ddof=1) / math.sqrt(n)
    noncentrality = seen.detectable / error
    t = (rng.normal(size=400_000) + noncentrality) / np.sqrt(
        rng.chisquare(n - 1, size=400_000) / (n - 1)
    )
    assert (np.abs(t) > stats.t.ppf(0.975, n - 1)).mean() == pytest.approx(0.8, abs=0.004)


def test_fishers_exact_test_by_hand():
    # 3 of 3 against 0 of 3: both extreme tables of C(6, 3) = 20. 2 of 3 against 0 of 3: the totals
    # are 2 of 6; P(0) = P(2) = 3/15, so p = 6/15.
    assert statistics.fisher(3, 3, 0, 3) == pytest.approx(2 / 20)
    assert statistics.fisher(2, 3, 0, 3) == pytest.approx(6 / 15)
    assert statistics.fisher(0, 4, 4, 4) == pytest.approx(2 / 70)
    assert (statistics.least_count(3, 3), statistics.least_count(4, 4)) == (None, 4)


def test_geometric_means_and_their_intervals():
    assert statistics.geometric_mean([1.0, 4.0, 16.0]) == pytest.approx(4)
    # Logs 0, ln 4, 2 ln 4: s = ln 4 and t* = 4.302653 with two degrees of freedom.
    low, high = statistics.geometric_interval([1.0, 4.0, 16.0])
    assert high / 4 == pytest.approx(4 ** (4.302653 / math.sqrt(3)), rel=1e-6)
    assert low * high == pytest.approx(16)
    assert math.isnan(statistics.geometric_interval([2.0])[0])
    assert math.isnan(statistics.geometric_mean([]))


def test_the_sign_test_is_binomial():
    assert statistics.sign_test(6, 0) == pytest.approx(2 / 64)
    assert statistics.sign_test(1, 5) == pytest.approx(2 * 7 / 64)
    assert statistics.sign_test(3, 3) == 1
    assert statistics.least_pairs() == 6
    assert math.isnan(statistics.sign_test(0, 0))


# --- one number per run ---------------------------------------------------------------------------


def test_every_run_has_a_row_for_every_measure(tables):
    rows = tables.measures
    assert set(rows["measure"]) == set(MEASURES)
    assert (rows.groupby("measure")["run"].nunique() == len(tables.runs)).all()
    lost = rows[rows["status"] == "diverged"].set_index("measure")
    assert len(lost) == len(MEASURES)
    assert lost["value"].drop(["diverged", "largest_learning_rate"]).isna().all()
    assert lost.loc["diverged", "value"] == 1
    # Short trainings at other rates do not need the long one.
    assert lost.loc["largest_learning_rate", "value"] == RATES[0]
    assert re.fullmatch(r"training diverged at step \d+", lost.loc["feature_norm", "note"])
    absent = rows[rows["status"] == "missing"]
    assert len(absent) == len(MEASURES)
    assert absent["value"].isna().all()


def test_curves_give_level_and_oscillation_of_the_runs_that_ended(tables):
    rows = tables.measures[tables.measures["measure"] == "oscillation_loss"].set_index("run")
    own = tables.oscillation[tables.oscillation["quantity"] == "loss"].set_index("run")
    done = rows[rows["status"] == "done"]
    assert (done["value"] == own.loc[done.index, "oscillation"]).all()


def test_gains_are_taken_at_the_smallest_perturbation(tables):
    for measure in ("robustness_gain", "network_gain"):
        rows = tables.measures[tables.measures["measure"] == measure]
        first = rows[(rows["seed"] == "0") & rows["value"].notna()]
        scaling = tables.runs.set_index("run")["skip_scaling"]
        expected = [GAIN[scaling[run]] for run in first["run"]]
        assert first["value"].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("outcomes", "rate", "words"),
    [
        (["trained", "trained", "diverged"], 4e-3, ""),
        (["trained", "stalled", "trained"], 1e-3, ""),
        (["stalled", "trained", "diverged"], 4e-3, ""),
        (["stalled", "stalled", "trained"], 1.6e-2, "the limit may be higher"),
        (["stalled", "diverged", "trained"], None, "trained at no rate tried"),
        (["stalled", "stalled", "stalled"], None, "trained at no rate tried"),
        (["trained", "trained", "trained"], 1.6e-2, "the limit may be higher"),
        (["diverged", "trained", "trained"], None, "trained at no rate tried, from 0.001 on"),
    ],
)
def test_the_largest_rate_ends_the_first_stretch_that_trained(outcomes, rate, words):
    frame = pd.DataFrame({"lr": RATES, "outcome": outcomes}).iloc[::-1]
    found, note = largest_rate(frame)
    assert found == rate
    assert words in note


def test_measures_that_nothing_stands_behind_are_absent(tmp_path):
    manifest = synthetic.build(tmp_path, **GRID, seeds=(0,), diverged=(), missing=(), logged=60)
    aggregate(manifest, manifest.parent, tmp_path / "tables")
    found = Tables.read(tmp_path / "tables")
    assert set(found.measures["measure"]) == set(MEASURES) - {
        *("robustness_gain", "network_gain", "largest_learning_rate")
    }


def test_imported_weights_did_not_diverge_here():
    runs = [{"run": name, "status": "done", "step": 1} for name in ("a", "b")]
    rows = measure_rows(runs, [], {}, imported={"a"})
    assert [(row["run"], row["value"]) for row in rows] == [("a", None), ("b", 0.0)]
    assert "imported" in rows[0]["note"]


# --- arms against arms ----------------------------------------------------------------------------


def test_scaled_arms_are_compared_with_the_unscaled_arm_of_their_target(tables):
    row = row_of(tables, "robustness_gain", "uvit / cs(0.7) / stf")
    assert row["baseline"] == "uvit / none / stf"
    ratios = [(2 * (1 + 0.02 * s)) / (4 * (1 + 0.04 * s)) for s in SEEDS]
    logs = np.log(ratios)
    assert row["factor"] == pytest.approx(np.exp(logs.mean()))
    half = 4.302653 * logs.std(ddof=1) / math.sqrt(3)
    assert row["factor_low"] == pytest.approx(np.exp(logs.mean() - half), rel=1e-6)
    assert row["p_value"] == pytest.approx(stats.ttest_1samp(logs, 0).pvalue)
    assert row["mean"] == pytest.approx(stats.gmean([2 * (1 + 0.02 * s) for s in SEEDS]))
    assert (row["n"], row["n_pairs"], row["verdict"]) == (3, 3, "more stable")
    assert row["detectable_factor"] > 1


def test_stable_targets_are_compared_with_dsm_at_the_same_scaling(tables):
    row = row_of(tables, "feature_norm", "uvit / cs(0.7) / stf", "dsm")
    assert row["baseline"] == "uvit / cs(0.7) / dsm"
    assert row_of(tables, "feature_norm", "uvit / none / stf", "dsm")["n_pairs"] == 3
    plain = tables.stability[tables.stability["arm"] == "uvit / none / dsm"]
    assert set(plain["against"]) == {""}
    assert plain["verdict"].eq("").all()


def test_losses_against_unlike_targets_are_not_compared(tables):
    rows = tables.stability[tables.stability["measure"] == "oscillation_loss"]
    assert "dsm" not in set(rows["against"])
    assert row_of(tables, "oscillation_loss", "uvit / cs(0.7) / stf")["n_pairs"] == 3


def test_holm_spans_one_measure_on_one_backbone_and_one_question(tables):
    rows = tables.stability[tables.stability["p_value"].notna()]
    for _, family in rows.groupby(["measure", "line", "against"]):
        assert family["p_holm"].tolist() == pytest.approx(statistics.holm(family["p_value"]))
        assert (family["tests_in_family"] == len(family)).all()
    judged = rows["verdict"].isin(["more stable", "less stable"])
    assert (judged == (rows["p_holm"] < 0.05)).all()


def test_diverged_and_missing_runs_leave_their_pairs_out(tables):
    row = row_of(tables, "feature_norm", "udit / inv_sqrt2 / dsm")
    assert (row["n"], row["n_pairs"], row["n_diverged_pairs"]) == (3, 2, 1)
    assert "1 pair left out: diverged" in row["note"]
    half = row_of(tables, "feature_norm", "udit / cs(0.7) / dsm")
    assert (half["n"], half["n_missing"], half["n_pairs"]) == (2, 1, 1)
    assert half["verdict"] == "no test"
    assert "one pair: no test is possible" in half["note"]
    assert half["factor"] > 0
    plain = row_of(tables, "feature_norm", "udit / none / dsm", "")
    assert (plain["n"], plain["n_diverged"], plain["n_missing"]) == (2, 1, 0)


def test_diverged_runs_are_counted_and_judged_exactly(tables):
    row = row_of(tables, "diverged", "udit / inv_sqrt2 / dsm")
    assert (row["n"], row["mean"], row["n_diverged"]) == (3, 0, 0)
    assert row["p_value"] == pytest.approx(1)  # 0 of 3 against 1 of 3
    assert (row["test"], row["verdict"]) == ("Fisher's exact test", "no difference shown")
    assert "0 of 3 against 1 of 3" in row["note"]
    assert "so few runs could show no difference" in row["note"]
    calm = row_of(tables, "diverged", "uvit / inv_sqrt2 / dsm")
    assert (calm["verdict"], math.isnan(calm["p_value"])) == ("no test", True)


def test_a_scaling_that_saves_every_run_is_more_stable():
    rows = made_up({"none": [1.0] * 4, "cs": [0.0] * 4}, "diverged")
    (row,) = [row for row in rows if row["against"] == "none"]
    assert row["p_value"] == pytest.approx(2 / 70)
    assert row["verdict"] == "more stable"


def test_sides_of_a_measure_decide_the_verdict():
    low, high = [1.0, 1.1, 0.9] * 2, [2.0, 2.1, 1.9] * 2
    for measure, word in (("feature_norm", "less"), ("largest_learning_rate", "more")):
        row = compared({"none": low, "cs": high}, measure)
        assert row["factor"] == pytest.approx(2, rel=0.03)
        assert row["verdict"] == f"{word} stable"


RATE = "largest_learning_rate"


def test_rates_on_a_grid_are_judged_by_signs_alone():
    # Uneven grid steps: by a t-test of logs p = 0.003 from three pairs.
    row = compared({"none": [0.1, 0.1, 0.1], "cs": [0.3, 0.3, 1 / 3]}, RATE)
    assert (row["verdict"], row["test"], row["factor_low"]) == ("no test", "", None)
    assert row["factor"] == pytest.approx((0.3 * 0.3 / 3) ** (1 / 3) / 0.1)
    assert "larger in 3, smaller in 0, equal in 0" in row["note"]
    assert "p < 0.05 needs 6 unequal pairs that agree" in row["note"]
    rates = [0.1, 0.3, 0.1, 0.1, 0.3, 0.1, 0.1]
    row = compared({"none": rates, "cs": [3 * rate for rate in rates[:6]] + [0.1]}, RATE)
    assert row["p_value"] == pytest.approx(2 / 64)  # the tie is left out
    assert (row["test"], row["verdict"]) == ("sign test", "more stable")


def test_a_sign_test_follows_the_pairs_and_not_their_mean():
    row = compared({"none": [1.0] * 8, "cs": [0.5] + [1.01] * 7}, RATE)
    assert row["factor"] < 1
    assert row["p_value"] == pytest.approx(2 * 9 / 256)
    row = compared({"none": [1.0] * 9, "cs": [0.1] + [1.01] * 8}, RATE)
    assert (row["factor"] < 1, row["verdict"]) == (True, "more stable")


def test_pairs_that_are_left_out_are_counted_with_their_reason():
    none = {("cs", 0): "trained at no rate tried, from 1 on", ("none", 1): "x is no number"}
    row = compared({"none": [1.0, None, 1.0, 1.0], "cs": [None, 2.0, 2.0, None]}, RATE, notes=none)
    assert (row["n_pairs"], row["n_diverged_pairs"]) == (1, 1)
    for words in ("diverged", "trained at no rate tried, from 1 on", "x is no number"):
        assert f"1 pair left out: {words}" in row["note"]


def test_gains_that_are_not_finite_and_runs_that_train_at_no_rate_are_counted():
    runs = [
        {"run": name, "arm": name[0], "line": "uvit", "status": status, "step": 9}
        for name, status in (("n0", "done"), ("n1", "done"), ("c0", "done"), ("c1", "diverged"))
    ]
    gains = pd.DataFrame({"run": ["n0", "n1", "c0"], "gain": [1.0, 2.0, math.inf]})
    rates = pd.DataFrame({"run": [row["run"] for row in runs], "lr": 0.1})
    rates["outcome"] = ["trained", "trained", "trained", "diverged"]
    probes = {
        "robustness": gains.assign(space="noise", relative=0.1),
        "stability_frontier": rates,
    }
    measures = measure_rows(runs, [], probes)
    specs = {
        arm: {"skip_scaling": {"method": method}, "target": {"kind": "dsm"}}
        for arm, method in (("n", "none"), ("c", "cs"))
    }
    rows = stability.stability_rows(measures, specs, {row["run"]: row["run"][1] for row in runs})
    notes = {row["measure"]: row["note"] for row in rows if row["against"]}
    assert "1 pair left out: a gain is not a positive number" in notes["robustness_gain"]
    assert "1 pair left out: diverged" in notes["robustness_gain"]
    # Its rate is below all that were tried: left out, its arm would look better than it is.
    row = next(row for row in rows if row["measure"] == RATE and row["against"])
    assert (row["n"], row["n_pairs"]) == (2, 2)
    assert "larger in 0, smaller in 1, equal in 1" in notes[RATE]
    assert "trained at no rate tried: 1 of 2 runs of this arm and 0 of 2" in notes[RATE]
    assert notes[RATE].endswith("the factor is no bound")  # others trained at all rates


@pytest.mark.parametrize(
    ("sides", "words"),
    [
        (["cs"], "1 of 2 runs of this arm and 0 of 2 of the other, so the factor is a lower bound"),
        (["none"], "0 of 2 runs of this arm and 1 of 2 of the other, so the factor is an upper"),
        (["cs", "none"], "1 of 2 runs of this arm and 1 of 2 of the other, so the factor is no "),
    ],
)
def test_rates_beyond_those_tried_are_noted_on_both_sides(sides, words):
    notes = {(side, 0): EVERY_RATE for side in sides}
    assert words in compared({"none": [1.0, 1.0], "cs": [3.0, 1.0]}, RATE, notes=notes)["note"]


def test_ends_of_the_rates_on_both_sides_leave_no_bound():
    notes = {("cs", 0): EVERY_RATE, ("cs", 1): f"{NO_RATE}, from 1 on"}
    told = compared({"none": [1.0, 1.0], "cs": [3.0, 0.5]}, RATE, notes=notes)["note"]
    assert told.count("the factor is") == 1
    assert told.endswith("the factor is no bound")
    notes = {("none", 1): f"{NO_RATE}, from 1 on", ("cs", 0): EVERY_RATE}
    told = compared({"none": [1.0, 0.5], "cs": [3.0, 1.0]}, RATE, notes=notes)["note"]
    assert told.endswith("the factor is a lower bound")


def test_oscillations_logged_at_unlike_steps_are_not_compared():
    values = {"none": [1.0, 2.0], "cs": [2.0, 3.0]}
    row = compared(values, "oscillation_loss", spacings={"none": 1.0, "cs": 10.0})
    assert row["n_pairs"] == 0
    assert row["note"] == "2 pairs left out: curves logged at unlike steps"
    # A point that was lost changes the mean step a little.
    row = compared(values, "oscillation_loss", spacings={"none": 1.0, "cs": 1.01})
    assert row["n_pairs"] == 2


# --- all backbones together -----------------------------------------------------------------------


def pair_table(factors: dict[str, list[float | None]]) -> pd.DataFrame:
    """Pairs of one scaling by backbone, a factor per seed; None: the pair was lost."""
    rows = [
        {
            "measure": "feature_norm",
            "against": "none",
            "skip_scaling": "cs",
            "target": "dsm",
            "formulation": "edm",
            "variant": "",
            "baseline": name,
            "seeds": str(seed),
            "factor": factor,
        }
        for name, numbers in factors.items()
        for seed, factor in enumerate(numbers)
    ]
    return pd.DataFrame(rows)


def test_a_seed_gives_one_mean_over_the_backbones():
    found = stability.overall(pair_table({"a": [0.5, 0.4, 0.6], "b": [0.8, 0.9, 0.7]})).iloc[0]
    logs = np.log(np.sqrt([0.5 * 0.8, 0.4 * 0.9, 0.6 * 0.7]))
    assert found["factor"] == pytest.approx(np.exp(logs.mean()))
    assert found["p_value"] == pytest.approx(stats.ttest_1samp(logs, 0).pvalue)
    assert (found["n_backbones"], found["n_pairs"], found["verdict"]) == (2, 3, "more stable")
    assert found["line"] == ALL


def test_no_backbone_drops_out_of_the_mean_in_some_seeds():
    found = stability.overall(pair_table({"a": [0.5, 0.4, 0.6], "b": [0.8, None, 0.7]})).iloc[0]
    logs = np.log(np.sqrt([0.5 * 0.8, 0.6 * 0.7]))
    assert found["factor"] == pytest.approx(np.exp(logs.mean()))
    assert (found["n_backbones"], found["n_pairs"]) == (2, 2)
    assert found["note"] == "1 seed left out: a pair was lost"
    # A backbone that lost every pair forbids the mean: without it, it would look better.
    lost = stability.overall(pair_table({"a": [0.5, 0.4, 0.6], "b": [None] * 3})).iloc[0]
    assert (lost["n_pairs"], lost["verdict"]) == (0, "no test")
    assert math.isnan(lost["factor"])


def test_pairs_of_runs_are_averaged_like_measures():
    rows = [("a", 0, 1.0), ("a", 1, 3.0), ("b", 0, 5.0), ("b", 1, np.nan), ("b", 2, 7.0)]
    both = pd.DataFrame(rows, columns=["line", "data_seed", "difference"])
    both = both.assign(init_seed=both["data_seed"], noise_seed=both["data_seed"])
    assert averaged(both, "difference").tolist() == [3.0]
    assert averaged(both[both["line"] == "a"], "difference").empty


def test_arms_that_differ_in_more_than_their_scaling_have_means_of_their_own():
    sizes = [
        pair_table({"a": [a, 0.4], "b": [0.8, 0.7]}).assign(target="stf", variant=variant)
        for a, variant in ((0.5, "target.reference=64"), (0.3, "target.reference=512"))
    ]
    found = stability.overall(pd.concat(sizes))
    assert found["setting"].tolist() == ["target.reference=64", "target.reference=512"]
    assert found["n_pairs"].tolist() == [2, 2]
    words = [arm_words(row, True) for _, row in found.iterrows()]
    assert words[0] == "CS, STF (target.reference=64)"


def test_a_backbone_that_lost_every_pair_leaves_no_mean():
    rows = [("a", 0, 1.0), ("b", 0, 5.0)]
    both = pd.DataFrame(rows, columns=["line", "data_seed", "difference"])
    both = both.assign(init_seed=0, noise_seed=0)
    assert averaged(both, "difference", ["a", "b"]).tolist() == [3.0]
    assert averaged(both, "difference", ["a", "b", "lost"]).empty


def test_one_backbone_has_no_mean_over_backbones():
    assert stability.overall(pair_table({"a": [0.5, 0.4, 0.6]})).empty
    assert stability.overall(pair_table({"a": [0.5]}).iloc[:0]).empty


def test_every_pair_behind_a_factor_is_in_the_table(tables):
    rows = tables.stability_pairs
    row = row_of(tables, "robustness_gain", "uvit / cs(0.7) / stf")
    own = rows[(rows["arm"] == row["arm"]) & (rows["measure"] == row["measure"])]
    own = own[own["against"] == "none"]
    assert stats.gmean(own["factor"]) == pytest.approx(row["factor"])
    values = tables.measures[tables.measures["measure"] == row["measure"]]
    values = values.set_index("run")["value"]
    ratios = values[own["run"]].to_numpy() / values[own["baseline_run"]].to_numpy()
    assert own["factor"].tolist() == pytest.approx(ratios.tolist())
    lost = rows[rows["factor"].isna() & (rows["measure"] == "feature_norm")]
    assert set(lost["note"]) == {"diverged", "missing"}
    # A part of the study has the means of its own backbones only.
    assert not stability.overall(rows).empty
    assert stability.overall(tables.only(family="uvit").stability_pairs).empty


def test_one_seed_gives_a_factor_and_no_test():
    row = compared({"none": [4.0], "cs": [1.0]})
    assert row["factor"] == 0.25
    assert (row["verdict"], row["tests_in_family"]) == ("no test", 0)
    assert math.isnan(row["p_value"])


def test_arms_without_an_unscaled_arm_say_so():
    (row,) = made_up({"cs": [1.0, 2.0]})
    assert (row["against"], row["n"]) == ("", 2)
    assert row["note"] == "no unscaled arm to compare with"


# --- words and pictures ---------------------------------------------------------------------------


def test_the_answer_counts_what_was_shown(tables):
    answer = stability_answer(tables)
    shown = tables.stability[
        (tables.stability["against"] == "none") & (tables.stability["verdict"] == "more stable")
    ]
    cells = shown.drop_duplicates(["line", "measure"])
    cells = cells[cells["measure"] != "diverged"]
    assert answer.summary[0].startswith("On average over 2 backbones (geometric mean in each of ")
    assert answer.summary[1].startswith(f"Backbone by backbone: in {len(cells)} of ")
    assert any("is not tested: a sign test needs 6 unequal pairs" in x for x in answer.summary)
    assert "nan" not in " ".join([*answer.summary, *dict(answer.backbones).values()])
    assert any("none 1 of 12, 1/√2 0 of 12, CS 0.7 0 of 11" in line for line in answer.summary)
    targets = tables.stability[tables.stability["against"] == "dsm"]
    tests = int((targets["p_value"].notna() & targets["factor"].notna()).sum())
    assert any(
        line.startswith(f"STF against DSM at the same backbone and scaling: of {tests} tests")
        for line in answer.summary
    )
    uvit = dict(answer.backbones)["U-ViT"]
    assert "sensitivity of the noise prediction most stable with CS 0.7" in uvit.lower().replace(
        "cs 0.7", "CS 0.7"
    )
    words = {finding.claim: finding.word for finding in answer.findings}
    gain = "scaled long skips make the noise prediction less sensitive to its input"
    assert words[gain] == "reproduced"
    assert words["training is about 1.5 times faster"] == "not testable at this budget"


def judged(every: bool = False, **arms: list[tuple[float, float]]) -> tuple[str, str, str]:
    """The word of a claim from (p, side) of the arms of every backbone."""
    rows = [
        {"line": line, "p_value": p, "side": side, "detectable": math.nan}
        for line, tests in arms.items()
        for p, side in tests
    ]
    return _judge(pd.DataFrame(rows), averages(), every)


def averages(*tests: tuple[float, float]) -> pd.DataFrame:
    """Tests over all backbones, from (p, side) of every scaling."""
    rows = [("cs(0.7)", 2, p, side, math.exp(side), 0.1, 9.0) for p, side in tests]
    words = ["skip_scaling", "n_backbones", "p_value", "side"]
    words += ["factor", "factor_low", "factor_high"]
    return pd.DataFrame(rows, columns=words)


YES, NO, SAME, NONE = (1e-4, -1.0), (1e-4, 1.0), (0.5, -1.0), (math.nan, -1.0)


@pytest.mark.parametrize(
    ("arms", "word"),
    [
        ({"uvit": [YES, SAME], "udit": [SAME]}, "reproduced"),
        ({"uvit": [YES], "udit": [SAME], "ddpmpp": [SAME]}, "not testable at this budget"),
        ({"uvit": [YES], "udit": [SAME], "ddpmpp": [NONE]}, "reproduced"),
        ({"uvit": [YES], "udit": [NO]}, "not testable at this budget"),
        ({"uvit": [YES, NO], "udit": [NO]}, "not reproduced"),
        ({"uvit": [NO], "udit": [SAME]}, "not reproduced"),
        ({"uvit": [SAME], "udit": [NONE]}, "not testable at this budget"),
        ({"uvit": [NONE]}, "not testable at this budget"),
    ],
)
def test_without_a_mean_a_claim_needs_half_of_the_backbones(arms, word):
    assert judged(**arms)[0] == word
    assert "nan" not in judged(**arms)[2]


@pytest.mark.parametrize(
    ("mean", "arms", "word"),
    [
        ([YES, SAME], [SAME, SAME], "reproduced"),
        ([SAME, SAME], [YES, YES], "not testable at this budget"),
        ([YES], [YES, NO], "not testable at this budget"),
        ([NO, SAME], [SAME, SAME], "not reproduced"),
        ([YES, NO], [SAME, SAME], "not testable at this budget"),
        ([SAME], [NO, SAME], "not reproduced"),
        ([YES], [NO, SAME], "not testable at this budget"),
        ([NONE], [YES, SAME], "reproduced"),
    ],
)
def test_the_mean_over_the_backbones_decides(mean, arms, word):
    rows = [
        {"line": line, "p_value": p, "side": side, "detectable": 1.5}
        for line, (p, side) in zip(("uvit", "udit"), arms, strict=True)
    ]
    found, count, reason = _judge(pd.DataFrame(rows), averages(*mean))
    assert found == word
    assert ("on average" in count) == (mean != [NONE])
    assert reason.startswith("On average over 2 backbones: CS 0.7 × ") == (mean != [NONE])


def test_the_order_needs_every_scaling_on_average():
    alone = pd.DataFrame({"line": ["uvit"], "p_value": 0.5, "side": -1.0, "detectable": 1.5})
    assert _judge(alone, averages(YES, YES), every=True)[0] == "reproduced"
    assert _judge(alone, averages(YES, SAME), every=True)[0] == "not testable at this budget"


def test_a_tie_is_no_win_for_no_scaling():
    rows = pd.DataFrame(made_up({"none": [0.1, 0.3], "cs": [0.1, 0.3]}, RATE))
    rows = rows.assign(skip_scaling="cs(0.7)", target="dsm")
    (cell,) = _cells(rows)
    assert _matrix_cell(cell, False)["text"] == "a tie with no scaling"
    worse = rows.assign(factor=0.5)
    assert _matrix_cell(_cells(worse)[0], False)["text"] == "no scaling"


def test_a_claim_is_corrected_over_all_its_backbones():
    # Each p passes on its own backbone; of five backbones one such p is likely by chance.
    alone = {"uvit": [(0.02, -1.0)]}
    assert judged(**alone)[0] == "reproduced"
    others = {line: [(0.6, 1.0)] for line in ("udit", "patch_unet", "ddpmpp", "ncsnpp")}
    word, count, reason = judged(**alone, **others)
    assert word == "not testable at this budget"
    assert count == "shown on 0 of 5 backbones, the opposite on 0"
    assert "Holds on 0 of 5 backbones that could be tested" in reason
    assert "over 5 tests" in reason


def test_the_order_needs_every_arm_of_a_backbone():
    assert judged(uvit=[YES, SAME])[0] == "reproduced"
    assert judged(every=True, uvit=[YES, SAME])[0] == "not testable at this budget"
    assert judged(every=True, uvit=[YES, NONE])[0] == "not testable at this budget"
    assert judged(every=True, uvit=[YES, YES])[0] == "reproduced"
    assert judged(every=True, uvit=[YES, NO])[0] == "not reproduced"


def test_published_factors_stand_beside_the_feature_norm(tables):
    first = scalelong_findings(tables)[0]
    # Figure 1 at depth 12: 1.97 unscaled, 1.38, 1.09 and 0.98.
    assert "depth 12: 1/sqrt2-CS × 0.70, LS × 0.55, CS × 0.50" in first.reason


def test_label_bias_is_said_only_of_conditional_networks(tables):
    told = replace(tables, runs=tables.runs.assign(conditional="true"))
    assert label_bias(told).startswith("6 arms are class-conditional")
    assert label_bias(told.only(target_kind="dsm")) is None
    assert label_bias(tables) is None


def test_the_figure_shows_every_measure_twice_alike(tables, tree, tmp_path):
    words = "\n".join(text.get_text() for text in figures.stability(tables).findobj(Text))
    small_print = words.replace("\n", " ")
    assert "all backbones" in words
    for measure in MEASURES.values():
        if measure.ratio:
            assert f"{measure.label.capitalize()}: {measure.words}." in small_print
    assert "n = 3 seeds per arm" in small_print
    for folder in ("a", "b"):
        figures.draw_all(
            tree.parent / "tables", tree.parent, tmp_path / folder, ["stability"], ["svg"]
        )
    first, second = ((tmp_path / folder / "stability.svg").read_bytes() for folder in "ab")
    assert first == second
    untested = tables.stability.assign(p_value=math.nan, p_holm=math.nan)
    alone = replace(tables, stability=untested, stability_pairs=tables.stability_pairs.iloc[:0])
    drawn = figures.stability(alone).findobj(Text)
    small_print = " ".join(text.get_text() for text in drawn).replace("\n", " ")
    assert "Pairs of runs with equal seeds per arm: 1, 2, 3. Bars" in small_print
    assert "No test is possible" in small_print
    assert "One pair per arm" not in small_print
    nothing = figures.stability(tables.only(skip_scaling="none"))
    assert "No scaled arm shares a finished seed" in "\n".join(
        text.get_text() for text in nothing.findobj(Text)
    )


def test_the_report_answers_which_scaling_is_stable(tree, tmp_path):
    figures.draw_all(
        tree.parent / "tables", tree.parent, tree.parent / "figures", ["stability"], ["svg"]
    )
    page = report(tree, tree.parent, tmp_path).read_text()
    section = page[page.index('<section id="stability">') : page.index('<section id="cost">')]
    for line in stability_answer(Tables.read(tree.parent / "tables")).summary:
        assert str(escape(line)) in section
    assert section.count('src="data:image/') == 1
    assert "ScaleLong’s claims" in section
    assert "0 of 3 against 1 of 3" in section
    assert 'id="theory"' not in page  # sections without figures are not there
    assert "biased for a class-conditional network" not in page


def test_the_report_of_one_seed_claims_no_stability(tmp_path):
    manifest = synthetic.build(tmp_path, **GRID, seeds=(0,), diverged=(), missing=(), logged=60)
    aggregate(manifest, manifest.parent, manifest.parent / "tables")
    page = report(manifest, manifest.parent, tmp_path / "report").read_text()
    section = page[page.index('<section id="stability">') : page.index('<section id="cost">')]
    assert "No test of stability is possible" in section
    assert not re.search(r'class="verdict (better|worse)"', section)


def test_notebook_and_report_say_the_same_of_scalelong(tree, tables, tmp_path):
    page = report(tree, tree.parent, tmp_path).read_text()
    notebook = json.loads((ROOT / "notebooks" / "scalelong.ipynb").read_text())
    source = "".join("".join(cell["source"]) + "\n" for cell in notebook["cells"])
    assert "verdict(" not in source  # no test of its own
    assert "findings_table(study)" in source
    shown = findings_table(tables).data
    for finding in scalelong_findings(tables):
        for text in (finding.claim, finding.word, finding.reason):
            assert str(escape(text)) in page
            assert text.replace("&", "&amp;") in shown
    row = row_of(tables, "feature_norm", "uvit / cs(0.7) / dsm")
    table = factor_table(tables.only(target_kind="dsm"), "feature_norm").data
    assert f"[{row['factor_low']:.3g}, {row['factor_high']:.3g}]" in table
    assert table.count("<tr") == 1 + 2 + 4  # head, both scalings on average, both on two backbones
    assert table.index("all backbones") < table.index("U-ViT")


# --- checks of the benchmark itself ---------------------------------------------------------------


def test_probes_that_are_missing_broken_or_infinite_are_named(tmp_path):
    manifest = synthetic.build(tmp_path, **GRID, seeds=(0,), diverged=(), missing=(), logged=30)
    content = json.loads(manifest.read_text())
    content["config"]["probes"] = [{"kind": "robustness"}]
    folders = [manifest.parent / "runs" / entry["run"] for entry in content["runs"]]
    for folder in folders[1:]:
        probe_tables(folder, "none", 0, False)
    (folders[1] / "probes" / "robustness.parquet").write_bytes(b"not parquet")
    endless = pd.read_parquet(folders[2] / "probes" / "robustness.parquet").assign(gain=math.inf)
    endless.to_parquet(folders[2] / "probes" / "robustness.parquet")
    aggregate(content, manifest.parent, tmp_path / "tables")
    found = Tables.read(tmp_path / "tables")
    assert {(row.check, row.run) for row in found.qc.itertuples()} == {
        ("missing probe", folders[0].name),
        ("unreadable file", folders[1].name),
        ("non-finite probe", folders[2].name),
    }
    gains = found.measures[found.measures["measure"] == "robustness_gain"].set_index("run")
    assert gains.loc[folders[2].name, "note"] == "a gain is not a positive number"


def test_equal_weights_are_a_fault_only_between_seeds(tmp_path):
    manifest = synthetic.build(
        tmp_path, **GRID, seeds=(0, 1), targets=("dsm",), diverged=(), missing=(), logged=30
    )
    runs = json.loads(manifest.read_text())["runs"]

    def folder(number: int) -> Path:
        return manifest.parent / "runs" / runs[number]["run"] / "measurements"

    def share(first: int, second: int) -> None:
        paths = [
            folder(i) / runs[i]["measurements"][0]["measurement"] / "generate.json"
            for i in (first, second)
        ]
        content = json.loads(paths[1].read_text())
        content["weights_sha256"] = json.loads(paths[0].read_text())["weights_sha256"]
        paths[1].write_text(json.dumps(content))

    share(0, 1)  # one arm, two seeds
    share(2, 4)  # two arms, one seed
    aggregate(manifest, manifest.parent, tmp_path / "tables")
    found = Tables.read(tmp_path / "tables").qc
    assert [(row.severity, row.check, row.run) for row in found.itertuples()] == [
        ("error", "identical weights", runs[0]["run"]),
        ("warning", "setting without effect", min(runs[i]["run"] for i in (2, 4))),
    ]


def aggregated(manifest: Path, out: Path, **changes) -> Tables:
    """Tables of the study with parts of its configuration changed."""
    content = json.loads(manifest.read_text())
    content["config"] |= changes
    aggregate(content, manifest.parent, out)
    return Tables.read(out)


def small(root: Path, **options) -> Path:
    """Two seeds of two DSM arms without divergence."""
    grid = {"backbones": ("uvit",), "scalings": ("none", "cs(0.7)"), "targets": ("dsm",)}
    options = {"seeds": (0, 1), "diverged": (), "missing": (), "logged": 60} | options
    return synthetic.build(root, **grid, **options)


def test_an_image_without_noise_is_no_fault(tmp_path):
    data = tmp_path / "digits.zip"
    convert({**base()["dataset"], "max_images": 16}, data)
    manifest = small(tmp_path, seeds=(0,))
    path = manifest.parent / "probes" / "optimal_denoiser.parquet"
    path.parent.mkdir()
    probe("optimal_denoiser", data, path, {"snr": [0.1], "samples": 8})
    assert np.isinf(pd.read_parquet(path)["snr"]).any()
    found = aggregated(manifest, tmp_path / "tables", probes=[{"kind": "optimal_denoiser"}])
    assert len(found.probe("optimal_denoiser"))
    assert found.qc.empty


def test_a_probe_that_left_the_study_leaves_its_tables(tmp_path):
    manifest = small(tmp_path, seeds=(0,))
    for entry in json.loads(manifest.read_text())["runs"]:
        probe_tables(manifest.parent / "runs" / entry["run"], "none", 0, False)
    out, both = tmp_path / "tables", [{"kind": "robustness"}, {"kind": "stability_frontier"}]
    assert set(aggregated(manifest, out, probes=both).probes) == {
        "robustness",
        "stability_frontier",
    }
    assert set(aggregated(manifest, out, probes=both[:1]).probes) == {"robustness"}
    assert {path.name for path in out.glob("probe_*")} == {
        "probe_robustness.parquet",
        "probe_robustness.csv",
    }


def test_unlike_log_spacings_are_noted(tmp_path):
    manifest = small(tmp_path, logged=100)
    run = json.loads(manifest.read_text())["runs"][0]["run"]
    path = manifest.parent / "runs" / run / "train" / "dynamics.parquet"
    frame = pd.read_parquet(path)
    assert aggregated(manifest, tmp_path / "like").qc.empty
    kept = sorted(frame.loc[frame["quantity"] == "loss", "step"].unique())[::-2]
    frame[(frame["quantity"] != "loss") | frame["step"].isin(kept)].to_parquet(path)
    found = aggregated(manifest, tmp_path / "unlike")
    (note,) = found.qc.itertuples()
    assert (note.severity, note.check) == ("note", "several log spacings")
    assert re.fullmatch(r"loss every [\d.]+ or [\d.]+ steps", note.detail)
    row = row_of(found, "oscillation_loss", "uvit / cs(0.7) / dsm")
    assert row["n_pairs"] == 1
    assert "1 pair left out: curves logged at unlike steps" in row["note"]


def test_several_networks_in_turn_have_no_end_of_training(tmp_path):
    manifest = small(tmp_path)
    content = json.loads(manifest.read_text())
    for entry in content["runs"]:
        entry["spec"]["formulation"] |= {"splits": [0.5], "split": None}
    manifest.write_text(json.dumps(content))
    found = aggregated(manifest, tmp_path / "tables")
    assert set(found.measures["measure"]) == {"diverged"}
    assert final_levels(found, "loss").empty
    content["runs"][0]["spec"]["formulation"]["split"] = 0  # one of the networks, by itself
    manifest.write_text(json.dumps(content))
    rows = aggregated(manifest, tmp_path / "one").measures
    rows = rows[rows["measure"] == "feature_norm"].set_index("run")
    assert rows["value"].notna().sum() == 1
    assert rows.loc[content["runs"][1]["run"], "note"] == SPLITS
