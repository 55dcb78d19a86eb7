"""Robustness and the stability frontier: known gains, shared perturbations, real divergence."""

import math
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import synthetic
import torch
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from miniature import base
from torch import nn

from study.analysis import figures
from study.analysis.figures.rates import largest_rates
from study.analysis.tables.aggregate import aggregate
from study.analysis.tables.read import Tables
from study.arms import runs
from study.data import Archive
from study.data.convert import convert
from study.files import UserError
from study.network import SplitNetwork
from study.probes import robustness, stability_frontier
from study.probes.base import ArmSubject, RunSubject, probe
from study.spec.explain import check
from study.spec.probes import Robustness, StabilityFrontier
from study.spec.run import Identity
from study.spec.study import load
from study.training import Interrupted, train
from study.training.dynamics import Table

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits.zip"
    convert({**base()["dataset"], "max_images": 64}, path)
    return path


def spec(scaling: str = "none", seed: int = 0, formulation: str | dict = "edm", **training) -> dict:
    content = base()
    content["grid"] = {"backbone": ["uvit"], "skip_scaling": [scaling], "seed": [seed]}
    content["backbones"] = {"uvit": {"options": {"embed_dim": 16, "depth": 4, "num_heads": 2}}}
    content["training"] = {"steps": 6, "batch": 8, "lr": 1e-3, "warmup": 2, **training}
    content["formulation"] = formulation
    return next(iter(runs(load(content)).values())).spec


# --- robustness ----------------------------------------------------------------------------------


class Linear(nn.Module):
    """F(x) = factor x, and what it was given; ``more`` further output channels of no use."""

    num_classes = 0

    def __init__(self, factor: float, more: bool = False) -> None:
        super().__init__()
        self.factor, self.more, self.inputs = factor, more, []

    def forward(self, x, noise, label=None):
        self.inputs.append(x.clone())
        useless = [1000 * x] if self.more else []
        return torch.cat([self.factor * x, *useless], 1)


class Times(nn.Module):
    """Another network's output times a factor."""

    num_classes = 0

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = network, factor

    def forward(self, x, noise, label=None):
        return self.factor * self.inner(x, noise, label)


@dataclass(frozen=True)
class Having(RunSubject):
    """A run whose trained network is given."""

    network_: nn.Module = None

    def network(self, checkpointing=False, weights="ema"):
        return self.network_


def subject(data: Path, network: nn.Module, the_spec: dict) -> Having:
    archive = Archive(data)
    return Having(archive, torch.device("cpu"), the_spec, Path(), {}, network_=network)


def gains(data: Path, network: nn.Module, the_spec: dict | None = None, **options) -> pd.DataFrame:
    options = Robustness(**{"samples": 6, "sigmas": (0.1, 1.0, 10.0), **options})
    measured = robustness.measure(subject(data, network, the_spec or spec()), options)
    return pd.DataFrame(dict(measured.columns))


def random_network(seed: int = 0) -> nn.Module:
    """A small network that is not linear and uses its noise number."""

    class Net(nn.Module):
        num_classes = 0

        def __init__(self):
            super().__init__()
            torch.manual_seed(seed)
            self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)

        def forward(self, x, noise, label=None):
            return self.last(torch.tanh(self.first(x) + noise[:, None, None, None]))

    return Net()


@pytest.mark.parametrize("factor", [0.25, -3.0])
def test_a_linear_network_has_its_known_gain_at_every_size(data, factor):
    table = gains(data, Linear(factor))
    raw = table[table["space"] == "network"]
    assert len(raw) == 9
    assert raw["gain"].to_numpy() == pytest.approx(abs(factor), rel=1e-4)
    assert raw["standard_error"].max() < 1e-4
    data_sd = spec().formulation.sigma_data
    for row in table[table["space"] == "noise"].itertuples():
        s = row.sigma
        total = s**2 + data_sd**2
        slope = data_sd**2 / total + s * data_sd / total * factor  # of D, which is linear too
        expected = abs(1 - slope) / s * math.sqrt(1 + s**2)
        assert row.gain == pytest.approx(expected, rel=1e-3), row


def test_scaling_the_output_scales_the_gain(data):
    network = random_network()
    one, three = gains(data, network), gains(data, Times(network, 3.0))
    raw = one["space"] == "network"
    assert (one[raw]["gain"] > 0.01).all()
    assert three[raw]["gain"].to_numpy() == pytest.approx(3 * one[raw]["gain"].to_numpy(), rel=1e-4)
    assert (three[~raw]["gain"] != one[~raw]["gain"]).all()


