"""Snapshots, several averages, and longer trainings that go on from shorter ones."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from conftest import ROOT
from miniature import base
from safetensors.torch import load_file

from study.arms import runs
from study.data import Archive
from study.data.convert import convert
from study.files import UserError, read_json, sha256
from study.network import build_network
from study.spec.run import Spec
from study.spec.study import load
from study.trained import load_weights, weights_file
from study.training import Interrupted, checkpoint, train
from study.training.dynamics import Table
from study.training.log import Log, PairwiseSum, spacing

AVERAGES = [{"rate": 0.9, "rampup": 0.05}, {"halflife": 100.0}]
TINY = {
    "uvit": {"options": {"embed_dim": 16, "depth": 4, "num_heads": 2}},
    **{family: {"preset": "tiny"} for family in ("udit", "patch_unet", "ddpmpp", "ncsnpp")},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.zip"
    convert({"name": "digits", "source": "digits", "max_images": 64}, path)
    return path


def spec(family: str = "uvit", target: str = "dsm", scaling: str = "ls", **training) -> Spec:
    content = base() | {"backbones": {family: TINY[family]}}
    content["grid"] = {"backbone": [family], "skip_scaling": [scaling], "target": [target]}
    content["training"] = {"steps": 8, "batch": 4, "lr": 1e-3, "warmup": 5, **training}
    return next(iter(runs(load(content)).values())).spec


def run(tmp_path: Path, data: Path, one: Spec, study: str = "a", code: str = "1", **more) -> Path:
    """Train a run of a study; returns its ``train/``."""
    folder = tmp_path / study / "runs" / one.name
    train(one, data, folder / "train", folder / "state", threads=1, code=code, **more)
    return folder / "train"


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that must not depend on how a training came to its end."""
    files = [
        *folder.glob("*.safetensors"),
        *folder.glob("snapshots/*"),
        folder / "dynamics.parquet",
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def same(first: Path, second: Path) -> None:
    one, other = contents(first), contents(second)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    kept = [read_json(folder / "status.json")["snapshots"] for folder in (first, second)]
    assert kept[0] == kept[1]


# --- snapshots -----------------------------------------------------------------------------------


def test_a_training_keeps_its_averages_at_its_snapshots(tmp_path, data):
    one = spec(ema=AVERAGES, snapshots={"at": [0, 3], "raw": True})
    folder = run(tmp_path, data, one)
    status = read_json(folder / "status.json")
    names = {f"{step:09d}.{which}" for step in (0, 3) for which in ("ema", "ema2", "raw")}
    assert {path.name for path in (folder / "snapshots").iterdir()} == {
        f"{name}.safetensors" for name in (*names, "000000008.ema2")
    }
    for step, files in status["snapshots"].items():
        for which, digest in files.items():
            assert sha256(weights_file(folder, which, int(step))) == digest
    # What is kept of a step is what a training of that many steps ends with.
    shorter = run(tmp_path, data, spec(ema=AVERAGES, steps=3, warmup=0), "b")
    other = run(tmp_path, data, spec(ema=AVERAGES, steps=8, warmup=0, snapshots=[3]), "c")
    assert weights_file(other, "ema", 3).read_bytes() == weights_file(shorter).read_bytes()
    assert weights_file(other, "ema2", 3).read_bytes() == weights_file(shorter, "ema2").read_bytes()
    start = load_file(weights_file(folder, "raw", 0))
    network = build_network(one, Archive(data))
    assert all(torch.equal(start[key], value) for key, value in network.state_dict().items())
    load_weights(network, folder, "ema2", 3)
    found = load_file(folder / "snapshots/000000003.ema2.safetensors")
    assert all(torch.equal(found[key], value) for key, value in network.state_dict().items())


def test_an_average_is_what_it_is_alone_whatever_is_kept_beside_it(tmp_path, data):
    both = run(tmp_path, data, spec(ema=AVERAGES, snapshots=2))
    for which, average in zip(("ema", "ema2"), AVERAGES, strict=True):
        alone = run(tmp_path, data, spec(ema=average))
        assert weights_file(both, which).read_bytes() == weights_file(alone).read_bytes()


def test_the_last_step_is_found_by_its_number(tmp_path, data):
    folder = run(tmp_path, data, spec(ema=AVERAGES))
    for which in ("ema", "ema2", "raw"):
        assert weights_file(folder, which, 8) == weights_file(folder, which)
    assert weights_file(folder, "raw") == folder / "raw.safetensors"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("ema", 5), r"000000005\.ema\.safetensors: not kept; .* training\.snapshots: \[5\]$"),
        (("raw", 4), r"not kept; train with training\.snapshots: \{at: \[4\], raw: true\}$"),
        (("ema2", 4), r"the run has ema, raw; training\.ema lists averages$"),
        (("ema", 9), r"the run was trained to step 8; take an earlier one$"),
    ],
)
def test_weights_that_were_not_kept_are_one_line(tmp_path, data, asked, message):
    folder = run(tmp_path, data, spec(snapshots=[4]))
    with pytest.raises(UserError, match=message):
        weights_file(folder, *asked)


