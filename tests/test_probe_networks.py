"""The probes of networks: similarity and spectra, dynamics after training, cost; their figures."""

import json
import math

import numpy as np
import pandas as pd
import pyarrow.parquet as parquet
import pytest
import synthetic
import torch
from miniature import base
from torch import nn

from study.analysis import figures
from study.analysis.figures.representation import ridge
from study.analysis.tables.aggregate import aggregate
from study.analysis.tables.read import Tables
from study.arms import runs
from study.data import Archive
from study.data.convert import convert
from study.network import build_network, networks_of
from study.probes import cost
from study.probes.base import ArmSubject, probe
from study.probes.levels import even_draws
from study.probes.representation import (
    Recorder,
    cka,
    of_image,
    on_grid,
    relative_amplitude,
    ring_power,
)
from study.spec.study import load
from study.training import train

SCALING = "ls"
FAMILIES = {
    "uvit": {"options": {"embed_dim": 32, "depth": 4, "num_heads": 2}},
    "udit": {"preset": "tiny", "options": {"depth": [1, 1, 1, 1, 1], "class_dropout_prob": 0.0}},
    "patch_unet": {"preset": "tiny"},
    "ddpmpp": {"preset": "tiny"},
    "ncsnpp": {"preset": "tiny"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.zip"
    convert({**base()["dataset"], "max_images": 64}, path)
    return path


def spec_of(family: str = "uvit", scaling: str = SCALING, **changes) -> dict:
    content = base()
    content["grid"] = {"backbone": [family], "skip_scaling": [scaling]}
    content["grid"]["target"] = [changes.pop("target", "dsm")]
    content["backbones"] = {family: FAMILIES[family]}
    content["formulation"] = changes.pop("formulation", {"kind": "edm"})
    content["training"] = {"steps": 2, "batch": 8, "lr": 1e-3, "conditional": True, **changes}
    return next(iter(runs(load(content)).values())).spec


def trained(folder, data, spec):
    train(spec, data, folder / "train", folder / "state", threads=1)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """A trained U-ViT with one learned gate, and a stable target."""
    return trained(tmp_path_factory.mktemp("run"), data, spec_of(target="stf(16)"))


def measured(kind, out, data, options, **subject) -> pd.DataFrame:
    path = out / f"{kind}.parquet"
    result = probe(kind, data, path, options, **subject)
    table = parquet.read_table(path).to_pandas()
    assert result["rows"] == len(table)
    return table


# --- similarity ----------------------------------------------------------------------------------


def gram(features: torch.Tensor) -> torch.Tensor:
    return features @ features.T


def features(width: int, count: int = 200, seed: int = 0) -> torch.Tensor:
    return torch.randn(
        count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def test_cka_equals_the_formula_on_features():
    x, y = features(7), features(11, seed=1) + 3
    y[:, :7] += 2 * x
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    cross = torch.linalg.matrix_norm(centred_y.T @ centred_x).square()
    own = torch.linalg.matrix_norm(centred_x.T @ centred_x)
    other = torch.linalg.matrix_norm(centred_y.T @ centred_y)
    found = cka(torch.stack([gram(x), gram(y)]))
    assert found[0, 1].item() == pytest.approx((cross / (own * other)).item(), rel=1e-10)
    assert 0.1 < found[0, 1] < 0.95


def test_cka_ignores_rotations_scale_and_shift_and_nothing_else():
    x = features(12) * torch.arange(1, 13)
    rotation = torch.linalg.qr(features(12, 12, seed=2))[0]
    same = 0.01 * x @ rotation + 5
    stretched = x * torch.tensor([100.0] + [1.0] * 11)
    found = cka(torch.stack([gram(x), gram(same), gram(stretched)]))
    assert found.diagonal().tolist() == pytest.approx([1.0] * 3)
    assert found[0, 1].item() == pytest.approx(1.0)
    assert found[0, 2] < 0.9


def test_cka_of_independent_features_is_near_zero_and_its_bias_can_be_taken_away():
    few = torch.stack([gram(features(3, 2000)), gram(features(3, 2000, seed=1))])
    assert abs(cka(few)[0, 1]) < 0.01
    # Far more features than samples: the plain estimate sees likeness where there is none.
    many = torch.stack([gram(features(1000, 100)), gram(features(1000, 100, seed=1))])
    assert cka(many)[0, 1] > 0.85
    assert abs(cka(many, debiased=True)[0, 1]) < 0.05
    assert cka(many, debiased=True).diagonal().tolist() == pytest.approx([1.0, 1.0])


def test_ridge_is_how_far_joined_blocks_stand_out():
    similar = np.array([[1, 0.5, 0.9], [0.5, 1, 0.3], [0.9, 0.3, 1]])
    assert ridge(similar, [(0, 2)]) == pytest.approx(0.9 - 0.4)
    assert math.isnan(ridge(similar, [(0, 1)]))


# --- spectra -------------------------------------------------------------------------------------


def test_a_wave_has_its_energy_at_its_own_frequency():
    side = 16
    column = torch.arange(side)
    wave = torch.cos(2 * math.pi * 4 * column / side)[None, :].expand(side, side)
    power = ring_power((1 + 3 * wave)[None, None])
    assert len(power) == side // 2 + 1
    # Two of the frequencies of ring 4 hold (3 / 2)^2 of the mean's energy each.
    cycles = torch.fft.fftfreq(side, 1 / side)
    ring = (cycles[:, None] ** 2 + cycles**2).sqrt().round() == 4
    assert (power[4] / power[0]).item() == pytest.approx(2 * 1.5**2 / ring.sum().item(), rel=1e-5)
    others = [power[r].item() for r in range(1, 9) if r != 4]
    assert max(others) < 1e-6 * power[4].item()
    found = dict(relative_amplitude(power, side))
    assert found[0.0] == 0
    expected = 0.5 * math.log10(2 * 1.5**2 / ring.sum().item())
    assert found[0.5] == pytest.approx(expected, abs=1e-5)


def test_a_constant_map_has_frequency_zero_alone_and_white_noise_has_all_alike():
    power = ring_power(torch.full((2, 3, 8, 8), 0.7))
    assert all(value < -6 for frequency, value in relative_amplitude(power, 8) if frequency > 0)
    noise = torch.randn(400, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    values = [value for _, value in relative_amplitude(ring_power(noise), 8)]
    assert values == pytest.approx([0.0] * 5, abs=0.03)


def test_tokens_return_to_their_grid_without_those_of_time_and_label():
    maps = torch.arange(2 * 5 * 9.0).view(2, 5, 3, 3)
    tokens = torch.cat([torch.full((2, 2, 5), -1.0), maps.flatten(2).transpose(1, 2)], dim=1)
    assert torch.equal(on_grid(of_image(tokens, 2)), maps)
    assert of_image(maps, 2) is maps


# --- which blocks the long skips join ------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_long_skip_joins_an_encoder_block_to_a_decoder_block(family, data):
    archive = Archive(data)
    network = build_network(spec_of(family, "none"), archive).eval()
    x, label = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    with torch.no_grad(), Recorder(network) as recorder:
        for _ in range(2):  # a second pass starts anew
            network(x, torch.tensor([1.0, 2.0]), label)
        assert len(recorder.outputs) == len(network.blocks())
    count = len(network.long_skips)
    by_skip = {index: pair for pair, index in recorder.joined.items()}
    assert sorted(by_skip) == list(range(1, count + 1)) and len(recorder.joined) == count
    # The outermost long skip runs from the first block to the last, and inner ones lie within.
    sources, consumers = zip(*(by_skip[index] for index in range(1, count + 1)), strict=True)
    assert list(sources) == sorted(sources) and list(consumers) == sorted(consumers)[::-1]
    assert consumers[0] == len(recorder.names) - 1
    assert all(source < consumer for source, consumer in by_skip.values())
    assert network.long_skips.observer is None


# --- the probes ----------------------------------------------------------------------------------


def test_representation_compares_all_blocks_whatever_the_batch(tmp_path, data, run):
    options = {"samples": 24, "sigmas": [0.5], "similarity_sigmas": [2.0]}
    table = measured("representation", tmp_path, data, {**options, "batch": 24}, run_dir=run)
    mixed = table[(table.quantity == "cka") & table.sigma.isna()]
    assert len(mixed) == 25
    matrix = mixed.pivot(index="position", columns="other_position", values="value").to_numpy()
    assert matrix == pytest.approx(matrix.T) and np.diag(matrix) == pytest.approx(1)
    assert (matrix > 0).all() and (matrix <= 1 + 1e-9).all() and matrix.min() < 0.999
    joined = mixed[mixed.long_skip > 0]
    pairs = set(zip(joined.block, joined.other, joined.long_skip, strict=True))
    assert ("in_blocks.0", "out_blocks.1", 1) in pairs and len(pairs) == 4
    assert len(table[(table.quantity == "cka") & (table.sigma == 2.0)]) == 25
    spectra = table[table.quantity == "spectrum"]
    assert set(spectra.block) == {"input", *mixed.block}
    assert set(spectra[spectra.block == "mid_block"].grid) == {4}
    assert spectra.frequency.between(0, 1).all()
    again = measured("representation", tmp_path, data, {**options, "batch": 7}, run_dir=run)
    assert again.value.to_numpy() == pytest.approx(table.value.to_numpy(), abs=2e-5)


def test_dynamics_has_the_quantities_of_the_training_log(tmp_path, data, run):
    options = {"samples": 24, "sigmas": [0.5, 2.0], "batch": 24}
    logged = parquet.read_table(run / "train/dynamics.parquet").to_pandas()
    table = measured("dynamics", tmp_path, data, options, run_dir=run)
    assert np.isfinite(table.value).all()
    assert set(logged.quantity) - set(table.quantity) == {"lr", "update_ratio"}
    for quantity in ("decoder_norm_after", "grad_norm_block", "gate_mean"):
        assert set(table[table.quantity == quantity]["where"]) == set(
            logged[logged.quantity == quantity]["where"]
        )
    assert table[table.quantity == "loss_by_noise"].samples.sum() == 24
    norms = table[table.quantity == "skip_norm"]
    assert len(norms) == 4 and set(norms.sigma) == {0.5, 2.0}
    blocks = table[table.quantity == "grad_norm_block"]
    whole = table[table.quantity == "grad_norm"].value.item()
    assert math.sqrt((blocks.value**2).sum()) == pytest.approx(whole, rel=1e-5)
    again = measured("dynamics", tmp_path, data, {**options, "batch": 7}, run_dir=run)
    assert again.value.to_numpy() == pytest.approx(table.value.to_numpy(), rel=1e-4)


def test_split_networks_are_measured_part_by_part(tmp_path, data):
    formulation = {"kind": "ddpm", "steps": 50, "splits": [1.0]}
    spec = spec_of("uvit", "none", formulation=formulation)
    folder = trained(tmp_path / "run", data, spec)
    options = {"samples": 8, "sigmas": [0.3, 3.0, 1e9]}  # no part knows the last one
    table = measured("representation", tmp_path, data, options, run_dir=folder)
    assert set(table.part) == {0, 1}
    second = table[table.part == 1]
    assert set(second[second.quantity == "cka"].block.str.startswith("networks.1.")) == {True}
    # Part 0 serves the low noise levels, part 1 the high ones.
    assert set(table[(table.quantity == "spectrum") & (table.part == 0)].sigma) == {0.3}
    assert set(second[second.quantity == "spectrum"].sigma) == {3.0}
    table = measured("dynamics", tmp_path, data, options, run_dir=folder)
    assert set(table[table.quantity == "grad_norm"]["where"]) == {"networks.0", "networks.1"}
    assert set(table[table.quantity == "decoder_norm_after"].sigma) == {0.3, 3.0}
    assert np.isfinite(table.value).all()


def test_even_draws_follow_the_distribution():
    normal = even_draws(1001, "normal")
    assert normal.std().item() == pytest.approx(1, abs=0.01) and abs(normal[500]) < 1e-6
    assert even_draws(4, "uniform").tolist() == [0.125, 0.375, 0.625, 0.875]


# --- cost ----------------------------------------------------------------------------------------


def test_macs_of_linear_convolution_and_attention():
    x = torch.randn(1, 3, 8, 8)
    assert cost.macs(lambda: nn.Linear(5, 7)(torch.randn(2, 5))) == 2 * 5 * 7
    assert cost.macs(lambda: nn.Conv2d(3, 4, 3, padding=1)(x)) == 64 * 4 * 3 * 9
    grouped = nn.Conv2d(3, 3, 5, padding=2, groups=3)
    assert cost.macs(lambda: grouped(x)) == 64 * 3 * 25


def test_macs_of_a_network_contain_its_attention(data):
    spec, archive = spec_of(scaling="none"), Archive(data)
    found = cost.network_macs(ArmSubject(archive, torch.device("cpu"), spec))
    tokens, width, blocks = 18, 32, 5
    by_hand = 16 * 4 * width  # patch embedding
    by_hand += blocks * tokens * (3 + 1 + 8) * width**2  # qkv, projection, MLP
    by_hand += blocks * 2 * tokens**2 * width  # scores and weighted sums
    by_hand += 2 * tokens * 2 * width**2  # two fusions
    by_hand += tokens * width * 4  # to pixels
    by_hand += 64 * 9  # last convolution
    assert found == by_hand


def test_activation_memory_by_hand():
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))

    def saved(count: int) -> int:
        x = torch.randn(count, 4)
        return cost.saved_bytes(lambda: network(x), network.parameters())

    # The input, and the output of the ReLU, which the second layer keeps as well: once.
    assert saved(5) == 5 * (4 + 3) * 4
    with torch.no_grad():
        assert saved(5) == 0


def test_energy_is_what_all_packages_used(tmp_path):
    assert cost._cpu_counter(tmp_path) is None
    for name, used in (("intel-rapl:0", 1_500_000), ("intel-rapl:1", 500_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{used}\n")
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of a package, which counts already
    assert cost._cpu_counter(tmp_path)() == 2.0


@pytest.mark.parametrize("target", ["dsm", "stf(16)"])
def test_cost_has_every_quantity(tmp_path, data, target, monkeypatch):
    monkeypatch.setattr(cost, "energy_counter", lambda device: iter(range(10**6)).__next__)
    monkeypatch.setattr(cost, "ENERGY_SECONDS", 0.01)
    spec = spec_of("ddpmpp", target=target)
    options = {"steps": 1, "evaluation_batch": 4}
    table = measured("cost", tmp_path, data, options, spec=spec).set_index("quantity")
    assert list(table.index) == list(cost.UNITS)
    known = table.value.drop("train_peak_memory")
    assert (known > 0).all()
    network = build_network(spec, Archive(data))
    assert known["parameters"] == sum(p.numel() for p in networks_of(network)[0].parameters())
    assert known["train_throughput"] == pytest.approx(8 / known["train_step"])
    # Twice the channels: more than twice the operations, and more to keep.
    channels = 2 * spec.backbone.options.model_channels
    wider = spec.chosen["backbone"]["options"] | {"model_channels": channels}
    spec = spec.changed(backbone={"options": wider})
    wide = measured("cost", tmp_path, data, options, spec=spec).set_index("quantity").value
    assert wide["macs"] > 2 * known["macs"]
    assert wide["activation_memory"] > 1.5 * known["activation_memory"]


# --- figures -------------------------------------------------------------------------------------

NAMES = ("representation_similarity", "feature_spectra", "block_norms", "compute_cost")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Tables of a made-up study in which one arm diverged."""
    path = synthetic.build(
        tmp_path_factory.mktemp("tree"),
        backbones=("uvit", "ddpmpp"),
        scalings=("none", "ls"),
        seeds=(0,),
        logged=20,
        diverged=(("ddpmpp", "ls", "dsm", 0),),
        missing=(),
    )
    aggregate(path, path.parent, path.parent / "tables")
    return path


def rows_of_probes(manifest) -> dict[str, pd.DataFrame]:
    """What the probes would have found in the runs of a made-up study."""
    similarity, dynamics, costs = [], [], []
    for entry in json.loads(manifest.read_text())["runs"]:
        run, scaling = entry["run"], entry["axes"]["skip_scaling"]
        fixed = {"run": run, "part": 0, "grid": 4.0}
        for i in range(5):
            for j in range(5):
                pair = {"position": i, "other_position": float(j), "long_skip": int(i + j == 4)}
                pair |= {"block": f"b{i}", "other": f"b{j}", "value": 1 - 0.1 * abs(i - j)}
                similarity.append({**fixed, **pair, "quantity": "cka", "sigma": math.nan})
            for sigma in (0.1, 1.0):
                for frequency in (0.0, 0.5, 1.0):
                    point = {"position": i - 1, "frequency": frequency, "sigma": sigma}
                    point |= {"quantity": "spectrum", "value": -frequency * (i + 1)}
                    similarity.append({**fixed, **point})
            place = {"run": run, "quantity": "grad_norm_block", "where": f"b{i}"}
            dynamics.append({**place, "position": i, "sigma": math.nan, "value": 1.0 + i})
            place |= {"quantity": "decoder_norm_after", "where": str(i + 1)}
            dynamics.append({**place, "position": None, "sigma": 0.5, "value": 9.0 - i})
        for quantity, value in (("macs", 2e6), ("train_step", 0.02), ("train_energy", None)):
            value = value and value * (1.1 if scaling == "ls" else 1)
            costs.append({"run": run, "quantity": quantity, "value": value, "batch": 8})
    costs = pd.DataFrame(costs).assign(device="a processor")
    rows = pd.DataFrame(similarity)
    rows["long_skip"] = rows["long_skip"].fillna(0)
    return {"representation": rows, "dynamics": pd.DataFrame(dynamics), "cost": costs}


def with_probes(manifest, probes) -> Tables:
    folder = manifest.parent / "tables"
    for kind, frame in probes.items():
        frame.to_parquet(folder / f"probe_{kind}.parquet")
    return Tables.read(folder, manifest.parent)


def texts(figure) -> str:
    from matplotlib.text import Text

    return " ".join(text.get_text() for text in figure.findobj(Text))


@pytest.mark.parametrize("name", NAMES)
def test_figures_show_every_arm_and_say_what_they_are_made_of(manifest, name):
    figure = figures.FIGURES[name](with_probes(manifest, rows_of_probes(manifest)))
    figure.draw_without_rendering()
    words = texts(figure)
    assert "U-ViT" in words and "DDPM++" in words
    assert "8 of 8 runs" in words
    assert "nan" not in words


def test_similarity_shows_one_matrix_per_arm_and_where_its_long_skips_run(manifest):
    figure = figures.FIGURES["representation_similarity"](
        with_probes(manifest, rows_of_probes(manifest))
    )
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 4
    matrix = shown[0].images[0].get_array()
    assert matrix[1, 3] == pytest.approx(0.8)
    marks = {(x, y) for line in shown[0].lines for x, y in line.get_xydata()}
    assert marks == {(0, 4), (1, 3), (3, 1), (4, 0)}
    # Likeness falls by 0.1 a block, so joined blocks are 0.1 less alike than pairs one closer.
    assert "-0.10" in texts(figure)


def test_cost_is_relative_to_unscaled_long_skips(manifest):
    figure = figures.FIGURES["compute_cost"](with_probes(manifest, rows_of_probes(manifest)))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["multiply-adds", "training step"]  # nothing measured energy
    points = {round(float(line.get_xdata()[0]), 6) for line in figure.axes[0].lines}
    assert {1.0, 1.1} <= points
    assert "2 MMAC" in texts(figure) and "20 ms" in texts(figure)


def test_cost_names_the_arm_that_others_are_relative_to(manifest):
    tables = with_probes(manifest, rows_of_probes(manifest))
    for target, label in (("dsm", "DSM"), ("stf", "STF")):
        some = tables.only(target=target)
        assert len(some.runs)
        said = " ".join(texts(figures.FIGURES["compute_cost"](some)).split())
        assert f"relative to the unscaled {label} arm of the backbone" in said


@pytest.mark.parametrize("name", NAMES)
def test_figures_without_rows_say_so(manifest, name):
    whole = rows_of_probes(manifest)
    bare = {"representation": pd.DataFrame(), "dynamics": pd.DataFrame(), "cost": pd.DataFrame()}
    none = {kind: frame[frame["quantity"] == ""] for kind, frame in whole.items()}
    for probes in (bare, none):
        figure = figures.FIGURES[name](with_probes(manifest, probes))
        assert "of this selection was" in texts(figure)