def test_runs_share_images_noise_and_directions(data):
    first, second = Linear(1.0), Linear(-2.0)
    gains(data, first, spec("none", 0))
    gains(data, second, spec("ls", 1))
    assert len(first.inputs) == len(second.inputs) > 0
    # Perturbations in network space, and of the noise that a network sees, are the network's input.
    assert all(torch.equal(a, b) for a, b in zip(first.inputs, second.inputs, strict=True))
    base_input, perturbed = first.inputs[0], first.inputs[2]
    size = torch.linalg.vector_norm((perturbed - base_input).flatten(1), dim=1)
    norm = torch.linalg.vector_norm(base_input.flatten(1), dim=1)
    assert (size / norm).tolist() == pytest.approx([1e-3] * 6, rel=1e-3)


def test_batch_size_changes_nothing_and_more_samples_do(data):
    network = random_network()
    whole = gains(data, network, batch=64)
    pd.testing.assert_frame_equal(whole, gains(data, network, batch=2), rtol=1e-5)
    assert not whole["gain"].equals(gains(data, network, samples=5)["gain"])


def test_numbers_are_single_precision_whatever_the_training_was(data):
    network = random_network()
    full, half = gains(data, network), gains(data, network, spec(precision="bf16"))
    pd.testing.assert_frame_equal(full, half)


def test_split_networks_are_asked_for_their_part_without_their_variance(data):
    kind = {"kind": "ddpm", "splits": [0.25], "prediction": "eps", "variance": "learned"}
    network = SplitNetwork([Linear(0.5, more=True), Linear(4.0, more=True)])
    table = gains(data, network, spec(formulation=kind), sigmas=(0.5, 10.0))
    # The network predicts the noise itself: both spaces agree. The split is at sigma = 2.
    low, high = (table[table["sigma"] == sigma]["gain"].tolist() for sigma in (0.5, 10.0))
    assert low == pytest.approx([0.5] * 6, rel=2e-3)
    assert high == pytest.approx([4.0] * 6, rel=2e-3)


def test_levels_that_the_formulation_lacks_are_left_out(data):
    options = Robustness(samples=2, sigmas=(0.01, 1.0, 1000.0))
    measured = robustness.measure(subject(data, Linear(1.0), spec(formulation="ve")), options)
    assert set(measured.columns["sigma"]) == {1.0}
    assert measured.facts["left_out"] == [0.01, 1000.0]


def test_a_trained_run_is_probed_from_its_folder(tmp_path, data):
    the_spec = spec("cs(0.5)", steps=2)
    train(the_spec, data, tmp_path / "run/train", tmp_path / "run/state", threads=1)
    out, options = tmp_path / "run/probes/robustness.parquet", {"samples": 4, "sigmas": [0.5]}
    result = probe("robustness", data, out, options, run_dir=tmp_path / "run")
    table = pd.read_parquet(out)
    assert result["rows"] == len(table) == 6
    assert list(table) == ["sigma", "relative", "space", "gain", "standard_error", "samples"]
    assert (table["gain"] > 0).all()
    raw = probe("robustness", data, out, {**options, "weights": "raw"}, run_dir=tmp_path / "run")
    assert raw["facts"]["weights"] == "raw"
    assert not pd.read_parquet(out)["gain"].equals(table["gain"])


# --- stability frontier --------------------------------------------------------------------------


