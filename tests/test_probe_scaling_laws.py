"""Scaling laws at initialisation: exact means where they are known, the order elsewhere."""

import math
import re
import shutil

import pandas as pd
import pyarrow.parquet as parquet
import pytest
import synthetic
import torch
from matplotlib.text import Text
from miniature import base

from study.analysis import figures
from study.analysis.tables.aggregate import aggregate
from study.analysis.tables.read import Tables
from study.arms import manifest, runs
from study.data import Archive
from study.data.convert import convert
from study.files import UserError, write_json
from study.probes.base import DatasetSubject, StudySubject, probe
from study.probes.scaling_laws import Recursion, bound, jacobian, measure
from study.spec.probes import ScalingLaws
from study.spec.study import load

UVIT = {"options": {"embed_dim": 32, "depth": 8, "num_heads": 2}}
SMALL = {"depths": (2, 6), "width": 64, "draws": 48, "directions": 2, "backbone_draws": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.zip"
    convert({**base()["dataset"], "max_images": 32}, path)
    return path


def study(**changes):
    content = {**base(), "backbones": {"uvit": UVIT}, **changes}
    return load(content)


def subject(data, **changes) -> StudySubject:
    specs = tuple(run.spec for run in runs(study(**changes)).values())
    return StudySubject(Archive(data), torch.device("cpu"), specs)


def frame(measured) -> pd.DataFrame:
    return pd.DataFrame(measured.columns)


@pytest.fixture(scope="module")
def recursion(data) -> pd.DataFrame:
    return frame(measure(subject(data), ScalingLaws(**SMALL)))


@pytest.fixture(scope="module")
def backbones(data) -> pd.DataFrame:
    options = ScalingLaws(depths=(1,), width=8, draws=2, backbone_draws=2, samples=4)
    rows = frame(measure(subject(data), options))
    return rows[rows.network != "recursion"]


# --- the clean recursion --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quantity", ["forward", "forward_level", "gradient", "gradient_block", "sensitivity"]
)
def test_means_over_draws_are_as_predicted(recursion, quantity):
    rows = recursion[recursion.quantity == quantity]
    assert set(rows.skip_scaling) == set(ScalingLaws().skip_scaling)
    power = 2 if quantity == "sensitivity" else 1  # its prediction is about the mean square
    for _, group in rows.groupby(["skip_scaling", "depth", "where"]):
        values = group.value**power
        error = values.std() / math.sqrt(len(values))
        predicted = group.predicted.iloc[0] ** power
        assert len(values) == 48
        assert abs(values.mean() - predicted) < 4 * error
        assert error < 0.35 * predicted  # else the line above would say little


def test_predictions_are_the_formulae(recursion):
    rows = recursion.set_index(["quantity", "skip_scaling", "depth", "where", "seed"]).sort_index()
    squares = 1 + 0.5**2 + 0.25**2 + 0.125**2 + 0.0625**2 + 0.03125**2
    for quantity, where, predicted in (
        ("forward", "h_0", 1 + squares),
        ("gradient", "b_1", 3 * (1 + squares)),
        ("sensitivity", "h_0", math.sqrt(1 + squares)),
    ):
        row = rows.loc[quantity, "cs(0.5)", 6, where, 0]
        assert row.sum_squares == pytest.approx(squares)
        assert row.predicted == pytest.approx(predicted)
    inner = rows.loc["forward_level", "none", 6, "h_3", 0]
    assert (inner.sum_squares, inner.predicted) == (3, 4)
    assert rows.loc["forward", "inv_sqrt2", 2, "h_0", 0].sum_squares == pytest.approx(1)
    assert rows.loc["gradient_block", "none", 6, "middle", 0].predicted == 3


def test_bound_is_never_crossed(recursion):
    keys = ["skip_scaling", "depth", "seed"]
    table = recursion.set_index(["quantity", *keys, "where"]).value
    sensitivity, limit = (table[name].droplevel("where") for name in ("sensitivity", "bound"))
    assert len(sensitivity) == 5 * 2 * 48
    assert (limit > sensitivity).all()


def test_stronger_decay_gives_smaller_norms(recursion):
    rows = recursion[recursion.depth == 6]
    for quantity in ("forward", "gradient", "sensitivity"):
        means = rows[rows.quantity == quantity].groupby("skip_scaling").value.mean()
        ordered = [means[name] for name in ("none", "cs(0.9)", "cs(0.7)", "cs(0.5)")]
        assert ordered == sorted(ordered, reverse=True)
        assert means["inv_sqrt2"] < means["none"]


def small_recursion(data, layers: int = 3) -> tuple[DatasetSubject, Recursion, torch.Tensor]:
    where = DatasetSubject(Archive(data), torch.device("cpu"))
    network = Recursion(where, depth=3, width=12, layers=layers, draw=0)
    return where, network, where.noise((12,), "x")


