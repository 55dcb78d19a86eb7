"""What notebooks say about the probes of a study: verdicts with a test, and no stronger words."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import synthetic
from scipy import stats

from study import published
from study.analysis import style
from study.analysis.figures.picture import picture
from study.analysis.tables.aggregate import aggregate
from study.analysis.tables.read import Tables
from study.analysis.verdicts import long_skips, patch_diffusion, scaling_laws
from study.analysis.verdicts.base import CONTRADICTED, REPRODUCED, UNTESTABLE, jointly, verdict
from study.analysis.verdicts.stf import stable_quality, target_variance, variance_ratios

SQUARES = {"none": 4.0, "cs(0.9)": 3.0, "inv_sqrt2": 2.0, "cs(0.7)": 1.8, "cs(0.5)": 1.3}


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Tables:
    made = synthetic.build(
        tmp_path_factory.mktemp("tree"),
        backbones=("uvit", "udit"),
        scalings=("none",),
        targets=("dsm",),
        seeds=(0,),
        diverged=(),
        missing=(),
        logged=10,
        images=0,
    )
    aggregate(made, made.parent, made.parent / "tables")
    return Tables.read(made.parent / "tables", made.parent)


def having(study: Tables, kind: str, rows: list[dict] | pd.DataFrame) -> Tables:
    return replace(study, probes={kind: pd.DataFrame(rows)})


def test_a_missing_probe_is_named_with_how_to_add_it(study):
    said = picture(study, "robustness").data
    assert "does not make the probe `robustness`" in said
    assert "`probes: [robustness]`" in said
    assert "digits" not in said
    for answer in (
        scaling_laws.laws(study),
        target_variance(study),
        patch_diffusion.blur(study),
    ):
        assert [found.word for found in answer] == [UNTESTABLE]


# --- several tests of one claim -------------------------------------------------------------------


def test_one_significant_backbone_of_several_is_no_verdict():
    differences = {"a": [1.0, 1.3, 1.8], "b": [0.1, -0.2, 0.3], "c": [0.3, -0.1, -0.4], "d": [1.0]}
    single = [({"backbone": n}, verdict(d, "c", positive=True)) for n, d in differences.items()]
    assert single[0][1].word == REPRODUCED
    p = single[0][1].evidence.p
    assert 0.05 / 3 < p < 0.05  # three tests: "d" has none
    together = list(jointly(single))
    assert {found.word for _, found in together} == {UNTESTABLE}
    assert together[0][0] == {"backbone": "a", "p (Holm)": f"{3 * p:.3f}"}
    assert together[3][0]["p (Holm)"] == ""
    assert [found.word for _, found in jointly(single[:1])] == [REPRODUCED]


# --- ScaleLong ------------------------------------------------------------------------------------


def law_rows(values: dict[int, list[float]], network: str = "uvit", quantity: str = "forward"):
    """Rows of the probe: a value of every scaling, in the order of ``SQUARES``, by draw."""
    return [
        {"network": network, "depth": 4, "skip_scaling": scaling, "seed": seed}
        | {"quantity": quantity, "sum_squares": squares, "value": value}
        | {"predicted": 1 + squares if network == "recursion" else None}
        for seed, draw in values.items()
        for (scaling, squares), value in zip(SQUARES.items(), draw, strict=True)
    ]


FALLING, RISING = [5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]
TINY = [2.0, 5.0, 1.0, 4.0, 3.0]  # rank correlation -0.1 with the place, 0.1 with its reverse


def test_the_order_of_scalings_is_tested_and_corrected(study):
    rows = law_rows(dict.fromkeys(range(4), FALLING))
    rows += law_rows(dict.fromkeys(range(4), RISING), quantity="gradient")
    rows += law_rows(dict.fromkeys(range(2), TINY[::-1]), quantity="sensitivity")
    rows += law_rows(dict.fromkeys(range(4), [1.0] * 5), network="udit")
    found = scaling_laws.ranks(having(study, "scaling_laws", rows))
    assert [(about["backbone"], about["law"], one.word) for about, one in found] == [
        ("U-ViT", "feature norm", REPRODUCED),
        ("U-ViT", "gradient norm", CONTRADICTED),
        ("U-ViT", "sensitivity", UNTESTABLE),  # the same weak correlation in both draws
        ("U-DiT", "feature norm", UNTESTABLE),
    ]
    about = [about for about, _ in found]
    assert [a["rank correlation with Σκ²"] for a in about] == ["+1.00", "-1.00", "+0.10", ""]
    assert [a["remark"] for a in about] == ["", "", "", "no test"]
    tests = scaling_laws.orders(having(study, "scaling_laws", rows), clean=False)
    # Four draws of five scalings: the mean correlation has variance 1 / (4 * 4).
    first = tests[tests["quantity"] == "forward"].iloc[-1]
    assert first["p"] == pytest.approx(2 * stats.norm.sf(4))
    assert first["p_holm"] == pytest.approx(3 * first["p"])


def test_a_correlation_that_is_one_of_several_tests_needs_more(study):
    rows = law_rows({0: FALLING})  # p = 0.046
    alone = scaling_laws.ranks(having(study, "scaling_laws", rows))
    assert [found.word for _, found in alone] == [REPRODUCED]
    rows += law_rows({0: TINY}, quantity="gradient")
    both = scaling_laws.ranks(having(study, "scaling_laws", rows))
    assert [found.word for _, found in both] == [UNTESTABLE, UNTESTABLE]


def test_a_weak_order_stays_weak_however_often_it_is_drawn(study):
    rows = law_rows(dict.fromkeys(range(200), TINY[::-1]))
    ((about, found),) = scaling_laws.ranks(having(study, "scaling_laws", rows))
    assert about["p (Holm)"] == "0.005"
    assert found.word == UNTESTABLE
    assert about["remark"].startswith("in part")
    swapped = [5.0, 4.0, 3.0, 1.0, 2.0]  # two neighbours: 0.9
    ((about, found),) = scaling_laws.ranks(
        having(study, "scaling_laws", law_rows(dict.fromkeys(range(4), swapped)))
    )
    assert (about["rank correlation with Σκ²"], found.word) == ("+0.90", REPRODUCED)


def test_pairs_that_are_always_the_wrong_way_round_are_named(study):
    # The third scaling lies below the last two in every draw, and lies far above them in Σκ².
    draws = {n: [5.0, 4.0, 1.0 + 0.01 * n, 3.0 - 0.02 * n, 2.0 + 0.01 * n] for n in range(8)}
    ((about, found),) = scaling_laws.ranks(having(study, "scaling_laws", law_rows(draws)))
    names = [style.scaling_label(name) for name in SQUARES]
    wrong = [f"{names[2]} below {name}" for name in (names[4], names[3])]
    assert about["remark"] == f"the reverse of Σκ²: {wrong[0]} and {wrong[1]}"
    assert found.word == CONTRADICTED
    alike = {n: [5.0, 4.0, 3.0, 2.0 + 0.5 * (-1) ** n, 2.0 - 0.5 * (-1) ** n] for n in range(8)}
    assert scaling_laws.reversals(having(study, "scaling_laws", law_rows(alike))) == {}


def clean_rows(scale: float = 1.0, bound: float = 100.0) -> list[dict]:
    rows = []
    for quantity, power in (("forward", 1.0), ("gradient", 1.0), ("sensitivity", 0.5)):
        exact = [(1 + squares) ** power for squares in SQUARES.values()]
        draws = {n: [value * scale * (0.97 + 0.02 * n) for value in exact] for n in range(4)}
        some = law_rows(draws, "recursion", quantity)
        rows += [row | {"predicted": (1 + row["sum_squares"]) ** power} for row in some]
    return rows + law_rows(dict.fromkeys(range(4), [bound] * 5), "recursion", "bound")


def test_the_line_is_ours_and_the_bound_is_not_tested(study):
    order, line, bound = scaling_laws.laws(having(study, "scaling_laws", clean_rows()))
    assert order.word == REPRODUCED
    assert "ScaleLong, abstract; the form of its bounds is not among our sources" in order.reason
    assert "in 3 of 3 tests" in order.reason
    assert "exact for this recursion is 1 + Σκ². 0 of 15 means over 4 draws" in line
    assert bound.word == UNTESTABLE
    assert "not contradicted by random directions" in bound.reason
    assert "hardly reach a worst case" in bound.reason
    assert not any("theorem" in str(said).lower() for said in (order, line, bound))


def test_means_off_the_line_and_a_crossed_bound_are_told(study):
    tables = having(study, "scaling_laws", clean_rows(scale=2.0, bound=1.0))
    _, line, bound = scaling_laws.laws(tables)
    assert "15 of 15 means over 4 draws differ" in line
    assert bound.word == CONTRADICTED
    assert "exceeded in 20 of 20 draws" in bound.reason


def test_a_recursion_of_one_draw_is_no_error(study):
    rows = [row for row in clean_rows() if row["seed"] == 0 and row["quantity"] == "forward"]
    order, _ = scaling_laws.laws(having(study, "scaling_laws", rows))
    assert order.word == REPRODUCED  # a single test, of five scalings in one order


# --- Stable Target Field --------------------------------------------------------------------------


def variance_rows(
    ratios: dict[tuple[float, int], float],
    error: float | None = 0.01,
    bias: float | None = 0.0,
    bias_error: float | None = 0.001,
    whole_error: float = 0.1,
) -> list[dict]:
    """Rows of the probe for ratios by (σ, n); V_DSM is 2 at every σ."""
    fixed = {"distribution": "digits", "unit": "x0", "points": 50, "draws": 8}
    rows = [
        {**fixed, "sigma": sigma, "reference": 0, "variance": 2.0, "standard_error": whole_error}
        | {"squared_bias": 0.0, "bias_standard_error": 0.0, "ratio": 1.0}
        | {"ratio_standard_error": 0.0}
        for sigma in sorted({sigma for sigma, _ in ratios})
    ]
    for (sigma, size), ratio in ratios.items():
        rows.append(
            {**fixed, "sigma": sigma, "reference": size, "variance": 2 * ratio}
            | {"standard_error": 0.1, "squared_bias": bias, "bias_standard_error": bias_error}
            | {"ratio": ratio, "ratio_standard_error": error}
        )
    return rows


RATIOS = {(0.5, 1): 1.0, (0.5, 16): 0.5, (5.0, 1): 1.0, (5.0, 4): 0.26, (5.0, 16): 0.06}


def judged(study, rows) -> list:
    return target_variance(having(study, "target_variance", rows))


def test_variances_are_judged_by_two_standard_errors(study):
    less, unbiased, falls = judged(study, variance_rows(RATIOS))
    assert (less.word, unbiased.word, falls.word) == (REPRODUCED,) * 3
    assert "at 2 of the 2 noise levels where V_DSM is told from zero" in less.reason
    assert "(0.5 at σ = 0.5 and 0.06 at σ = 5)" in less.reason
    assert "for 3 of 3 pairs" in less.reason  # a reference of one is no stable target
    assert "at most 0.001 of V_DSM" in unbiased.reason
    assert "between 0.96 and 1.04 for 2 sizes n at σ = 5" in falls.reason
    for ratio, word in ((1.01, UNTESTABLE), (0.99, UNTESTABLE), (1.1, CONTRADICTED)):
        assert judged(study, variance_rows({**RATIOS, (0.5, 16): ratio}))[0].word == word
    # With few references at little noise the target is next to that of DSM.
    few = judged(study, variance_rows({**RATIOS, (0.5, 4): 0.99}))[0]
    assert few.word == REPRODUCED
    assert "for 3 of 4 pairs" in few.reason
    assert judged(study, variance_rows({**RATIOS, (0.5, 4): 1.1}))[0].word == CONTRADICTED
    assert judged(study, variance_rows({(5.0, 16): 0.5}))[2].word == CONTRADICTED


def test_one_of_many_ratios_above_one_is_chance(study):
    many = {(float(sigma), size): 0.5 for sigma in range(1, 13) for size in (4, 16, 64, 256, 512)}
    assert len(many) == 60
    for excess, word in ((0.023, REPRODUCED), (0.1, CONTRADICTED)):  # 2.3 and 10 standard errors
        found = judged(study, variance_rows({**many, (3.0, 4): 1 + excess}))[0]
        assert found.word == word
        assert "Holm's correction over the 60" in found.reason
    # The same for the bias: above its bound by 2.3 standard errors at one of twelve levels.
    rows = variance_rows(many, bias=0.0, bias_error=0.02)
    for bias, word in ((0.146, UNTESTABLE), (0.3, CONTRADICTED)):  # V_DSM is 2: a share of 0.073
        (place,) = [i for i, r in enumerate(rows) if (r["sigma"], r["reference"]) == (3.0, 512)]
        rows[place]["squared_bias"] = bias
        assert judged(study, rows)[1].word == word
    # And for the fall with 1 / n, which is judged within a factor of two.
    for times, word in ((1.0, REPRODUCED), (2.04, UNTESTABLE), (3.0, CONTRADICTED)):
        found = judged(study, variance_rows({(9.0, 4): times / 4}, error=0.01))[2]
        assert found.word == word


def test_bias_is_judged_against_what_the_probe_could_see(study):
    for bias, error, word in (
        (0.02, 0.01, REPRODUCED),
        (0.05, 0.2, UNTESTABLE),
        (0.5, 0.01, CONTRADICTED),
        (0.0, None, UNTESTABLE),
        (None, None, UNTESTABLE),
    ):
        found = judged(study, variance_rows(RATIOS, bias=bias, bias_error=error))[1]
        assert found.word == word
        assert "nan" not in found.reason


def test_variances_that_are_next_to_nothing_are_not_judged(study):
    for rows in (variance_rows(RATIOS, whole_error=1.5), variance_rows({(0.5, 1): 1.0})):
        answers = judged(study, rows)
        assert [found.word for found in answers] == [UNTESTABLE]
        assert "told from zero" in answers[0].reason
    assert judged(study, variance_rows(RATIOS, error=None))[0].word == UNTESTABLE
    table = variance_ratios(having(study, "target_variance", variance_rows(RATIOS)))
    assert table.loc[5.0].tolist() == [1.0, 0.26, 0.06]
    nothing = having(study, "target_variance", variance_rows(RATIOS, whole_error=1.5))
    assert variance_ratios(nothing).empty


# --- Patch Diffusion ------------------------------------------------------------------------------


def energy_rows(shares: dict[int, float], side: int | None) -> list[dict]:
    rows = [{"quantity": "own_weight", "snr": snr, "value": snr / 2} for snr in (0.01, 1.0)]
    rows += [
        {"quantity": "energy_above", "snr": snr, "patch": patch, "value": value}
        | {"share_of_original": share}
        for patch, share in shares.items()
        for snr, value in ((0.01, 0.0), (1.0, 1.0))
    ]
    if side:
        rows.append({"quantity": "image", "snr": 1.0, "side": side})
    return rows


@pytest.mark.parametrize("side", [64, None])  # what is shown of images, or latents: nothing
def test_only_patches_as_large_as_the_image_are_left_out(study, side):
    shares = {8: 0.4, 64: 0.97, 256: 1.0}
    tables = having(study, "optimal_denoiser", energy_rows(shares, side))
    assert list(patch_diffusion.lost_detail(tables).columns) == [8, 64]
    assert [found.word for found in patch_diffusion.blur(tables)] == [REPRODUCED, REPRODUCED]
    tables = having(study, "optimal_denoiser", energy_rows({256: 1.0}, side))
    (found,) = patch_diffusion.blur(tables)
    assert found.word == UNTESTABLE
    assert "no patch is smaller than the images" in found.reason


# --- U-ViT and U-DiT ------------------------------------------------------------------------------


def map_rows(run: str, bump: float, sigma: float = math.nan, part: int = 0) -> list[dict]:
    """Likeness that fades by 0.1 a block, but for a bump on the anti-diagonal of six blocks."""
    return [
        {"run": run, "quantity": "cka", "sigma": sigma, "part": part, "position": i}
        | {"other_position": float(j)}
        | {"value": 1 - 0.1 * abs(i - j) + bump * (i + j == 5)}
        for i in range(6)
        for j in range(6)
    ]


def test_mirror_images_are_those_of_training_noise_and_of_one_network(study):
    run = study.runs["run"].iloc[0]
    plain = map_rows(run, 0.3) + map_rows(run, -0.6, sigma=2.0)
    found = long_skips.antidiagonal(having(study, "representation", plain))
    # Pair (1, 4) against the three pairs at that distance, of which it is one.
    assert found["contrast"].tolist() == pytest.approx([0.2])
    split = having(study, "representation", plain + map_rows(run, 0.0, part=1))
    found = long_skips.antidiagonal(split)
    assert found["part"].tolist() == [0, 1]
    assert found["contrast"].tolist() == pytest.approx([0.2, 0.0])
    assert "part" in long_skips.mirror_table(split).data
    single = long_skips.mirror_table(having(study, "representation", plain)).data
    assert "<th>part</th>" not in single and "0.2" in single


def test_spectra_are_of_blocks_by_noise_level_with_the_noisy_image_beside(study):
    run = study.runs.loc[study.runs["line"] == "uvit", "run"].iloc[0]
    rows = [
        {"run": run, "quantity": "spectrum", "part": 0, "sigma": sigma, "frequency": frequency}
        | {"block": f"b{position}", "position": position, "value": -slope * frequency * sigma}
        for sigma in (1.0, 2.0)
        for position, slope in ((-1, 8.0), (0, 1.0), (1, 3.0))
        for frequency in (0.0, 0.5, 1.0)
    ]
    tables = having(study, "representation", rows)
    found = long_skips.low_frequencies(tables)
    assert found[["sigma", "position"]].to_numpy().tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    assert found["drop"].tolist() == pytest.approx([-0.5, -1.5, -1, -3])
    assert found["image"].tolist() == pytest.approx([-4, -4, -8, -8])
    shown = re.findall("<t[hd]>(.+?)</t[hd]>", long_skips.spectra_table(tables).data)
    assert shown == [
        *("σ = 1", "σ = 2"),
        *("U-ViT", "-1.00 (-1.50 to -0.50)", "-2.00 (-3.00 to -1.00)"),
        *("the noisy image", "-4.00", "-8.00"),
    ]


# --- what the notebooks say themselves ------------------------------------------------------------


def test_the_reference_batch_is_that_of_the_published_runs():
    (protocol,) = [one for one in published.PROTOCOLS if one.paper == "STF"]
    assert "reference batch 1024 per process" in " ".join(map(str, vars(protocol).values()))
    cells = json.loads((Path(__file__).parents[1] / "notebooks/stf.ipynb").read_text())["cells"]
    text = " ".join("".join(cell["source"]) for cell in cells)
    assert "published CIFAR-10 runs used a reference batch of 1024 per process" in text


# --- U-ViT and Stable Target Field ----------------------------------------------------------------


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> Tables:
    """Both targets on two backbones, three seeds."""
    root = tmp_path_factory.mktemp("targets")
    whole = {"diverged": (), "missing": (), "logged": 10}
    manifest = synthetic.build(
        root, backbones=("uvit", "udit"), scalings=("none",), seeds=(0, 1, 2), **whole
    )
    aggregate(manifest, manifest.parent, root / "tables")
    return Tables.read(root / "tables")


def test_stable_targets_are_judged_for_each_size_of_the_reference(targets):
    whole = stable_quality(targets)
    assert [about["backbone"] for about, _ in whole] == ["all backbones", "U-ViT", "U-DiT"]
    assert whole[0][1].evidence.n == 3
    stable = targets.runs["target_kind"] == "stf"
    runs = targets.runs.assign(
        variant=targets.runs["variant"].mask(stable, "target.reference=64"),
        line=targets.runs["line"].mask(stable, targets.runs["line"] + " / target.reference=64"),
    )
    again = stable_quality(replace(targets, runs=runs))
    assert [one.evidence.mean for _, one in again] == [one.evidence.mean for _, one in whole]
    assert "(64 references)" in again[0][1].reason
    ((_, nothing),) = stable_quality(targets.only(target_kind="dsm"))
    assert nothing.word == UNTESTABLE


def test_sizes_of_the_reference_are_several_tests(targets):
    stf = targets.runs[targets.runs["target_kind"] == "stf"]
    more = [
        stf.assign(
            run=stf["run"] + str(size),
            variant=f"target.reference={size}",
            line=stf["line"] + f" / target.reference={size}",
        )
        for size in (64, 128)
    ]
    dsm = targets.runs[targets.runs["target_kind"] == "dsm"]
    metrics = targets.metrics
    again = [metrics[metrics["run"].isin(stf["run"])].assign(run=lambda f: f["run"] + "64")]
    again += [metrics[metrics["run"].isin(stf["run"])].assign(run=lambda f: f["run"] + "128")]
    both = replace(targets, runs=pd.concat([dsm, *more]), metrics=pd.concat([metrics, *again]))
    found = stable_quality(both)
    names = [about["backbone"] for about, _ in found]
    assert names == ["all backbones", "U-ViT", "U-DiT"] * 2
    once = stable_quality(targets)[0][0]["p (Holm)"]
    assert float(found[0][0]["p (Holm)"]) == pytest.approx(2 * float(once), abs=2e-3)


def test_long_skips_are_judged_on_unscaled_dsm_arms_with_their_twin(targets):
    swap = {"udit": "uvit(skip=False)"}
    runs = targets.runs.assign(line=targets.runs["line"].replace(swap))
    (one,) = long_skips.long_skips(replace(targets, runs=runs))
    assert one.evidence.n == 3  # seeds; the STF arms of the same seeds are no further evidence
    alone = replace(targets, runs=runs[runs["line"] != "uvit"])
    assert long_skips.long_skips(alone) == []