@pytest.fixture
def scan(data, tmp_path, monkeypatch):
    """Scan with these options; what is left in the folder for temporary files must be nothing."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))

    def run(the_spec: dict | None = None, **options):
        arm = ArmSubject(Archive(data), torch.device("cpu"), the_spec or spec())
        before = [signal.getsignal(number) for number in SIGNALS]
        try:
            measured = stability_frontier.measure(arm, StabilityFrontier(**options))
        finally:
            assert [signal.getsignal(number) for number in SIGNALS] == before
            assert list(folder.iterdir()) == []
        return measured

    return run


def test_a_huge_rate_diverges_a_small_one_trains_and_the_scan_stops(scan, capsys):
    measured = scan(lr=(1e-2, 1e3, 2e3), steps=40, warmup=1)
    table = pd.DataFrame(dict(measured.columns))
    assert table["lr"].tolist() == [1e-2, 1e3]
    assert table["outcome"].tolist() == ["trained", "diverged"]
    assert table["step"][0] == 40
    assert table["step"][1] < 40
    assert (table["steps"] == 40).all()
    assert table["reason"][0] == ""
    assert table["reason"][1] in ("loss spike", "non-finite loss", "non-finite gradient")
    assert table["final_loss"][0] < 0.85 * table["first_loss"][0]
    # The same seeds: the first step comes before any update.
    assert table["first_loss"][0] == table["first_loss"][1]
    assert measured.facts["not_tried"] == [2e3]
    said = capsys.readouterr()
    assert said.out == ""
    assert "learning rates" in said.err
    assert "train:" not in said.err


def fake(monkeypatch, losses: dict[float, list[float]], diverged: tuple[float, ...] = ()) -> list:
    """Let a trainer pretend that made these losses by learning rate; returns the specs it gets."""
    seen = []

    def pretend(the_spec, data, out, state, **options):
        lr = the_spec.training.lr
        seen.append(the_spec)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("done")
        table = Table()
        for step, loss in enumerate(losses[lr]):
            table.add(step, "loss", loss)
        table.write(Path(out) / "dynamics.parquet")
        lost = lr in diverged
        return {
            "status": "diverged" if lost else "done",
            "reason": "loss spike" if lost else None,
            "step": 3,
            "steps": the_spec.training.steps,
            "final_loss": None if lost else losses[lr][-1],
        }

    monkeypatch.setattr(stability_frontier, "train", pretend)
    return seen


def test_the_arms_own_settings_and_seeds_but_rate_steps_and_warmup(scan, monkeypatch):
    seen = fake(monkeypatch, {0.5: [1.0, 0.1]})
    own = spec(seed=3, steps=100, warmup=100, clip=1.0, optimizer="adamw")
    measured = scan(own, lr=(0.5,), steps=12, warmup=4)
    changed = {"lr": 0.5, "steps": 12, "warmup": 4}
    assert seen == [own.changed(training=changed)]
    assert measured.facts["warmup"] == 4
    scan(spec(warmup=2), lr=(0.5,), warmup=4)
    assert seen[1].training.warmup == 2


def test_outcomes_follow_the_losses_and_beyond_goes_on(scan, monkeypatch):
    flat, falling, nothing = [1.0, 0.95, 0.9], [1.0, 0.9, 0.5], [math.nan]
    made = {0.1: falling, 0.2: flat, 0.3: nothing, 0.4: falling, 0.5: falling}
    fake(monkeypatch, made, diverged=(0.3, 0.5))
    rates = (0.1, 0.2, 0.3, 0.4, 0.5)
    assert scan(lr=rates).columns["outcome"] == ["trained", "stalled", "diverged"]
    measured = scan(lr=rates, beyond=1)
    outcomes = ["trained", "stalled", "diverged", "trained", "diverged"]
    assert measured.columns["outcome"] == outcomes
    assert measured.columns["first_loss"][2] is None
    assert measured.columns["final_loss"][2] is None
    assert scan(lr=(0.2,), below=0.95).columns["outcome"] == ["trained"]


def test_every_network_of_a_split_run_has_to_train(scan, monkeypatch):
    kind = {"kind": "ddpm", "splits": [0.25]}
    models = [
        {"split": 1, "lr": 1e-3, "steps": 7},
        {"split": 0, "start": 1, "steps": 60, "warmup": 50},
    ]
    good, bad = [1.0, 0.8, 0.5, 0.4], [2.0, 1.9, 1.9, 1.9]
    seen = fake(monkeypatch, {0.1: good + good, 0.2: good + bad})
    measured = scan(spec(formulation=kind, models=models), lr=(0.1, 0.2), steps=4, warmup=2)
    assert measured.columns["outcome"] == ["trained", "stalled"]
    assert measured.columns["first_loss"] == [1.0, 2.0]
    short = [[m.split, m.start, m.lr, m.steps] for m in seen[0].training.models]
    assert short == [[1, None, None, None], [0, 1, None, None]]


def test_an_interrupted_scan_says_so(scan, monkeypatch):
    def stop(*arguments, **options):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise Interrupted("stopped by SIGTERM at step 3 of 60; the same command resumes")

    monkeypatch.setattr(stability_frontier, "train", stop)
    with pytest.raises(Interrupted, match=r"learning rate 0\.001; the same command starts"):
        scan()


def test_imported_weights_have_no_frontier(scan):
    measured = scan(spec().model_copy(update={"checkpoint": Identity(name="ab")}))
    assert measured.columns == {}


def test_rates_have_to_rise():
    with pytest.raises(UserError, match="rise"):
        check(StabilityFrontier, {"lr": [0.1, 0.1]}, "probes.")


# --- figures -------------------------------------------------------------------------------------


def test_the_largest_rate_needs_those_below_it():
    outcomes = {
        "b": ["trained", "trained", "diverged"],
        "a": ["trained", "stalled", "trained"],
        "slow": ["stalled", "trained", "diverged"],
        "none": ["diverged", "trained", "trained"],
        "all": ["trained"] * 3,
    }
    rows = [
        {"run": run, "lr": lr, "outcome": outcome}
        for run, values in outcomes.items()
        for lr, outcome in reversed(list(zip((0.1, 0.2, 0.4), values, strict=True)))
    ]
    found = largest_rates(pd.DataFrame(rows))
    assert found.index.name == "run"
    assert found.dropna().to_dict() == {"a": 0.1, "all": 0.4, "b": 0.2, "slow": 0.2}
    assert found.index.tolist() == ["a", "all", "b", "none", "slow"]
    assert largest_rates(pd.DataFrame()).empty


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tables of a small study with two seeds, without probes."""
    root = tmp_path_factory.mktemp("tree")
    manifest = synthetic.build(
        root,
        backbones=("uvit", "udit"),
        scalings=("none", "cs(0.7)"),
        logged=10,
        images=1,
        diverged=(),
        missing=(),
    )
    aggregate(manifest, manifest.parent, manifest.parent / "tables")
    return manifest.parent / "tables"