def test_gradients_are_those_of_autograd(data):
    where, network, x = small_recursion(data)
    error, factors = where.noise((12,), "error"), torch.tensor([[1.0, 0.5, 0.25], [1.0, 1.0, 1.0]])
    found = network.gradients(x, factors, error)
    for block in network.blocks.values():
        block.requires_grad_()
    for number in range(2):
        output = network(x[None, None], factors[number : number + 1])[0]
        weights = list(network.blocks.values())
        expected = torch.autograd.grad((output.flatten() * error).sum(), weights)
        for name, gradient in zip(network.blocks, expected, strict=True):
            assert found[name][number].item() == pytest.approx(
                gradient.square().sum().item(), rel=1e-4
            )


def test_operator_norms_are_largest_singular_values(data):
    where, network, x = small_recursion(data)
    start = where.noise((4, 12), "start")
    found, middle = network.operator_norms(x, start)
    expected, inside = [], x
    for i in (1, 2, 3):
        blocks = [network.blocks[f"{part}_{i}"] for part in "ab"]

        def both(z, blocks=blocks):
            for one in blocks:
                z = jacobian(one, z)[0]
            return z

        matrix = torch.autograd.functional.jacobian(both, inside)
        expected.append(torch.linalg.matrix_norm(matrix, 2).item())
        inside = jacobian(blocks[0], inside)[0]
    assert found == pytest.approx(max(expected), rel=0.02)
    matrix = jacobian(network.blocks["middle"], inside)[1]
    assert middle == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=0.02)


def test_bound_by_hand():
    assert bound([1.0, 0.5], 3.0, 2.0) == 1 * 3 + 0.5 * 9 + 9 * 2


def test_same_numbers_again_and_for_fewer_scalings(data, recursion):
    options = ScalingLaws(**{**SMALL, "draws": 2, "skip_scaling": ("cs(0.5)", "ls")})
    rows = frame(measure(subject(data), options))
    assert set(rows.skip_scaling) == {"cs(0.5)"}  # a clean recursion has nothing to learn
    keys = ["skip_scaling", "depth", "seed", "quantity", "where"]
    both = rows.merge(recursion, on=keys, validate="one_to_one")
    assert len(both) == len(rows) > 0
    assert both.value_x.to_numpy() == pytest.approx(both.value_y.to_numpy(), rel=1e-3)
    assert rows.equals(frame(measure(subject(data), options)))


# --- backbones ------------------------------------------------------------------------------------


def test_backbone_rows_are_whole_and_ordered(backbones):
    assert set(backbones.network) == set(backbones.family) == {"uvit"}
    assert set(backbones.depth) == {4}
    assert len(backbones) == 5 * 2 * 3
    assert (backbones.value > 0).all()
    assert backbones.predicted.isna().all()
    squares = backbones.groupby("skip_scaling").sum_squares.first()
    assert squares["none"] == 4
    assert squares["inv_sqrt2"] == pytest.approx(2)
    assert squares["cs(0.7)"] == pytest.approx(sum(0.49**i for i in range(4)))
    for quantity in ("forward", "gradient", "sensitivity"):
        means = backbones[backbones.quantity == quantity].groupby("skip_scaling").value.mean()
        # Where the outermost skip keeps its factor the order is the recursion's; 1/sqrt 2 scales
        # that one as well, which matters most here.
        ordered = [means[name] for name in ("none", "cs(0.9)", "cs(0.7)", "cs(0.5)", "inv_sqrt2")]
        assert ordered == sorted(ordered, reverse=True)


def test_networks_that_output_zero_are_measured_before_the_output(data):
    content = {"grid": {"backbone": ["udit"], "skip_scaling": ["none"]}, "backbones": {"udit": {}}}
    content["backbones"]["udit"] = {"preset": "tiny"}
    options = ScalingLaws(depths=(1,), width=8, draws=2, backbone_draws=1, samples=2)
    rows = frame(measure(subject(data, **content), options))
    rows = rows[rows.network == "udit"]
    assert set(rows.depth) == {2}
    assert (rows.value > 0).all()


