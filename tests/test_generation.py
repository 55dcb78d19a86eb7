"""Generation: samples are functions of their seeds; an interrupted one goes on where it was."""

import json
from pathlib import Path

import numpy as np
import pytest
from miniature import base
from PIL import Image

from study.arms import runs
from study.data.convert import convert
from study.fidelity.evaluate import evaluate
from study.fidelity.reference import make_reference
from study.files import UserError, read_json
from study.sampling import draw as generation
from study.sampling.draw import best_step, generate, tile, to_uint8
from study.spec.measuring import Measurement
from study.spec.study import load
from study.training import train


def samples_of(**keys) -> Measurement:
    """A measurement of 24 samples."""
    return Measurement(**{"sampler": {"kind": "edm_heun", "steps": 3}, "images": 24, **keys})


PLAIN = samples_of()


def trained(folder: Path, data: Path, **training) -> Path:
    content = base()
    content["grid"] = {"backbone": ["uvit"]}
    content["backbones"] = {"uvit": {"options": {"embed_dim": 16, "depth": 4, "num_heads": 2}}}
    content["training"] = {"steps": 2, "batch": 8, "lr": 1e-3, **training}
    spec = next(iter(runs(load(content)).values())).spec
    train(spec, data, folder / "train", folder / "state", threads=1)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.zip"
    convert({**base()["dataset"], "max_images": 40}, path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    return trained(tmp_path_factory.mktemp("run"), data)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory, data):
    training = {"conditional": True, "label_dropout": 0.2}
    return trained(tmp_path_factory.mktemp("conditional"), data, **training)


def test_samples_of_an_average_that_has_not_begun_say_so(tmp_path, data):
    told = "the average still holds 99 % of the initial weights"
    folder = trained(tmp_path, data, ema={"rate": 0.995})
    for weights, remark in (("ema", told), ("raw", None)):
        generate(folder, samples_of(weights=weights), data, tmp_path / weights)
        assert read_json(tmp_path / weights / "generate.json").get("remark") == remark
        make_reference(data, "pixels", None, tmp_path / "reference")
        found = evaluate(
            tmp_path / weights / "samples.npz",
            tmp_path / "reference",
            {"metrics": ["fd", "prc"]},
            tmp_path / "fidelity.json",
        )
        noted = {name for name, note in found["notes"].items() if told in note}
        assert noted == (set(found["metrics"]) if remark else set())


def samples(folder: Path) -> np.ndarray:
    return np.load(folder / "samples.npz")["arr_0"]


def test_samples_grid_and_facts(run, data, tmp_path):
    result = generate(run, PLAIN, data, tmp_path)
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].shape == (24, 8, 8, 1)
        assert file["arr_0"].dtype == np.uint8
        assert file["arr_1"].dtype == np.int64
    assert result["nfe"] == 5
    assert read_json(tmp_path / "generate.json")["status"] == "done"
    assert Image.open(tmp_path / "grid.png").size[0] >= 240


def test_batch_size_changes_no_sample_beyond_rounding(run, data, tmp_path):
    generate(run, PLAIN, data, tmp_path / "a", batch=24)
    generate(run, PLAIN, data, tmp_path / "b", batch=5)
    difference = samples(tmp_path / "a").astype(int) - samples(tmp_path / "b").astype(int)
    assert np.abs(difference).max() <= 1


def test_a_sample_belongs_to_its_seed(run, data, tmp_path):
    generate(run, PLAIN, data, tmp_path / "a")
    generate(run, samples_of(seed=4), data, tmp_path / "b")
    difference = samples(tmp_path / "a")[4:].astype(int) - samples(tmp_path / "b")[:20].astype(int)
    assert np.abs(difference).max() <= 1
    assert (samples(tmp_path / "a") != samples(tmp_path / "b")).any()