def test_a_snapshot_that_was_removed_is_one_line(tmp_path, data):
    folder = run(tmp_path, data, spec(snapshots=[4]))
    weights_file(folder, "ema", 4).unlink()
    with pytest.raises(
        UserError, match=r"000000004\.ema\.safetensors: missing; train the run again"
    ):
        weights_file(folder, "ema", 4)


def test_what_was_kept_before_a_divergence_stays(tmp_path, data):
    one = spec(lr=1e-5, divergence=1.02, steps=60, snapshots=2, ema=AVERAGES)
    folder = run(tmp_path, data, one)
    status = read_json(folder / "status.json")
    assert status["status"] == "diverged"
    kept = {int(step) for step in status["snapshots"]}
    assert set(range(2, status["step"], 2)) <= kept <= {*range(2, 60, 2), status["step"]}
    assert weights_file(folder, "ema2", 2).exists()
    assert weights_file(folder, "ema2").exists()
    with pytest.raises(UserError, match=r"the run diverged at step \d+; take an earlier one"):
        weights_file(folder, "ema", 58)


SNAPSHOTS = {"ema": AVERAGES, "snapshots": {"every": 2, "raw": True}}


def test_an_interrupted_training_keeps_the_same_snapshots(tmp_path, data):
    one, stop = spec(target="stf(8)", **SNAPSHOTS), tmp_path / "stop"
    stop.touch()
    for expected in (1, 2, 3, 4, 5):
        with pytest.raises(Interrupted, match=f"at step {expected} of 8"):
            run(tmp_path, data, one, stop_file=stop)
    folder = tmp_path / "a/runs" / one.name / "train/snapshots"
    # Written after the last checkpoint, by a process that was killed, or half written.
    (folder / "000000006.ema.safetensors").write_bytes(b"half")
    (folder / "000000003.ema.safetensors").write_bytes(b"of other code")
    parts = run(tmp_path, data, one)
    same(run(tmp_path, data, one, "whole"), parts)