def test_every_distinct_network_is_measured_once(data):
    content = {
        "grid": {
            "backbone": ["uvit"],
            "skip_scaling": ["none", "ls"],
            "target": ["dsm", "stf(16)"],
        },
        "arms": [
            {"name": "deep", "backbone": "uvit", "options": {"depth": 12}},
            {"name": "told", "backbone": "uvit", "training": {"conditional": True}},
            {"name": "bare", "backbone": "uvit", "options": {"skip": False}},
        ],
    }
    options = ScalingLaws(
        depths=(1,), width=8, draws=2, backbone_draws=1, samples=2, skip_scaling=("none", "ls")
    )
    measured = measure(subject(data, **content), options)
    rows = frame(measured)
    rows = rows[rows.network != "recursion"]
    depths = rows.groupby("network").depth.first().to_dict()
    assert depths == {
        "uvit(depth=8, skip=true) / not conditional": 4,
        "uvit(depth=12, skip=true) / not conditional": 6,
        "uvit(depth=8, skip=true) / conditional": 4,
    }
    assert measured.facts["without_long_skips"] == ["uvit(depth=8, skip=false) / not conditional"]
    gates = rows[(rows.skip_scaling == "ls") & (rows.depth == 4)].sum_squares
    assert gates.to_numpy() == pytest.approx(1, abs=0.2)  # gates near a half, four of them
    backwards = subject(data, **content)
    turned = StudySubject(backwards.archive, backwards.device, backwards.specs[::-1])
    again = frame(measure(turned, options))
    assert rows.equals(again[again.network != "recursion"])


def test_options_refuse_what_is_no_scaling():
    with pytest.raises(ValueError, match="'cs\\(x\\)' is no skip scaling"):
        ScalingLaws(skip_scaling=("cs(x)",))
    assert ScalingLaws(skip_scaling=("cs( 0.70 )", "cs(0.7)")).skip_scaling == ("cs(0.7)",)


def test_probe_writes_its_table(tmp_path, data):
    path, settings = tmp_path / "study.json", study()
    write_json(path, manifest(settings, runs(settings)))
    options = {"depths": [2], "width": 16, "draws": 2, "backbone_draws": 1, "samples": 2}
    out = tmp_path / "scaling_laws.parquet"
    result = probe("scaling_laws", data, out, options, manifest=path, threads=1)
    rows = parquet.read_table(out).to_pandas()
    assert result["rows"] == len(rows)
    assert set(rows.network) == {"recursion", "uvit"}
    with pytest.raises(UserError, match="skip_scaling"):
        probe("scaling_laws", data, out, {"skip_scaling": ["wild"]}, manifest=path, threads=1)


# --- figures --------------------------------------------------------------------------------------

NAMES = ("scaling_law_recursion", "scaling_law_backbones")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    made = synthetic.build(
        tmp_path_factory.mktemp("tree"),
        backbones=("uvit",),
        scalings=("none", "cs(0.7)"),
        seeds=(0,),
        diverged=(),
        missing=(),
        logged=10,
        images=0,
    )
    aggregate(made, made.parent, made.parent / "tables")
    return made.parent / "tables"


def draw(tables, tmp_path, rows: pd.DataFrame | None, render: bool = False) -> dict[str, str]:
    """The words in each figure, drawn from these rows of the probe."""
    folder = shutil.copytree(tables, tmp_path / "tables")
    if rows is not None:
        rows.to_parquet(folder / "probe_scaling_laws.parquet", index=False)
    found = Tables.read(folder)
    words = {}
    for name in NAMES:
        figure = figures.FIGURES[name](found)
        if render:
            figure.draw_without_rendering()
        words[name] = "\n".join(artist.get_text() for artist in figure.findobj(Text))
    return words


def test_figures_show_the_fit_the_bound_and_the_order(tables, tmp_path, recursion, backbones):
    words = draw(tables, tmp_path, pd.concat([recursion, backbones]))
    said = words["scaling_law_recursion"]
    assert "R² = 0.9" in said
    assert "10 means within" in said
    assert "line 3 S + 3" in said
    assert "exact for this recursion" in said
    assert "theorem" not in said.lower()
    assert "crossed in 0 of 480 draws" in said
    assert "n = 48 draws" in said.replace("\n", " ")
    said = words["scaling_law_backbones"]
    assert "U-ViT, N = 4" in said
    assert "ρ = 0.70 (κ₁ = 1: 1.00)" in said
    assert "n = 2 initialisations" in said.replace("\n", " ")


@pytest.mark.parametrize(
    ("rows", "missing"),
    [("no table", NAMES), ("empty", NAMES), ("recursion", NAMES[1:]), ("backbones", NAMES[:1])],
)
def test_figures_say_what_is_missing(tables, tmp_path, recursion, backbones, rows, missing):
    given = {"empty": recursion.iloc[:0], "recursion": recursion, "backbones": backbones}
    words = draw(tables, tmp_path, given.get(rows))
    for name in NAMES:
        said = re.search("recursion was not measured|No backbone was measured", words[name])
        assert bool(said) == (name in missing)


def test_figures_are_drawn_from_one_point(tables, tmp_path, recursion, backbones):
    one = pd.concat([recursion.iloc[:1], backbones.iloc[:1]])
    words = draw(tables, tmp_path, one, render=True)
    assert "ρ = undefined" in words["scaling_law_backbones"]
    assert "R²" not in words["scaling_law_recursion"]
