"""Probes of the data set: variance of targets, the optimal denoiser, and their figures."""

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import synthetic
import torch
from matplotlib.text import Text
from miniature import base

from study.analysis import figures
from study.analysis.tables.aggregate import aggregate
from study.analysis.tables.read import Tables
from study.data import Archive
from study.data.convert import convert
from study.files import UserError
from study.probes import optimal_denoiser, posterior, target_variance
from study.probes.base import DatasetSubject, probe
from study.probes.posterior import Points
from study.spec.probes import OptimalDenoiser, TargetVariance

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def brute_force(values: torch.Tensor, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Posterior weights [B, M] from the differences themselves."""
    gap = x.double()[:, None] - values.double()[None]
    return (-gap.square().sum(2) / (2 * sigma**2)).softmax(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.zip"
    convert({**base()["dataset"], "max_images": 64}, path)
    return path


@pytest.fixture(scope="module")
def subject(data):
    return DatasetSubject(Archive(data), CPU)


# --- the posterior -------------------------------------------------------------------------------


def test_posterior_matches_brute_force_at_every_noise_level():
    values, noise = normal(14, 6), normal(5, 6, seed=1)
    values[3] = values[2] + 1e-3 * normal(6, seed=2)  # a neighbour within reach of little noise
    own, sigmas = torch.tensor([2, 3, 2, 9, 0]), (1e-3, 0.05, 0.5, 3.0, 1e3)
    found = Points(values).noisy(own, noise).posterior(sigmas)
    points = values.double()
    for level, sigma in enumerate(sigmas):
        x = points[own] + sigma * noise.double()
        weights = brute_force(points, x, sigma)
        mean = weights @ points
        gap = points[None] - mean[:, None]
        variance = (weights[:, :, None] * gap.square()).sum((1, 2))
        torch.testing.assert_close(found.mean[level] + points.mean(0), mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.variance[level], variance, rtol=1e-6, atol=1e-15)
        torch.testing.assert_close(found.own[level], weights[range(5), own], rtol=1e-6, atol=1e-12)
    assert 1e-8 < found.variance[0, 0] < 1e-5  # even the least noise left something undecided


def test_posterior_mean_goes_from_the_image_itself_to_the_mean_of_the_data():
    values = torch.randint(0, 256, (30, 12), generator=torch.Generator().manual_seed(0))
    points = Points(values.to(torch.uint8))
    own = torch.arange(4)
    near, far = points.noisy(own, normal(4, 12)).posterior((1e-3, 1e6)).mean + points.centre
    images = values.double() / 127.5 - 1
    torch.testing.assert_close(near, images[:4], rtol=0, atol=1e-14)
    torch.testing.assert_close(far, images.mean(0).expand(4, -1), rtol=0, atol=1e-4)


def test_neither_parts_nor_groups_change_results(monkeypatch):
    values, noise, own = normal(40, 7), normal(30, 7, seed=1), torch.arange(30)
    arguments = (own, noise, (0.3, 1.0, 5.0), [1, 4, 12], 5, ("test",))
    whole = target_variance.variances(Points(values), *arguments)
    monkeypatch.setattr(posterior, "NUMBERS", 200)  # five noisy points at once, in groups of four
    monkeypatch.setattr(target_variance, "NUMBERS", 40)  # six references at once
    points = Points(values, chunk=11)
    assert points.at_once(3) == 5
    for one, other in zip(whole, target_variance.variances(points, *arguments), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_points_are_all_images_or_some_of_them(subject):
    points = Points.of(subject.archive, CPU)
    images, _ = subject.archive.batch(range(64))
    assert points.values.dtype == torch.uint8
    rows = points.rows(torch.arange(64)) + points.centre
    torch.testing.assert_close(rows.float(), images.flatten(1), rtol=0, atol=1e-6)
    some = Points.of(subject.archive, CPU, count=5)
    assert len(some) == 5
    assert {tuple(row) for row in some.values.tolist()} < {tuple(r) for r in points.values.tolist()}
    assert len(Points.of(subject.archive, CPU, count=1000)) == 64


# --- variance of targets -------------------------------------------------------------------------


def enumerated(values: torch.Tensor, x: torch.Tensor, sigma: float, n: int) -> tuple[float, float]:
    """Variance and squared bias of the stable target of x [D], over every possible reference."""
    values = values.double()
    source = brute_force(values, x[None], sigma)[0]
    chance, targets = [], []
    for chosen in itertools.product(range(len(values)), repeat=n):
        reference = values[list(chosen)]
        chance.append(source[chosen[0]] / len(values) ** (n - 1))
        targets.append(brute_force(reference, x[None], sigma)[0] @ reference)
    chance, targets = torch.stack(chance), torch.stack(targets)
    mean = chance @ targets
    variance = chance @ (targets - mean).square().sum(1)
    return variance.item(), (mean - source @ values).square().sum().item()


def test_stable_target_has_the_variance_of_all_references_and_no_bias():
    values, sigma, sizes = normal(5, 2), 0.8, [1, 2, 3]
    own, noise = torch.tensor([0, 2, 4]), normal(3, 2, seed=4)
    points, draws = Points(values), 1500
    dsm, stf, bias = target_variance.variances(points, own, noise, [sigma], sizes, draws, ("test",))
    for row in range(3):
        x = values[own[row]].double() + sigma * noise[row].double()
        exact = [enumerated(values, x, sigma, n) for n in sizes]
        variances, biases = zip(*exact, strict=True)
        assert max(biases) < 1e-28  # at every n, not only in the limit
        assert variances[0] == pytest.approx(dsm[0, row].item(), rel=1e-9)
        assert variances[0] > 1.1 * variances[1] > 1.1 * variances[2]
        assert stf[0, :, row].tolist() == pytest.approx(variances, rel=0.08)
        assert bias[0, :, row].abs().max() < 5e-3 * variances[0]


def test_a_bias_is_noticed_where_there_is_one(monkeypatch):
    values, noise, own = normal(30, 3), normal(50, 3, seed=1), torch.arange(50) % 30
    arguments = (Points(values), own, noise, [1.0], [2, 8], 16, ("test",))
    dsm, _, right = target_variance.variances(*arguments)
    # References whose source is always the point that was noised, or always the first point.
    first = lambda self, sigma, uniform: torch.zeros_like(uniform, dtype=torch.int64)  # noqa: E731
    monkeypatch.setattr(posterior.Noisy, "sources", first)
    wrong = target_variance.variances(*arguments)[2]
    assert (right.mean(2).abs() < 0.05 * dsm.mean()).all()
    assert (wrong.mean(2) > 0.1 * dsm.mean()).all()


def test_toy_has_the_published_ratios_and_units():
    points = Points(target_variance.two_modes())
    own, noise = torch.arange(400), normal(400, 64)
    sigmas, sizes = (0.1, 0.3, 1.0, 4.0, 8.0, 50.0), [1, 4, 64, 512]
    found = target_variance.variances(points, own, noise, sigmas, sizes, 16, ("toy",))
    dsm, stf, bias = (values.mean(-1) for values in found)
    score = dsm / torch.tensor(sigmas) ** 4
    assert score[:3].tolist() == pytest.approx([574, 19, 0.17], rel=0.1)
    assert dsm[3] / 4**2 == pytest.approx(0.46, rel=0.15)  # the bump between the modes
    assert dsm.diff().min() > 0
    ratio = stf / dsm[:, None]
    assert ratio[:, 0].tolist() == pytest.approx([1] * 6, abs=0.05)
    assert ratio[0, 1:].tolist() == pytest.approx([0.97, 0.81, 0.42], abs=0.05)
    assert ratio[1, 1:].tolist() == pytest.approx([0.69, 0.12, 0.02], rel=0.1)
    for level in ratio[3:]:
        assert 0.2 < level[1] < 0.28
        assert 0.01 < level[2] < 0.018
        assert 0.001 < level[3] < 0.0025
    assert (ratio.diff(dim=1) < 0).all()
    assert bias.abs().max() < 0.01 * dsm.max()
    assert (bias.abs() < 0.01 * dsm[:, None]).all()


def test_rows_have_three_units_and_references_within_the_data_set(subject):
    options = TargetVariance(
        sigma=(2.0, 0.001), reference=(512, 4), points=50, draws=4, toy=False, seed=3
    )
    measured = target_variance.measure(subject, options)
    rows = pd.DataFrame(dict(measured.columns))
    assert set(rows["distribution"]) == {"digits"}
    assert sorted(set(rows["reference"])) == [0, 4, 64]
    assert len(rows) == 2 * 3 * 3
    at = rows.set_index(["sigma", "reference", "unit"])
    for column in ("variance", "standard_error", "squared_bias", "bias_standard_error"):
        for n in (0, 4, 64):
            x0 = at.loc[(2.0, n, "x0"), column]
            assert at.loc[(2.0, n, "noise"), column] == pytest.approx(x0 / 4)
            assert at.loc[(2.0, n, "score"), column] == pytest.approx(x0 / 16)
    dsm = at.loc[(2.0, 0, "x0")]
    assert (dsm["ratio"], dsm["draws"], dsm["points"], dsm["squared_bias"]) == (1, 0, 50, 0)
    assert 0.005 < dsm["standard_error"] / dsm["variance"] < 0.2
    stable = at.loc[(2.0, 64, "x0")]
    assert stable["ratio"] == pytest.approx(stable["variance"] / dsm["variance"])
    # Next to no noise: the target is the image itself, and shares of nothing are not given.
    silent = rows[rows["sigma"] == 0.001]
    assert (silent["variance"] < 1e-12).all()
    assert silent["ratio"].isna().all()
    again = target_variance.measure(subject, options)
    assert again.columns == measured.columns
    other = target_variance.measure(subject, options.model_copy(update={"seed": 4}))
    assert other.columns["variance"] != measured.columns["variance"]


def test_standard_errors_count_blocks_not_points():
    blocks = normal(25).double()
    within = blocks.repeat_interleave(4)  # 100 values, four to a block, all alike
    expected = blocks.std() / math.sqrt(25)
    assert target_variance.standard_error(within) == pytest.approx(expected.item())
    assert target_variance.standard_error(torch.ones(1)) is None


# --- the optimal denoiser ------------------------------------------------------------------------


def wave(cycles: int, along: int, side: int = 16, channels: int = 3) -> torch.Tensor:
    phase = 2 * math.pi * cycles * torch.arange(side, dtype=torch.float64) / side
    row = phase.cos().expand(side, side)
    return (row if along else row.T).expand(1, channels, side, side) + 0.3


@pytest.mark.parametrize("along", [0, 1])
def test_energy_of_a_wave_is_above_the_limits_below_its_frequency(along):
    # 16 pixels: Nyquist is 8 cycles, so patches of 2, 4, 8 represent up to 4, 2, 1 cycles.
    for cycles, above in {1: (0, 0, 0), 2: (0, 0, 1), 4: (0, 1, 1), 5: (1, 1, 1)}.items():
        image = wave(cycles, along)
        total, *bands = optimal_denoiser.energies(image, [2, 4, 8])[0].tolist()
        size = 3 * 16**2 / 2  # Parseval: a cosine of amplitude one, three channels
        assert total == pytest.approx(size * 16**2)
        assert [band / total for band in bands] == pytest.approx(above, abs=1e-12)
    mixed = wave(1, along) + 0.5 * wave(6, 1 - along)
    total, *bands = optimal_denoiser.energies(mixed, [2, 4, 8])[0].tolist()
    assert [band / total for band in bands] == pytest.approx([0.2, 0.2, 0.2])
    flat = optimal_denoiser.energies(torch.full((1, 1, 8, 8), 0.7, dtype=torch.float64), [2])
    assert flat.max() < 1e-25


def test_predictions_go_from_the_mean_of_the_data_to_the_image(subject):
    options = OptimalDenoiser(snr=(1e6, 1.0, 1e-8), samples=20, shown=2, patch=(4, 2, 16))
    measured = optimal_denoiser.measure(subject, options)
    rows = pd.DataFrame(dict(measured.columns))
    energy = rows[rows["quantity"] == "energy_above"].set_index(["snr", "patch"])
    assert set(energy.index.get_level_values("patch")) == {2, 4}  # 16 is beyond 8 x 8 pixels
    for patch in (2, 4):
        low, middle, high = (energy.loc[(snr, patch)] for snr in (1e-8, 1.0, 1e6))
        assert high["value"] == pytest.approx(1)
        assert high["standard_error"] < 1e-9
        assert high["share"] == pytest.approx(high["share_of_original"])
        assert 0 < low["value"] < middle["value"] < 1
        assert 0 < low["share"] < 1
        assert middle["standard_error"] > 1e-3
    own = rows[rows["quantity"] == "own_weight"].set_index("snr")["value"]
    assert own[1e6] == pytest.approx(1)
    assert own[1e-8] == pytest.approx(1 / 64, rel=1e-2)
    pictures = rows[rows["quantity"] == "image"].set_index(["snr", "sample"])["pixels"]
    stored = subject.archive.images()
    mean = ((stored.mean(0) / 127.5 - 1 + 1) * 127.5).round().astype(int).flatten().tolist()
    known = {tuple(image.flatten().tolist()) for image in stored}
    assert len(pictures) == 2 * 4
    for sample in (0, 1):
        original = pictures[math.inf, sample]
        assert tuple(original) in known
        assert pictures[1e6, sample] == original
        assert np.abs(np.subtract(pictures[1e-8, sample], mean)).max() <= 1
    assert pictures[1.0, 0] != pictures[1.0, 1]
    assert optimal_denoiser.measure(subject, options).columns == measured.columns


def test_groups_of_samples_change_nothing(subject, monkeypatch):
    options = OptimalDenoiser(snr=(0.1, 3.0), samples=9, shown=7)
    whole = pd.DataFrame(dict(optimal_denoiser.measure(subject, options).columns))
    monkeypatch.setattr(posterior, "NUMBERS", 64 * 4)  # four, then two samples at once
    parts = pd.DataFrame(dict(optimal_denoiser.measure(subject, options).columns))
    assert parts["pixels"].equals(whole["pixels"])
    numbers = ["value", "standard_error", "share", "share_of_original", "sample"]
    pd.testing.assert_frame_equal(parts[numbers], whole[numbers], rtol=1e-9)


def test_latents_have_energies_but_no_pictures(tmp_path):
    for index in range(12):
        path = tmp_path / "latents" / "00000" / f"img{index:08d}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, normal(4, 8, 8, seed=index).numpy())
    latents = DatasetSubject(Archive(tmp_path / "latents"), CPU)
    options = OptimalDenoiser(snr=(1e-6, 1e6), samples=12, patch=(2,))
    rows = pd.DataFrame(dict(optimal_denoiser.measure(latents, options).columns))
    assert set(rows["quantity"]) == {"own_weight", "energy_above"}
    value = rows[rows["quantity"] == "energy_above"].set_index("snr")["value"]
    assert value[1e6] == pytest.approx(1)
    assert value[1e-6] == pytest.approx(1 / 12, rel=0.3)  # the mean of twelve white images
    options = TargetVariance(sigma=(1e3,), reference=(3,), points=24, draws=8, toy=False)
    row = pd.DataFrame(dict(target_variance.measure(latents, options).columns)).iloc[0]
    # Independent values of variance one; less that of the mean of twelve.
    assert row["variance"] == pytest.approx(256 * 11 / 12, rel=0.1)


def test_large_images_are_kept_small():
    image = torch.linspace(-1, 1, 3 * 128 * 128).reshape(3, 128, 128)
    picture = optimal_denoiser._picture(image)
    assert (picture["side"], picture["channels"]) == (64, 3)
    assert len(picture["pixels"]) == 64 * 64 * 3
    assert picture["pixels"][0] == 0
    assert picture["pixels"][-1] == 255
    assert picture["pixels"][1] == pytest.approx(85, abs=1)  # the second channel's first value


def test_both_write_a_table_and_its_facts(data, tmp_path):
    small = {"sigma": [1.0, 5.0], "reference": [2, 8], "points": 25, "draws": 2}
    for kind, options in {
        "target_variance": small,
        "optimal_denoiser": {"snr": [0.1, 1.0], "samples": 8, "shown": 1},
    }.items():
        said = probe(kind, data, tmp_path / f"{kind}.parquet", options)
        rows = pd.read_parquet(tmp_path / f"{kind}.parquet")
        assert said["status"] == "done"
        assert said["rows"] == len(rows) > 0
    facts = probe("target_variance", data, tmp_path / "a.parquet", small)["facts"]
    assert facts["sizes"] == {"digits": 64, "two modes": 2048}
    with pytest.raises(UserError, match="sigma"):
        probe("target_variance", data, tmp_path / "b.parquet", {"sigma": [0.0]})


# --- figures -------------------------------------------------------------------------------------


FIGURES = ("target_variance", "stable_target_bias", "optimal_denoiser", "spectral_energy")


@pytest.fixture(scope="module")
def tables(tmp_path_factory, subject) -> Tables:
    root = tmp_path_factory.mktemp("tree")
    axes = {"backbones": ("uvit",), "scalings": ("none",), "targets": ("dsm",), "seeds": (0,)}
    manifest = synthetic.build(root, **axes, logged=10, images=4, diverged=(), missing=())
    aggregate(manifest, manifest.parent, manifest.parent / "tables")
    variance = TargetVariance(sigma=(0.01, 2.0, 5.0), reference=(2, 16), points=50, draws=4)
    optimal = OptimalDenoiser(snr=(0.1, 1.0, 10.0), samples=16, shown=2)
    probes = {
        "target_variance": target_variance.measure(subject, variance),
        "optimal_denoiser": optimal_denoiser.measure(subject, optimal),
    }
    probes = {kind: pd.DataFrame(dict(found.columns)) for kind, found in probes.items()}
    read = Tables.read(manifest.parent / "tables", manifest.parent)
    return dataclasses.replace(read, probes=probes)


def words(figure) -> str:
    found = "\n".join(artist.get_text() for artist in figure.findobj(Text))
    return " ".join(found.split())


def test_figures_show_every_distribution_level_and_patch(tables):
    said = {name: words(figures.FIGURES[name](tables)) for name in FIGURES}
    for name in ("target_variance", "stable_target_bias"):
        assert "digits: " in said[name]
        assert "two modes: " in said[name]
        assert "mean over 50 noisy points" in said[name]
    assert "STF, n = 2 STF, n = 16" in said["target_variance"]
    # 8 = two distributions, two of three noise levels, two sizes: at 0.01 nothing is undecided.
    assert "V_STF is below V_DSM at 8 of 8" in said["target_variance"]
    assert "σ = 2 " in said["stable_target_bias"]
    assert "σ = 0.01" not in said["stable_target_bias"]
    assert "original" in said["optimal_denoiser"]
    assert "P = 2 P = 4 P = 8" in said["spectral_energy"]
    assert "means over 16 samples" in said["spectral_energy"]
    assert all("1 of 1 runs" in text for text in said.values())


def test_figures_say_so_where_there_is_nothing_to_draw(tables):
    names = {"target_variance": "target_variance", "stable_target_bias": "target_variance"}
    names |= {"optimal_denoiser": "optimal_denoiser", "spectral_energy": "optimal_denoiser"}
    for name, kind in names.items():
        for rows in (pd.DataFrame(), tables.probes[kind].head(0)):
            empty = dataclasses.replace(tables, probes={kind: rows})
            text = words(figures.FIGURES[name](empty))
            assert f"The probe {kind} has no" in text
            assert "1 of 1 runs" in text
    rows = tables.probes["target_variance"]
    silent = dataclasses.replace(
        tables, probes={"target_variance": rows[rows["sigma"] == 0.01].assign(variance=0.0)}
    )
    assert "next to nothing" in words(figures.FIGURES["target_variance"](silent))
    assert "next to nothing" in words(figures.FIGURES["stable_target_bias"](silent))


def test_pictures_are_those_of_the_probe_in_colour_too(tables):
    green = [0, 255, 0] * 4
    rows = tables.probes["optimal_denoiser"].head(1).assign(quantity="image")
    rows = rows.assign(pixels=[green], side=2, channels=3, sample=0, snr=math.inf)
    drawn = figures.FIGURES["optimal_denoiser"](
        dataclasses.replace(tables, probes={"optimal_denoiser": rows})
    )
    shown = drawn.axes[0].images[0].get_array()
    assert shown.shape == (2, 2, 3)
    assert (shown == [0, 255, 0]).all()


def test_figures_are_the_same_bytes_twice(tables, tmp_path):
    for folder in ("a", "b"):
        figure = figures.FIGURES["stable_target_bias"](tables)
        figures.style.save(figure, tmp_path / folder / "figure", ("svg",))
    first, second = (tmp_path / folder / "figure.svg" for folder in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