def test_a_killed_training_keeps_the_same_snapshots(tmp_path, data):
    one = spec(steps=150, snapshots={"every": 25, "raw": True})
    folder = tmp_path / "a/runs" / one.name
    command = [sys.executable, "-m", "study", "train", "--spec", one.key, "--code", "1"]
    command += ["--data", str(data), "--out", str(folder / "train"), "--threads", "1"]
    command += ["--state", str(folder / "state"), "--machine", '{"save_every": 0.1}']
    process = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("train/snapshots/*.raw.*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "train/status.json").exists()
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    same(run(tmp_path, data, one, "whole"), folder / "train")


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_a_checkpoint_whose_snapshots_are_gone_is_not_used(tmp_path, data, damage, capsys):
    one = spec(snapshots=[4])
    whole = contents(run(tmp_path, data, one, "whole"))
    folder = run(tmp_path, data, one)
    damage(weights_file(folder, "ema", 4))
    capsys.readouterr()
    assert contents(run(tmp_path, data, one)) == whole
    said = capsys.readouterr().out
    assert "what it had kept is no longer whole" in said
    assert "resumed" not in said


def test_snapshots_of_another_training_are_removed(tmp_path, data):
    one = spec(snapshots=[4])
    folder = run(tmp_path, data, one)
    stale = folder / "snapshots/000000002.ema.safetensors"
    shutil.copy(weights_file(folder, "ema", 4), stale)
    run(tmp_path, data, one, code="2")
    assert not stale.exists()
    assert weights_file(folder, "ema", 4).exists()


def test_networks_trained_one_after_another_are_kept_together(tmp_path, data):
    content = base() | {"formulation": {"kind": "ddpm", "splits": [0.25], "prediction": "x0"}}
    content |= {"backbones": TINY, "grid": {"backbone": ["uvit"]}}
    content["training"] = {"steps": 3, "batch": 4, "lr": 1e-2, "ema": AVERAGES, "snapshots": [2, 4]}
    content["training"]["models"] = [{"split": 1}, {"split": 0, "start": 1}]
    one = next(iter(runs(load(content)).values())).spec
    assert one.snapshots == (2, 4, 6)
    folder, stop = run(tmp_path, data, one), tmp_path / "stop"
    stop.touch()
    for _ in range(5):
        with pytest.raises(Interrupted):
            run(tmp_path, data, one, "parts", stop_file=stop)
    same(folder, run(tmp_path, data, one, "parts"))
    kept = [load_file(weights_file(folder, "ema2", step)) for step in (2, 4)]
    moved = {key[:10] for key in kept[0] if not torch.equal(kept[0][key], kept[1][key])}
    assert moved == {"networks.0", "networks.1"}


# --- a longer training goes on -------------------------------------------------------------------


@pytest.mark.parametrize("target", ["dsm", "stf(8)"])
@pytest.mark.parametrize("family", list(TINY))
def test_a_longer_training_ends_in_the_bytes_of_one_at_once(tmp_path, data, family, target, capsys):
    kept = {"ema": AVERAGES, "snapshots": {"at": [0, 15, 40, 60], "raw": True}}
    longer = spec(family, target, steps=80, **kept)
    kept["snapshots"] = {"at": [0, 15, 30], "raw": True}
    shorter = spec(family, target, steps=40, **kept)
    assert shorter.lineage == longer.lineage
    rows = {"machine": {"log_every": 8}}  # so that the row of step 39 is not one of the longer one
    first = contents(run(tmp_path, data, shorter, **rows))
    capsys.readouterr()
    went_on = run(tmp_path, data, longer, **rows)
    said = capsys.readouterr().out
    assert re.findall(r".* at step .*", said)[0] == f"goes on from {shorter.name} at step 40 of 80"
    origins = read_json(went_on / "status.json")["origins"]
    assert origins == [{"run": shorter.name, "step": 40}]
    same(run(tmp_path, data, longer, "at once", **rows), went_on)
    assert contents(tmp_path / "a/runs" / shorter.name / "train") == first


def test_the_log_of_a_longer_training_is_coarser(tmp_path, data):
    options = {"embed_dim": 8, "depth": 2, "num_heads": 1}
    shorter, longer = (
        spec(steps=steps, batch=2, snapshots=[100, 150]).changed(backbone={"options": options})
        for steps in (300, 700)
    )
    assert (spacing(300), spacing(700)) == (2, 4)
    run(tmp_path, data, shorter)
    went_on = run(tmp_path, data, longer)
    same(run(tmp_path, data, longer, "at once"), went_on)
    table = parquet.read_table(went_on / "dynamics.parquet").to_pandas()
    steps = table[table.quantity == "loss"].step.tolist()
    assert steps == [*range(0, 700, 4), 699]
    # In the log of the longer one 299 has no row, and the mean of 300 is over 297 to 300.
    assert set(table.step) == set(steps)


def test_an_interrupted_training_may_be_gone_on_from_and_go_on(tmp_path, data, capsys):
    shorter, longer, stop = spec(**SNAPSHOTS), spec(steps=12, **SNAPSHOTS), tmp_path / "stop"
    stop.touch()
    for _ in range(3):
        with pytest.raises(Interrupted):
            run(tmp_path, data, shorter, stop_file=stop)
    with pytest.raises(Interrupted, match="at step 4 of 12"):
        run(tmp_path, data, longer, stop_file=stop)
    assert f"goes on from {shorter.name} at step 3 of 12" in capsys.readouterr().out
    same(run(tmp_path, data, longer, "at once"), run(tmp_path, data, longer))
    said = capsys.readouterr().out
    assert "resumed at step 4 of 12" in said
    assert "goes on" not in said


def test_the_furthest_training_that_has_the_snapshots_is_taken(tmp_path, data, capsys):
    for steps, kept in ((2, None), (4, [2]), (6, None), (10, [2])):
        run(tmp_path, data, spec(steps=steps, snapshots=kept, warmup=1))
    capsys.readouterr()
    longer = spec(steps=8, snapshots=[2, 4], warmup=1)  # 10 is beyond its end, 6 has kept nothing
    folder = run(tmp_path, data, longer)
    assert "at step 4 of 8" in capsys.readouterr().out
    same(run(tmp_path, data, longer, "at once"), folder)
    # A training that keeps less of what another one has kept is there at once.
    fewer = spec(steps=8, snapshots=[4], warmup=1)
    folder = run(tmp_path, data, fewer)
    assert "at step 8 of 8" in capsys.readouterr().out
    same(run(tmp_path, data, fewer, "at once"), folder)


def went_on(capsys) -> bool:
    return "goes on from" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [{"lr": 2e-3}, {"warmup": 4}, {"ema": [*AVERAGES, {"rate": 0.5}]}, {"batch": 2}],
)
def test_another_setting_does_not_go_on(tmp_path, data, change, capsys):
    run(tmp_path, data, spec(**SNAPSHOTS))
    run(tmp_path, data, spec(steps=10, **{**SNAPSHOTS, **change}))
    assert not went_on(capsys)


