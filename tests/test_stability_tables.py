"""Measures of stability, their comparison between arms, and what the report says about them."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic
from matplotlib.text import Text
from scipy import stats

from study.analysis import claims, figures, stability, statistics
from study.analysis.report import report
from study.analysis.tables import Tables, aggregate

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
        entry["spec"]["training"]["conditional"] = True
        status = folder / "train" / "status.json"
        if status.is_file():
            found = json.loads(status.read_text())
            status.write_text(json.dumps(found | {"spec": entry["spec"]}))
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


def made_up(values: dict[str, list], measure: str = "feature_norm") -> list[dict]:
    """Rows of ``stability.csv`` for scalings of one backbone, a value per seed; None: diverged."""
    better = stability.MEASURES[measure].better
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
            status = "diverged" if value is None else "done"
            rows.append(
                {"run": run, "arm": scaling, "line": "uvit", "status": status, "better": better}
                | {"measure": measure, "value": value, "note": ""}
            )
    return stability.stability_rows(rows, specs, seeds)


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
    low, high = statistics.geometric_interval([1.0, 4.0, 16.0])
    assert low == pytest.approx(1)
    assert high == pytest.approx(16)
    assert math.isnan(statistics.geometric_mean([]))


# --- one number per run ---------------------------------------------------------------------------


def test_every_run_has_a_row_for_every_measure(tables):
    rows = tables.measures
    assert set(rows["measure"]) == set(stability.MEASURES)
    assert (rows.groupby("measure")["run"].nunique() == len(tables.runs)).all()
    lost = rows[rows["status"] == "diverged"].set_index("measure")
    assert len(lost) == len(stability.MEASURES)
    assert lost["value"].drop(["diverged", "largest_learning_rate"]).isna().all()
    assert lost.loc["diverged", "value"] == 1
    # Short trainings at other rates do not need the long one.
    assert lost.loc["largest_learning_rate", "value"] == RATES[0]
    assert re.fullmatch(r"training diverged at step \d+", lost.loc["feature_norm", "note"])
    absent = rows[rows["status"] == "missing"]
    assert len(absent) == len(stability.MEASURES)
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
        (["trained", "trained", "trained"], 1.6e-2, "the largest may be larger"),
        (["diverged", "trained", "trained"], None, "not even the smallest rate tried, 0.001"),
    ],
)
def test_the_largest_rate_needs_all_smaller_ones(outcomes, rate, words):
    frame = pd.DataFrame({"lr": RATES, "outcome": outcomes}).iloc[::-1]
    found, note = stability.largest_rate(frame)
    assert found == rate
    assert words in note


def test_measures_that_nothing_stands_behind_are_absent(tmp_path):
    manifest = synthetic.build(tmp_path, **GRID, seeds=(0,), diverged=(), missing=(), logged=60)
    aggregate(manifest, manifest.parent, tmp_path / "tables")
    found = Tables.read(tmp_path / "tables")
    assert set(found.measures["measure"]) == set(stability.MEASURES) - {
        *("robustness_gain", "network_gain", "largest_learning_rate")
    }


def test_imported_weights_did_not_diverge_here():
    runs = [{"run": name, "status": "done", "step": 1} for name in ("a", "b")]
    rows = stability.measure_rows(runs, [], {}, imported={"a"})
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
    low, high = [1.0, 1.1, 0.9], [2.0, 2.1, 1.9]
    for measure, word in (("feature_norm", "less"), ("largest_learning_rate", "more")):
        (row,) = [r for r in made_up({"none": low, "cs": high}, measure) if r["against"]]
        assert row["factor"] == pytest.approx(2, rel=0.03)
        assert row["verdict"] == f"{word} stable"


def test_one_seed_gives_a_factor_and_no_test():
    (row,) = [r for r in made_up({"none": [4.0], "cs": [1.0]}) if r["against"]]
    assert row["factor"] == 0.25
    assert (row["verdict"], row["tests_in_family"]) == ("no test", 0)
    assert math.isnan(row["p_value"])


def test_arms_without_an_unscaled_arm_say_so():
    (row,) = made_up({"cs": [1.0, 2.0]})
    assert (row["against"], row["n"]) == ("", 2)
    assert row["note"] == "no unscaled arm to compare with"


# --- words and pictures ---------------------------------------------------------------------------


def test_the_answer_counts_what_was_shown(tables):
    answer = claims.stability_answer(tables)
    shown = tables.stability[
        (tables.stability["against"] == "none") & (tables.stability["verdict"] == "more stable")
    ]
    cells = shown.drop_duplicates(["line", "measure"])
    cells = cells[cells["measure"] != "diverged"]
    assert answer.summary[0].startswith(f"In {len(cells)} of ")
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


def judged(verdicts: dict[str, list[str]]) -> str:
    return claims._judge({line: (words, 1.5) for line, words in verdicts.items()})[0]


def test_a_claim_fails_where_the_opposite_is_shown():
    same, more, less, none = "no difference shown", "more stable", "less stable", "no test"
    assert judged({"uvit": [more, same], "udit": [same]}) == "reproduced"
    assert judged({"uvit": [more, less]}) == "not reproduced"
    assert judged({"uvit": [more], "udit": [less, same]}) == "not reproduced"
    assert judged({"uvit": [same], "udit": [none]}) == "not testable at this budget"


def test_published_factors_stand_beside_the_feature_norm(tables):
    first = claims.scalelong_findings(tables)[0]
    # Figure 1 at depth 12: 1.97 unscaled, 1.38, 1.09 and 0.98.
    assert "depth 12: 1/sqrt2-CS × 0.70, LS × 0.55, CS × 0.50" in first.reason


def test_label_bias_is_said_only_of_conditional_networks(tables, tmp_path):
    assert claims.label_bias(tables).startswith("6 arms are class-conditional")
    assert claims.label_bias(tables.only(target_kind="dsm")) is None
    manifest = synthetic.build(tmp_path, **GRID, seeds=(0,), diverged=(), missing=(), logged=30)
    aggregate(manifest, manifest.parent, tmp_path / "tables")
    assert claims.label_bias(Tables.read(tmp_path / "tables")) is None


def test_the_figure_shows_every_measure_twice_alike(tables, tree, tmp_path):
    words = "\n".join(text.get_text() for text in figures.stability(tables).findobj(Text))
    small_print = words.replace("\n", " ")
    for measure in stability.MEASURES.values():
        if measure.ratio:
            assert f"{measure.label.capitalize()}: {measure.words}." in small_print
    assert "n = 3 seeds per arm" in small_print
    for folder in ("a", "b"):
        figures.draw_all(
            tree.parent / "tables", tree.parent, tmp_path / folder, ["stability"], ["svg"]
        )
    first, second = ((tmp_path / folder / "stability.svg").read_bytes() for folder in "ab")
    assert first == second
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
    for line in claims.stability_answer(Tables.read(tree.parent / "tables")).summary:
        assert line.replace("'", "&#39;") in section
    assert section.count('src="data:image/') == 1
    assert "ScaleLong’s claims" in section
    assert "0 of 3 against 1 of 3" in section
    # Sections without figures are not there; the caveat about labels is.
    assert 'id="theory"' not in page
    assert "biased for a class-conditional network" in page


def test_the_report_of_one_seed_claims_no_stability(tmp_path):
    manifest = synthetic.build(tmp_path, **GRID, seeds=(0,), diverged=(), missing=(), logged=60)
    aggregate(manifest, manifest.parent, manifest.parent / "tables")
    page = report(manifest, manifest.parent, tmp_path / "report").read_text()
    section = page[page.index('<section id="stability">') : page.index('<section id="cost">')]
    assert "No test of stability is possible" in section
    assert not re.search(r'class="verdict (better|worse)"', section)


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

    def share(first: int, second: int) -> None:
        paths = [
            manifest.parent / "runs" / runs[i]["run"] / "generate" / "generate.json"
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