def test_the_same_command_gives_the_same_bytes(run, data, tmp_path):
    for name in ("a", "b"):
        generate(run, PLAIN, data, tmp_path / name)
    for name in ("samples.npz", "grid.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_interrupted_generation_goes_on_where_it_was(run, data, tmp_path, monkeypatch):
    whole = samples_of(seed=100)
    generate(run, whole, data, tmp_path / "whole", batch=6)
    calls = []

    def counted(images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return to_uint8(images)

    monkeypatch.setattr(generation, "to_uint8", counted)
    with pytest.raises(KeyboardInterrupt):
        generate(run, whole, data, tmp_path / "parts", batch=6)
    assert not (tmp_path / "parts/generate.json").exists()
    generate(run, whole, data, tmp_path / "parts", batch=6)
    assert len(calls) == 5  # 2 kept, 1 lost, then only the missing 2
    for name in ("samples.npz", "grid.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_parts_of_another_protocol_are_not_used(run, data, tmp_path, monkeypatch):
    def stop(images):
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "to_uint8", stop)
    with pytest.raises(KeyboardInterrupt):
        generate(run, PLAIN, data, tmp_path / "a", batch=6)
    monkeypatch.undo()
    generate(run, samples_of(seed=50), data, tmp_path / "b", batch=6)
    generate(run, samples_of(seed=50), data, tmp_path / "c", batch=6)
    assert (samples(tmp_path / "b") == samples(tmp_path / "c")).all()


def test_guidance_changes_samples_of_a_conditional_run(conditional, data, tmp_path):
    plain = generate(conditional, PLAIN, data, tmp_path / "plain")
    guided = generate(conditional, samples_of(guidance=3.0), data, tmp_path / "guided")
    assert (plain["nfe"], guided["nfe"]) == (5, 10)
    assert (samples(tmp_path / "plain") != samples(tmp_path / "guided")).any()
    labels = np.load(tmp_path / "plain/samples.npz")["arr_1"]
    assert set(labels) <= set(range(10))
    assert len(set(labels)) > 3


def test_as_many_images_as_the_data_set_with_its_class_proportions(conditional, data, tmp_path):
    from study.data import Archive

    generate(conditional, samples_of(images=None), data, tmp_path)
    labels = np.load(tmp_path / "samples.npz")["arr_1"]
    assert sorted(labels) == sorted(Archive(data).labels)


def test_a_diverged_run_gives_no_images_and_says_so(run, data, tmp_path):
    folder = tmp_path / "run"
    (folder / "train").mkdir(parents=True)
    status = read_json(run / "train/status.json")
    status |= {"status": "diverged", "step": 7, "reason": "loss spike"}
    (folder / "train/status.json").write_text(json.dumps(status))
    generate(folder, PLAIN, data, tmp_path / "out")
    assert samples(tmp_path / "out").shape == (0, 8, 8, 1)
    facts = read_json(tmp_path / "out/generate.json")
    assert facts["status"] == "skipped"
    assert facts["reason"] == "training diverged at step 7: loss spike"
    assert np.asarray(Image.open(tmp_path / "out/grid.png")).std() > 0


def test_missing_and_misfitting_weights_are_named(run, data, tmp_path):
    folder = tmp_path / "run"
    (folder / "train").mkdir(parents=True)
    status = read_json(run / "train/status.json")
    (folder / "train/status.json").write_text(json.dumps(status))
    with pytest.raises(UserError, match=r"weights.safetensors: missing; train the run again"):
        generate(folder, PLAIN, data, tmp_path / "out")
    status["spec"]["backbone"]["options"]["depth"] = 6
    (folder / "train/status.json").write_text(json.dumps(status))
    (folder / "train/weights.safetensors").write_bytes(
        (run / "train/weights.safetensors").read_bytes()
    )
    with pytest.raises(UserError, match=r"weights.safetensors: "):
        generate(folder, PLAIN, data, tmp_path / "out")


def test_values_outside_the_range_are_clipped():
    import torch

    images = torch.tensor([-2.0, -1.0, 0.0, 0.999, 5.0]).reshape(1, 1, 1, 5)
    assert to_uint8(images).ravel().tolist() == [0, 0, 128, 255, 255]


def test_tile_keeps_order_and_magnifies_by_whole_numbers():
    images = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1).repeat(2, 1).repeat(2, 2)
    picture = np.asarray(tile(images, columns=2, side=8))
    assert picture.shape == (10, 10)  # two tiles of 4 and a gap of 2
    assert (picture[:4, :4] == 0).all()
    assert (picture[:4, 6:] == 1).all()
    assert (picture[6:, :4] == 2).all()
    assert (picture[6:, 6:] == 255).all()
    assert (picture[4:6] == 255).all()


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("fd", {60: [5.0], 480: [4.9]}, 480),
        ("is", {60: [5.0], 480: [4.9]}, 60),
        ("fd", {60: [5.0, 5.2], 480: [4.9]}, 60),  # a step that lacks a measurement is no rival
        ("kid", {60: [0.2], 120: [0.2]}, 60),
        ("fd", {}, None),
    ],
)
def test_the_best_step_has_the_best_mean_of_all_measurements(metric, values, best):
    assert best_step(metric, values) == best