def test_other_code_data_and_places_do_not_go_on(tmp_path, data, capsys):
    longer = spec(steps=10)
    run(tmp_path, data, spec())
    run(tmp_path, data, longer, code="2")
    shutil.rmtree(tmp_path / "a/runs" / longer.name)
    run(tmp_path, data, spec(), "untold", code=None)
    run(tmp_path, data, longer, "untold", code=None)
    fewer = tmp_path / "fewer.zip"
    convert({"name": "digits", "source": "digits", "max_images": 32}, fewer)
    run(tmp_path, fewer, longer)
    run(tmp_path, data, longer, "another study")
    assert not went_on(capsys)
    shutil.rmtree(tmp_path / "a/runs" / longer.name)
    run(tmp_path, data, longer)
    assert went_on(capsys)


def test_networks_trained_one_after_another_do_not_go_on(tmp_path, data, capsys):
    content = base() | {"formulation": {"kind": "ddpm", "splits": [0.25], "prediction": "x0"}}
    content |= {"backbones": TINY, "grid": {"backbone": ["uvit"]}}
    for steps in (2, 3):
        content["training"] = {"steps": steps, "batch": 4, "lr": 1e-2}
        run(tmp_path, data, next(iter(runs(load(content)).values())).spec)
    assert not went_on(capsys)


@pytest.mark.parametrize(
    ("first", "then", "fits"),
    [(3, 3, True), (3, 6, True), (3, 12, True), (3, 9, False), (4, 2, False), (None, 2, True)],
)
def test_rows_that_were_not_written_are_not_invented(tmp_path, data, first, then, fits, capsys):
    longer = spec(steps=14)
    run(tmp_path, data, spec(), machine={"log_every": first})
    folder = run(tmp_path, data, longer, machine={"log_every": then})
    assert went_on(capsys) == fits
    same(run(tmp_path, data, longer, "at once", machine={"log_every": then}), folder)


def test_a_state_that_passed_the_last_step_without_its_row_is_not_taken(tmp_path, data, capsys):
    shorter, longer = spec(steps=4, warmup=0), spec(warmup=0)
    stop, machine = tmp_path / "stop", {"log_every": 4}
    stop.touch()
    for _ in range(4):
        with pytest.raises(Interrupted):
            run(tmp_path, data, longer, stop_file=stop, machine=machine)
    folder = run(tmp_path, data, shorter, machine=machine)
    assert not went_on(capsys)
    same(run(tmp_path, data, shorter, "at once", machine=machine), folder)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def without_model(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    del state["model"]
    torch.save(state, path)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("train/snapshots/000000004.ema.safetensors", cut),
        ("train/snapshots/000000004.ema.safetensors", flipped),
        ("train/snapshots/000000004.ema.safetensors", Path.unlink),
        ("state/checkpoint.pt", cut),
        ("state/checkpoint.pt", without_model),
        ("state/lineage.json", cut),
    ],
)
def test_a_damaged_file_of_another_run_is_not_trusted(tmp_path, data, file, damage, capsys):
    longer = spec(steps=10, snapshots=[4])
    shorter = run(tmp_path, data, spec(snapshots=[4]))
    damage(shorter.parent / file)
    folder = run(tmp_path, data, longer)
    assert not went_on(capsys)
    same(run(tmp_path, data, longer, "at once"), folder)


