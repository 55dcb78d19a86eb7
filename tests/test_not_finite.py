"""What is not finite is a result: counted, without a picture and without a number, to the page."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from miniature import base, measured
from PIL import Image
from safetensors.torch import load_file, save_file

from study.analysis import figures
from study.analysis.report.page import report
from study.analysis.tables.aggregate import aggregate
from study.analysis.tables.read import Tables
from study.arms import manifest, runs
from study.data import Archive
from study.data.convert import convert
from study.fidelity.evaluate import POSSIBLE, Score, _possible, evaluate
from study.fidelity.reference import make_reference
from study.files import UserError, read_json, sha256, write_json
from study.ledger.status import state_of
from study.pictures import crossed, in_order
from study.probes.base import probe
from study.sampling.decoder import load_decoder
from study.sampling.draw import generate
from study.spec.measuring import Measurement
from study.spec.study import load
from study.training import train

SOUND, LOST, BROKEN = "none", "ls", "cs(0.7)"
"""Scalings of the runs: a sound one, one that cannot draw a class, one with a broken weight."""

IMAGES, CLASS = 40, 3
SAMPLES = Measurement(sampler={"kind": "edm_heun", "steps": 3}, images=IMAGES, seed=5)
FOLDER = f"measurements/{SAMPLES.name}"


def change(path: Path, key: str, row, value: float) -> None:
    """Set a row of a weight, in the averaged and in the last weights."""
    for name in ("weights", "raw"):
        weights = load_file(path / f"{name}.safetensors")
        weights[key][row] = value
        save_file(weights, path / f"{name}.safetensors")


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> dict:
    """A conditional study of three runs, sampled, measured and probed; the results folder."""
    root = tmp_path_factory.mktemp("study")
    content = base()
    content["study"] = "t"
    content["grid"] = {"backbone": ["uvit"], "skip_scaling": [SOUND, LOST, BROKEN]}
    content["backbones"] = {"uvit": {"options": {"embed_dim": 16, "depth": 4, "num_heads": 2}}}
    content["training"] = {"steps": 2, "batch": 8, "lr": 1e-3, "conditional": True}
    content |= measured(
        images=IMAGES, seeds=SAMPLES.seed, extractors="pixels", metrics=["fd", "prc"]
    )
    content["probes"] = [{"kind": "robustness", "samples": 8}]
    declared = load(content)
    data = root / "digits.zip"
    convert({"name": "digits", "source": "digits", "max_images": 60}, data)
    make_reference(data, "pixels", None, root / "reference")
    found = runs(declared)
    results = root / "results/t"
    write_json(results / "study.json", manifest(declared, found))
    folders = {}
    for run in found.values():
        folder = folders[run.axes["skip_scaling"]] = results / "runs" / run.name
        train(run.spec, data, folder / "train", folder / "state", threads=1)
        if run.axes["skip_scaling"] == LOST:  # finite, and too large for single precision's squares
            change(folder / "train", "label_emb.weight", CLASS, 1e30)
        if run.axes["skip_scaling"] == BROKEN:
            change(folder / "train", "pos_embed", (0, 0, 0), math.nan)
        status = folder / "train/status.json"
        sound = {"weights_sha256": sha256(folder / "train/weights.safetensors")}
        write_json(status, read_json(status) | sound)
        (one,) = run.measurements
        generate(folder, one.cell, data, folder / FOLDER, batch=16)
        asked = {"extractor": "pixels", "metrics": ["fd", "prc"]}
        samples, out = folder / FOLDER / "samples.npz", folder / FOLDER / "pixels.json"
        evaluate(samples, root / "reference", asked, out)
        out = folder / "probes/robustness.parquet"
        probe("robustness", data, out, {"samples": 8}, run_dir=folder)
    aggregate(results / "study.json", results, results / "tables")
    return {"data": data, "results": results, "runs": found, **folders}


@pytest.fixture(scope="module")
def tables(study) -> Tables:
    return Tables.read(study["results"] / "tables", study["results"])


def test_samples_are_counted_and_no_image_is_made_of_them(study):
    facts = read_json(study[LOST] / FOLDER / "generate.json")
    with np.load(study[LOST] / FOLDER / "samples.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    with np.load(study[SOUND] / FOLDER / "samples.npz") as file:
        drawn = file["arr_1"]
    lost = np.flatnonzero(drawn == CLASS)
    assert 0 < len(lost) < IMAGES
    assert facts["status"] == "diverged"
    assert facts["reason"] == f"{len(lost)} of {IMAGES} samples are not finite"
    assert facts["not_finite"] == len(lost)
    assert facts["not_finite_seeds"] == (SAMPLES.seed + lost).tolist()
    assert facts["images"] == len(images) == len(labels) == IMAGES - len(lost)
    assert CLASS not in labels
    sound = read_json(study[SOUND] / FOLDER / "generate.json")
    assert (sound["status"], sound["not_finite"], sound["reason"]) == ("done", 0, None)


def test_the_grid_crosses_out_what_is_not_there(study):
    facts = read_json(study[LOST] / FOLDER / "generate.json")
    grid = np.asarray(Image.open(study[LOST] / FOLDER / "grid.png"))
    side = grid.shape[1] // 10
    place = facts["not_finite_seeds"][0] - facts["seed"]
    row, column = divmod(place, 10)
    with Image.open(study[SOUND] / FOLDER / "grid.png") as other:
        assert other.size == (grid.shape[1], grid.shape[0])  # no place is left out
    cell = grid[row * side :, column * (grid.shape[1] + 4) // 10 :][: side - 6, : side - 6]
    assert set(np.unique(cell)) == {90, 200}  # grey with a cross, not black


def test_interrupted_sampling_knows_what_was_lost(study, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(study[LOST] / "train", folder / "train")
    from study.sampling import draw as generation

    calls = []

    def stops(images):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(images)

    original = generation.to_uint8
    generation.to_uint8 = stops
    try:
        with pytest.raises(KeyboardInterrupt):
            generate(folder, SAMPLES, study["data"], tmp_path / "out", batch=16)
    finally:
        generation.to_uint8 = original
    generate(folder, SAMPLES, study["data"], tmp_path / "out", batch=16)
    for name in ("samples.npz", "grid.png"):
        whole = study[LOST] / FOLDER / name
        assert (tmp_path / "out" / name).read_bytes() == whole.read_bytes()


def test_weights_that_are_not_finite_are_not_sampled(study, capsys):
    facts = read_json(study[BROKEN] / FOLDER / "generate.json")
    assert (facts["status"], facts["images"]) == ("skipped", 0)
    words = "weights.safetensors: 1 weight is not finite, the first of them in pos_embed"
    assert facts["reason"] == words
    assert np.load(study[BROKEN] / FOLDER / "samples.npz")["arr_0"].shape == (0, 8, 8, 1)
    generate(study[BROKEN], SAMPLES, study["data"], study[BROKEN] / FOLDER)
    said = capsys.readouterr().err
    assert said.count(words) == 1
    record = read_json(study[BROKEN] / FOLDER / "pixels.json")
    assert (record["status"], record["reason"], record["metrics"]) == ("skipped", words, {})


def test_no_metric_is_made_of_the_others_alone(study):
    lost = read_json(study[LOST] / FOLDER / "generate.json")["reason"]
    record = read_json(study[LOST] / FOLDER / "pixels.json")
    names = [f"{base}_pixels_{IMAGES}" for base in ("fd", "precision", "recall")]
    assert record["metrics"] == dict.fromkeys(names)
    assert record["notes"] == dict.fromkeys(names, lost)
    assert record["reason"] == lost
    sound = read_json(study[SOUND] / FOLDER / "pixels.json")
    assert set(sound["metrics"]) == set(names)
    assert record["identity"] == sound["identity"]


def test_samples_that_are_not_the_described_ones_are_refused(study, tmp_path):
    shutil.copytree(study[LOST] / FOLDER, tmp_path / "made")
    shutil.copy(study[SOUND] / FOLDER / "samples.npz", tmp_path / "made/samples.npz")
    reference = study["data"].parent / "reference"
    with pytest.raises(UserError, match=r"not the samples that .*generate\.json describes"):
        evaluate(tmp_path / "made/samples.npz", reference, {}, tmp_path / "f.json")


def test_probes_leave_out_what_is_not_finite(study, tables):
    skipped = read_json(study[BROKEN] / "probes/robustness.json")
    assert (skipped["status"], "pos_embed" in skipped["reason"]) == ("skipped", True)
    partly = read_json(study[LOST] / "probes/robustness.json")
    assert partly["status"] == "done"
    assert "left out because they are not finite" in partly["reason"]
    assert read_json(study[SOUND] / "probes/robustness.json")["reason"] is None
    frame = tables.probe("robustness")
    assert np.isfinite(frame.loc[frame["skip_scaling"] == SOUND, "gain"].astype(float)).all()
    assert not np.isinf(frame["gain"].astype(float)).any()
    problems = tables.qc[tables.qc["check"] == "probe not measured"]
    assert set(problems["run"]) == {study[LOST].name, study[BROKEN].name}


def test_tables_say_not_measured_and_why(study, tables):
    lost = read_json(study[LOST] / FOLDER / "generate.json")["reason"]
    rows = tables.metrics[tables.metrics["base"] == "fd"].set_index("run")
    assert rows["status"].to_dict() == {
        study[SOUND].name: "done",
        study[LOST].name: "not measured",
        study[BROKEN].name: "not measured",
    }
    assert rows.loc[study[LOST].name, "note"] == lost
    assert "pos_embed" in rows.loc[study[BROKEN].name, "note"]
    summary = tables.summary[tables.summary["metric"] == rows["metric"].iloc[0]]
    summary = summary.set_index("skip_scaling")
    assert summary["n_not_measured"].to_dict() == {SOUND: 0, LOST: 1, BROKEN: 1}
    assert summary["n_missing"].sum() == 0
    assert summary.loc[LOST, "note"] == lost
    pairs = tables.comparisons[tables.comparisons["metric"] == rows["metric"].iloc[0]]
    assert set(pairs["note"]) == {"1 pair left out: not measured"}
    checks = tables.qc[tables.qc["check"] == "samples not finite"]
    assert set(checks["run"]) == {study[LOST].name, study[BROKEN].name}


def test_pictures_and_page_show_it(study, tables, tmp_path):
    def texts(figure) -> str:
        return "\n".join(artist.get_text() for artist in figure.findobj(Text))

    assert "not\nmeasured" in texts(figures.quality_heatmap(tables))
    assert "not\nfinite" in texts(figures.sample_grids(tables))
    page = report(study["results"] / "study.json", study["results"], tmp_path)
    html = page.read_text(encoding="utf-8")
    lost = read_json(study[LOST] / FOLDER / "generate.json")["reason"]
    assert "The samples of 2 runs are not all finite" in html
    assert lost in html
    assert "not measured" in html


def test_status_says_why_a_finished_run_has_no_number(study):
    run = study["runs"][study[LOST].name]
    state = state_of(run, study[LOST])
    assert state.note == read_json(study[LOST] / FOLDER / "generate.json")["reason"]


def test_what_a_decoder_makes_of_latents_counts_as_well(tmp_path):
    from study.sampling.decoder import LatentDecoder

    torch.manual_seed(0)
    decoder = LatentDecoder(channels=4, widths=[32, 64], blocks=2, scale=0.5)
    weights = decoder.state_dict()
    weights["decoder.conv_out.weight"][:] = 3e38
    torch.save(weights, tmp_path / "vae.pth")
    latents = np.random.default_rng(0).normal(size=(12, 4, 8, 8)).astype(np.float32)
    (tmp_path / "source").mkdir()
    np.savez(tmp_path / "source/all.npz", latents=latents, labels=np.arange(12) % 3)
    dataset = {"name": "z", "source": "latents", "path": str(tmp_path / "source")}
    dataset |= {"channels": 4, "resolution": 8}
    convert(dataset, tmp_path / "z.zip", tmp_path / "source")
    decoder = {"weights": str(tmp_path / "vae.pth"), "scale": 0.5}
    reference = {"name": "digits", "source": "digits"}
    dataset |= {"decoder": decoder, "reference": reference}
    content = base() | {"dataset": dataset, "grid": {"backbone": ["uvit"]}}
    content["backbones"] = {"uvit": {"options": {"embed_dim": 16, "depth": 2, "num_heads": 2}}}
    content["training"] = {"steps": 2, "batch": 4, "lr": 1e-3}
    content |= measured(images=3, extractors="pixels", metrics=["fd"])
    (run,) = runs(load(content)).values()
    train(run.spec, tmp_path / "z.zip", tmp_path / "run/train", tmp_path / "run/state", threads=1)
    (one,) = run.measurements
    where = tmp_path / "run", one.cell, tmp_path / "z.zip", tmp_path / "out"
    facts = generate(*where, decoder=decoder["weights"])
    assert facts["reason"] == "3 of 3 samples are not finite"
    assert np.load(tmp_path / "out/samples.npz")["arr_0"].shape == (0, 16, 16, 3)
    weights["decoder.conv_out.bias"][0] = math.inf
    torch.save(weights, tmp_path / "vae.pth")
    with pytest.raises(UserError, match=r"conv_out\.bias.*not finite"):
        load_decoder(tmp_path / "vae.pth", 1.0)
    assert Archive(tmp_path / "z.zip").latents


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("fd", -0.5), ("fd", math.nan), ("fd", math.inf), ("kid", math.nan)),
        *(("is", 0.5), ("precision", 1.5), ("recall", -0.1)),
    ],
)
def test_a_number_that_cannot_be_is_none(name, value):
    score = _possible(name, Score(value))
    assert score.value is None
    assert score.note
    low, high = POSSIBLE[name]
    sound = Score(min(max(low, 1.0), high), spread=math.nan)
    assert _possible(name, sound) == Score(sound.value)


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_keep_their_places_around_those_that_are_crossed_out(channels):
    images = np.arange(4, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(6, 2)
    images = images.repeat(channels, 3)
    mark = crossed(4, 6, channels)
    assert mark.min() > 0 or channels == 3
    sheet = in_order(images, [1, 4], 10)
    assert [int(one[0, 1, 0]) if i not in (1, 4) else -1 for i, one in enumerate(sheet)] == [
        *(0, -1, 1, 2, -1, 3)
    ]
    assert (sheet[1] == mark).all() and (sheet[4] == mark).all()
    assert len(in_order(images, [1, 4], 3)) == 3
    assert len(in_order(images[:0], range(5), 3)) == 3