def with_rows(folder: Path, kind: str, rows: list[dict]) -> Tables:
    for old in folder.glob("probe_*"):
        old.unlink()
    pd.DataFrame(rows).to_parquet(folder / f"probe_{kind}.parquet")
    return Tables.read(folder)


def made_gains(folder: Path, gain: float | None = 2.0) -> list[dict]:
    return [
        {
            "run": run,
            "sigma": sigma,
            "relative": relative,
            "space": space,
            "gain": gain if gain is None else gain / sigma + number / 10,
            "standard_error": 0.01,
            "samples": 256,
        }
        for number, run in enumerate(Tables.read(folder).runs["run"])
        for sigma in (0.1, 1.0, 10.0)
        for relative in (1e-3, 1e-1)
        for space in ("noise", "network")
    ]


def texts(fig) -> str:
    return " ".join(found.get_text() for found in fig.findobj(Text))


@pytest.mark.parametrize("name", ["robustness", "robustness_by_size"])
def test_gains_are_drawn_per_backbone_and_space(folder, name):
    fig = figures.FIGURES[name](with_rows(folder, "robustness", made_gains(folder)))
    drawn = [axes for axes in fig.axes if axes.lines]
    # Two scalings and two targets, each with the range of its two seeds.
    gains = [axes for axes in drawn if len(axes.lines) == len(axes.collections) == 4]
    assert len(gains) == 4
    # The scaled runs beside the unscaled ones, and the line at 1.
    ratios = [axes for axes in drawn if len(axes.lines) == 3 and len(axes.collections) == 2]
    assert len(ratios) == (2 if name == "robustness" else 0)
    assert len(drawn) == len(gains) + len(ratios)
    said = texts(fig).replace("\n", " ")
    assert "n = 2 seeds per arm (seeds 0, 1)" in said
    assert "256 noisy images" in said
    assert ("0.001 of the input's norm" if name == "robustness" else "σ = 1.") in said


def test_frontier_shows_the_largest_rate_and_who_diverged(folder, tmp_path):
    rows = []
    for run, seed in Tables.read(folder).runs[["run", "seed"]].itertuples(index=False):
        ends = ["trained", "trained", "diverged"] if str(seed) == "0" else ["trained", "diverged"]
        for lr, outcome in zip((0.01, 0.1, 1.0), ends, strict=False):
            rows.append({"run": run, "lr": lr, "outcome": outcome, "steps": 60})
    tables = with_rows(folder, "stability_frontier", rows)
    fig = figures.FIGURES["stability_frontier"](tables)
    left, right = fig.axes[:2]
    arms = 4
    assert [bar.get_width() + bar.get_x() for bar in left.patches] == pytest.approx(
        [math.sqrt(0.01 * 0.1)] * arms
    )
    cells = [found.get_text() for found in right.texts]
    assert cells == ["0/2", "1/2", "1/1"] * arms
    assert not [patch for patch in right.patches if patch.get_hatch()]
    short = [row for row in rows if row["lr"] < 1]
    again = [*short, {**rows[0], "lr": 1.0, "outcome": "stalled"}]
    fig = figures.FIGURES["stability_frontier"](with_rows(folder, "stability_frontier", again))
    hatched = [
        patch
        for axes in fig.axes
        for patch in axes.patches
        if isinstance(patch, Rectangle) and patch.get_hatch()
    ]
    assert len(hatched) == 2 * arms - 1
    assert "0/1 s" in texts(fig)
    options = {"only": ["stability_frontier"], "formats": ("svg",)}
    paths = [figures.draw_all(folder, tmp_path, tmp_path / n, **options) for n in "ab"]
    one, two = (Path(written).read_bytes() for (written,) in paths)
    assert one == two


@pytest.mark.parametrize("name", ["robustness", "robustness_by_size", "stability_frontier"])
def test_nothing_to_draw_is_said_in_words(folder, name):
    kind = figures.FIGURES[name].probe
    assert "probed" in texts(figures.FIGURES[name](with_rows(folder, kind, [])))


def test_gains_that_are_not_finite_are_not_drawn(folder):
    tables = with_rows(folder, "robustness", made_gains(folder, None))
    assert "No run has been probed" in texts(figures.FIGURES["robustness"](tables))