def test_a_note_that_promises_too_much_is_not_trusted(tmp_path, data, capsys):
    shorter = run(tmp_path, data, spec(lr=2e-3))
    run(tmp_path, data, spec(), "another")
    note = shorter.parent / "state" / checkpoint.NOTE
    shutil.copy(tmp_path / "another/runs" / spec().name / "state" / checkpoint.NOTE, note)
    assert json.loads(note.read_text(encoding="utf-8"))["lineage"] == spec().lineage
    run(tmp_path, data, spec(steps=10))
    assert not went_on(capsys)


# --- the log -------------------------------------------------------------------------------------


def test_the_default_spacing_gives_100_to_200_rows():
    assert [spacing(steps) for steps in (1, 100, 199, 200, 480, 12800, 10**6)] == [
        *(1, 1, 1, 2, 4, 128, 8192),
    ]
    assert all(100 <= steps / spacing(steps) < 200 for steps in range(100, 5000))


def log(steps: int, every: int) -> Log:
    found = Log(every)
    for step in range(steps):
        noise = torch.Generator().manual_seed(step)
        loss = torch.rand(5, generator=noise) * 10.0 ** (step % 7)
        sigma = torch.rand(5, generator=noise).exp() - 0.9
        found.add(step, loss.mean().item(), sigma, loss)
        if step % every == 0 or step == steps - 1:
            found.rows.add(step, "lr", float(step))
    return found


@pytest.mark.parametrize("steps", [1, 2, 30, 48, 49, 61])
@pytest.mark.parametrize(("fine", "coarse"), [(1, 2), (1, 8), (2, 8), (3, 6), (3, 12), (12, 12)])
def test_a_coarser_log_is_what_would_have_been_written(steps, fine, coarse):
    once = log(steps, coarse)
    found = log(steps, fine).coarser(coarse, steps - 1)
    assert found.table().columns == once.table().columns
    saved = [
        torch.stack([values for _, values in one.window.parts or [(0, torch.zeros(1))]])
        for one in (found, once)
    ]
    assert torch.equal(*saved)


def test_means_are_those_of_all_steps_since_the_last_row():
    table = log(10, 4).table()
    losses = [
        v
        for q, v in zip(table.columns["quantity"], table.columns["value"], strict=True)
        if q == "loss"
    ]
    each = log(10, 1).table()
    single = [
        v
        for q, v in zip(each.columns["quantity"], each.columns["value"], strict=True)
        if q == "loss"
    ]
    expected = [single[0], sum(single[1:5]) / 4, sum(single[5:9]) / 4, single[9]]
    assert losses == pytest.approx(expected, rel=1e-12)


def test_a_row_of_the_last_step_leaves_the_sums_alone():
    ended = log(30, 4)
    before = ended.table().columns
    assert before["step"][-1] == 29
    assert ended.table().columns == before
    assert Log.restored(ended.state_dict()).table().columns == before
    assert ended.coarser(4, 99).rows.columns["step"][-1] == 28


def test_sums_of_halves_make_the_sum():
    for unit in (1, 3):
        values = [torch.tensor([0.1 * 3.0**i], dtype=torch.float64) for i in range(8 * unit)]
        whole, halves = PairwiseSum(8 * unit), [PairwiseSum(4 * unit), PairwiseSum(4 * unit)]
        for number, value in enumerate(values):
            whole.add(value)
            halves[number >= 4 * unit].add(value)
        assert torch.equal(whole.total(), halves[0].total() + halves[1].total())
        assert len(whole.parts) == 1


def test_equal_tables_give_equal_bytes(tmp_path):
    for name in "ab":
        log(20, 2).table().write(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert parquet.read_table(tmp_path / "a").column_names == list(Table().columns)
