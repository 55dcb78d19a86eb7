"""Training: exact resuming, divergence as a result, the same numbers however it is run."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pyarrow.parquet as parquet
import pytest
import torch
from miniature import base
from safetensors.torch import load_file

from study.ahead import Ahead
from study.arms import runs
from study.averaging import BEGUN, decay, initial_share, remark
from study.data import Archive, order
from study.data.convert import convert
from study.files import UserError, read_json
from study.spec.run import Identity
from study.spec.study import load
from study.spec.training import Ema as Average
from study.training import Interrupted, checkpoint, train
from study.training.batches import Batches
from study.training.divergence import Watch
from study.training.ema import Ema
from study.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
OUTPUTS = ["weights.safetensors", "raw.safetensors", "dynamics.parquet"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.zip"
    convert({**base()["dataset"], "max_images": 64}, path)
    return path


def spec(target: str = "stf(16)", scaling: str = "ls", **training) -> dict:
    content = base()
    content["grid"] = {"backbone": ["uvit"], "skip_scaling": [scaling], "target": [target]}
    content["backbones"] = {"uvit": {"options": {"embed_dim": 16, "depth": 4, "num_heads": 2}}}
    content["training"] = {"steps": 6, "batch": 8, "lr": 1e-3, "warmup": 2, **training}
    return next(iter(runs(load(content)).values())).spec


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def run(tmp_path: Path, data: Path, the_spec: dict, name: str = "a", **more):
    return train(
        the_spec, data, tmp_path / name / "train", tmp_path / name / "state", threads=1, **more
    )


def test_a_run_leaves_weights_dynamics_and_status(tmp_path, data):
    status = run(tmp_path, data, spec())
    out = tmp_path / "a/train"
    assert read_json(out / "status.json")["status"] == status["status"] == "done"
    assert status["step"] == status["steps"] == 6
    assert status["skips"] == 2
    assert status["skip_factors"] is None
    assert status["images_seen"] == 48
    table = parquet.read_table(out / "dynamics.parquet").to_pandas()
    assert {"loss", "loss_by_noise", "grad_norm", "grad_norm_block", "skip_norm", "lr"} <= set(
        table.quantity
    )
    assert {"skip_norm_scaled", "decoder_norm_before", "decoder_norm_after"} <= set(table.quantity)
    assert {"gate_mean", "gate_std", "update_ratio"} <= set(table.quantity)
    assert set(table[table.quantity == "gate_mean"]["where"]) == {"1", "2"}
    assert table["value"].map(math.isfinite).all()
    rates = table[table.quantity == "lr"].value.tolist()
    assert rates == pytest.approx([0, 5e-4, 1e-3, 1e-3, 1e-3, 1e-3])


def test_scaled_norms_are_the_factors_times_the_norms(tmp_path, data):
    status = run(tmp_path, data, spec(scaling="cs(0.5)"))
    assert status["skip_factors"] == [1.0, 0.5]
    table = parquet.read_table(tmp_path / "a/train/dynamics.parquet").to_pandas()
    table = table.set_index(["quantity", "where", "step"]).value.sort_index()
    for index, factor in (("1", 1.0), ("2", 0.5)):
        ratio = table["skip_norm_scaled", index] / table["skip_norm", index]
        assert ratio.to_numpy() == pytest.approx(factor)


def test_an_interrupted_run_gives_the_same_bytes(tmp_path, data):
    whole, stop = spec(), tmp_path / "stop"
    run(tmp_path, data, whole, "whole")
    stop.touch()
    for expected in (1, 2, 3):
        with pytest.raises(Interrupted, match=f"at step {expected} of 6; the same command"):
            run(tmp_path, data, whole, "parts", stop_file=stop)
        assert not (tmp_path / "parts/train/status.json").exists()
    stop.unlink()
    run(tmp_path, data, whole, "parts", stop_file=stop)
    assert contents(tmp_path / "whole/train") == contents(tmp_path / "parts/train")


def test_the_same_spec_gives_the_same_bytes_and_another_seed_does_not(tmp_path, data):
    run(tmp_path, data, spec(), "a")
    run(tmp_path, data, spec(), "b")
    assert contents(tmp_path / "a/train") == contents(tmp_path / "b/train")
    other = spec().changed(seeds={"noise": 1})
    run(tmp_path, data, other, "c")
    assert contents(tmp_path / "a/train") != contents(tmp_path / "c/train")


def test_a_killed_run_resumes_from_its_checkpoint(tmp_path, data):
    whole = spec(steps=150)
    run(tmp_path, data, whole, "whole")
    command = [sys.executable, "-m", "study", "train", "--spec", whole.key]
    command += ["--data", str(data), "--out", str(tmp_path / "k/train"), "--threads", "1"]
    command += ["--state", str(tmp_path / "k/state"), "--machine", '{"save_every": 0.1}']
    process = subprocess.Popen(command, cwd=ROOT)
    saved = tmp_path / "k/state/checkpoint.pt"
    deadline = time.monotonic() + 60
    while not saved.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = torch.load(saved, weights_only=True)["step"]
    assert 0 < step < 150
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"resumed at step {step} of 150" in finished.stdout
    assert contents(tmp_path / "whole/train") == contents(tmp_path / "k/train")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_a_checkpoint_and_leaves(tmp_path, data, name):
    command = [sys.executable, "-m", "study", "train", "--spec", spec(steps=100000).key]
    command += ["--data", str(data), "--out", str(tmp_path / "k/train"), "--threads", "1"]
    command += ["--state", str(tmp_path / "k/state")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "k/state/progress.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert f"stopped by {name} at step" in errors
    assert (tmp_path / "k/state/checkpoint.pt").exists()


def test_a_checkpoint_of_other_settings_is_set_aside_not_used(tmp_path, data, capsys):
    run(tmp_path, data, spec(), "a", code="old")
    status = run(tmp_path, data, spec(), "a", code="new")
    assert status["step"] == 6
    assert "resumed" not in capsys.readouterr().out.split("set aside as checkpoint.1.pt")[1]
    assert (tmp_path / "a/state/checkpoint.1.pt").exists()


def test_the_newest_checkpoint_set_aside_is_kept_and_taken_back(tmp_path, data, capsys):
    state, stop = tmp_path / "a/state", tmp_path / "stop"

    def step_of(code: str) -> int:
        with pytest.raises(Interrupted) as interrupted:
            run(tmp_path, data, spec(), "a", code=code, stop_file=stop)
        return int(re.search(r"at step (\d+)", str(interrupted.value))[1])

    stop.touch()
    assert [step_of("old"), step_of("new"), step_of("old"), step_of("new")] == [1, 1, 2, 2]
    assert (
        "checkpoint.1.pt is of these settings, code and data; taken back" in capsys.readouterr().out
    )
    assert len(list(state.glob("checkpoint.*.pt"))) == 1
    assert [step_of("third"), step_of("fourth")] == [1, 1]
    assert "set aside later, is kept" in capsys.readouterr().out
    assert len(list(state.glob("checkpoint.*.pt"))) == 1
    # Killed between the two renames: nothing is lost.
    (state / "checkpoint.pt").rename(state / "checkpoint.7.pt")
    assert step_of("fourth") == 2


def test_a_damaged_checkpoint_is_named(tmp_path, data):
    (tmp_path / "a/state").mkdir(parents=True)
    (tmp_path / "a/state" / checkpoint.NAME).write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"not a checkpoint .* move it away to start anew"):
        run(tmp_path, data, spec())


@pytest.mark.parametrize("part", ["model", "watch", "step"])
def test_a_checkpoint_without_one_of_its_parts_is_named(tmp_path, data, part):
    run(tmp_path, data, spec(), "a")
    path = tmp_path / "a/state" / checkpoint.NAME
    state = torch.load(path, weights_only=True)
    del state[part]
    torch.save(state, path)
    with pytest.raises(UserError, match=r"not a whole checkpoint .* move it away to start anew"):
        run(tmp_path, data, spec(), "a")
    path.rename(path.with_suffix(".away"))
    assert run(tmp_path, data, spec(), "a")["step"] == 6


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_give_the_same_numbers_within_rounding(tmp_path, data, size):
    run(tmp_path, data, spec(), "a")
    run(tmp_path, data, spec(), "b", machine={"micro_batch": size})
    one = load_file(tmp_path / "a/train/raw.safetensors")
    other = load_file(tmp_path / "b/train/raw.safetensors")
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=2e-5)


def test_two_processes_give_the_same_numbers_as_one(tmp_path, data):
    run(tmp_path, data, spec(), "one")
    command = [sys.executable, "-m", "study", "train", "--spec", spec().key]
    command += ["--data", str(data), "--out", str(tmp_path / "two/train"), "--threads", "2"]
    command += ["--state", str(tmp_path / "two/state"), "--machine", '{"processes": 2}']
    command += ["--gpus", "0"]  # also on a machine with one GPU
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "two/train/status.json")["processes"] == 2
    one = load_file(tmp_path / "one/train/raw.safetensors")
    two = load_file(tmp_path / "two/train/raw.safetensors")
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=2e-5)
    log = [
        parquet.read_table(tmp_path / name / "train/dynamics.parquet").to_pandas()
        for name in ("one", "two")
    ]
    losses = [table[table.quantity == "loss"].value.to_numpy() for table in log]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_next_batch_is_made_while_a_step_is_at_work():
    made, going_on = [], threading.Event()

    def make(step: int) -> dict:
        made.append((step, threading.current_thread() is threading.main_thread()))
        going_on.set()
        return {"step": step}

    batches = Ahead(make, 6)
    for step in (0, 1, 2, 4, 5):
        going_on.clear()
        assert batches(step) == {"step": step}
        assert step == 5 or going_on.wait(10)
    # 3 was made in vain: nobody asked for it. After the last step there is no further one.
    assert sorted(made) == [(0, True), (1, False), (2, False), (3, False), (4, True), (5, False)]


@pytest.mark.parametrize("target", ["dsm", "stf(16)"])
def test_batches_that_are_made_ahead_are_the_same(tmp_path, data, monkeypatch, target):
    one = spec(target, flip=True)
    run(tmp_path, data, one, "plain")
    monkeypatch.setattr("study.training.trainer.Ahead", lambda make, _: Ahead(make, one.steps))
    run(tmp_path, data, one, "ahead")
    assert contents(tmp_path / "ahead/train") == contents(tmp_path / "plain/train")


def test_what_fails_in_making_a_batch_fails_in_its_step():
    def make(step: int) -> dict:
        raise UserError(f"{step}: damaged")

    batches = Ahead(make, 3)
    with pytest.raises(UserError, match="0: damaged"):
        batches(0)
    batches = Ahead(lambda step: make(step) if step else {}, 3)
    batches(0)
    with pytest.raises(UserError, match="1: damaged"):
        batches(1)


def test_a_checkpoint_beside_the_training_is_of_the_moment_when_it_was_asked_for(tmp_path):
    weights, columns = torch.zeros(4), {"step": [0]}
    saver = checkpoint.Saver(tmp_path, beside=True)
    saver.save({"spec": "x"}, {"step": 1, "model": {"w": weights}, "log": columns})
    weights.fill_(7)
    columns["step"].append(1)
    saver.wait()
    state = checkpoint.load(tmp_path, {"spec": "x"})
    assert state["model"]["w"].tolist() == [0] * 4 and state["log"] == {"step": [0]}


def test_a_checkpoint_that_cannot_be_written_is_not_passed_over(tmp_path, monkeypatch):
    saver = checkpoint.Saver(tmp_path, beside=True)
    monkeypatch.setattr(checkpoint, "save", Mock(side_effect=OSError(28, "no room")))
    saver.save({}, {"step": 1})
    with pytest.raises(OSError, match="no room"):
        saver.save({}, {"step": 2})


def test_checkpoints_that_take_long_are_few(tmp_path, data, monkeypatch):
    saved, machine = [], {"save_every": 1e-9}

    def save(self, identity, state):
        saved.append(state["step"])
        self.seconds = 1e-9 if len(saved) < 3 else 1e9

    monkeypatch.setattr(checkpoint.Saver, "save", save)
    run(tmp_path, data, spec(), machine=machine)
    assert saved == [1, 2, 3, 6]  # the last one is of the end


def network_spec(family: str, **training):
    content = base()
    content["grid"] = {"backbone": [family], "skip_scaling": ["ls"], "target": ["dsm"]}
    options = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    entry = {"options": options} if family == "uvit" else {"preset": "tiny"}
    content["backbones"] = {family: entry}
    content["training"] = {"steps": 4, "batch": 8, "lr": 1e-3, **training}
    return next(iter(runs(load(content)).values())).spec


def logged(folder: Path) -> list[float]:
    table = parquet.read_table(folder / "train/dynamics.parquet").to_pandas()
    return table.value.tolist()


@pytest.mark.parametrize(
    ("key", "family"),
    [
        pytest.param(
            *("compile", "uvit"),
            marks=pytest.mark.skipif(shutil.which("g++") is None, reason="takes a C++ compiler"),
        ),
        ("channels_last", "patch_unet"),
        ("cudnn_benchmark", "patch_unet"),
    ],
)
def test_a_key_of_speed_changes_rounding_alone(tmp_path, data, key, family):
    one, frames = network_spec(family), torch._dynamo.utils.counters["frames"]
    run(tmp_path, data, one, "plain", machine={"log_every": 3})
    compiled = frames["ok"]
    run(tmp_path, data, one, "fast", machine={key: True, "log_every": 3})
    assert logged(tmp_path / "fast") == pytest.approx(logged(tmp_path / "plain"), 2e-3, 1e-6)
    assert (frames["ok"] > compiled) == (key == "compile")
    assert torch.backends.cudnn.benchmark == (key == "cudnn_benchmark")
    torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize("first", [True, False])
def test_a_training_goes_on_with_its_weights_in_another_order(tmp_path, data, monkeypatch, first):
    one, stop = network_spec("patch_unet", steps=6), tmp_path / "stop"
    run(tmp_path, data, one, "plain", machine={"log_every": 1})
    orders = []
    make = Trainer.__init__

    def noted(self, *given):
        make(self, *given)
        kernel = next(p for p in self.parameters if p.dim() == 4 and min(p.shape) > 1)
        orders.append(kernel.is_contiguous(memory_format=torch.channels_last))

    monkeypatch.setattr(Trainer, "__init__", noted)
    stop.touch()
    machine = {"log_every": 1, "channels_last": first}
    with pytest.raises(Interrupted):
        run(tmp_path, data, one, "turned", machine=machine, stop_file=stop)
    machine = {"log_every": 1, "channels_last": not first}
    run(tmp_path, data, one, "turned", machine=machine)
    assert orders == [first, not first]
    assert logged(tmp_path / "turned") == pytest.approx(logged(tmp_path / "plain"), 5e-3, 1e-6)


def test_a_network_that_cannot_be_compiled_is_one_line(tmp_path, data, monkeypatch):
    def broken(model):
        return torch.compile(model, backend=lambda *_: 1 / 0)

    monkeypatch.setattr("study.training.trainer._compiled", broken)
    with pytest.raises(UserError, match=r"^machine.compile: torch cannot compile .* leave compile"):
        run(tmp_path, data, network_spec("uvit"), machine={"compile": True, "log_every": 3})


class Recording(Archive):
    """An archive that notes which entries it was asked for."""

    def images(self, indices=None):
        self.asked = [*vars(self).get("asked", ()), [] if indices is None else list(indices)]
        return super().images(indices)


@pytest.mark.parametrize("target", ["dsm", "stf(16)"])
@pytest.mark.parametrize("augment", [0.0, 0.5])
def test_a_process_draws_its_rows_of_the_batch(data, target, augment):
    one = spec(target, flip=True, conditional=True, label_dropout=0.5)
    one = one.changed(training={"augment": augment})
    archive, device = Recording(data), torch.device("cpu")
    whole = Batches(archive, one, device, slice(0, 8), False, 2)(3)
    others = []
    for rows in (slice(0, 4), slice(4, 8)):
        archive.asked = []
        part = Batches(archive, one, device, rows, False, 2)(3)
        assert archive.asked[0] == order(0, 24, 8, 64)[rows].tolist()
        others.append(part.pop("others"))
        assert len(archive.asked) == (1 if target == "dsm" else 2)
        assert part["labels"] is not None
        assert (part["augment_labels"] is not None) == bool(augment)
        for key, value in part.items():
            assert value is whole[key] is None or torch.equal(value, whole[key][rows]), key
    if target != "dsm":
        assert [len(one) for one in others] == [4, 4]
        assert torch.equal(torch.cat(others), whole["others"])


def test_divergence_is_a_result(tmp_path, data):
    status = run(tmp_path, data, spec(lr=1e3, warmup=0, steps=50))
    assert status["status"] == "diverged"
    assert status["step"] < 50
    assert status["reason"] in ("loss spike", "non-finite loss", "non-finite gradient")
    assert math.isfinite(status["last_finite"]["loss"])
    assert read_json(tmp_path / "a/train/status.json")["status"] == "diverged"
    assert all((tmp_path / "a/train" / name).exists() for name in OUTPUTS)


def test_watch_tells_spikes_from_noise():
    watch = Watch(factor=5.0)
    assert all(watch.step(i, 1.0 + 0.5 * (-1) ** i, 1.0) is None for i in range(100))
    reasons = [watch.step(100 + i, 50.0, 1.0) for i in range(20)]
    assert "loss spike" in reasons
    assert watch.step(200, math.nan, 1.0) == "non-finite loss"
    assert watch.step(200, 1.0, math.inf) == "non-finite gradient"
    patient = Watch(factor=None, skips=2)
    assert [patient.step(i, 1.0, math.inf) for i in range(3)] == [None, None, "non-finite gradient"]


def test_a_batch_that_processes_cannot_share_and_a_reference_too_large(tmp_path, data):
    with pytest.raises(UserError, match=r"stf\(100\): data set .* has only 64 images"):
        run(tmp_path, data, spec(target="stf(100)"))


def test_clipping_bounds_the_update(tmp_path, data):
    free = run(tmp_path, data, spec(optimizer="adam"), "a")
    clipped = run(tmp_path, data, spec(optimizer="adam", clip=1e-6), "b")
    assert free["status"] == clipped["status"] == "done"
    assert contents(tmp_path / "a/train") != contents(tmp_path / "b/train")


def test_ema_by_rate_and_by_half_life():
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    ema = Ema(module)
    torch.nn.init.ones_(module.weight)
    ema.update(decay(Average(rate=0.9), 8, 8))
    assert ema.state_dict()["weight"].item() == pytest.approx(0.1)
    halflife = Average(halflife=100)
    assert decay(halflife, 100, 10**6) == pytest.approx(0.5)
    assert decay(Average(halflife=100, rampup=0.05), 100, 1000) == pytest.approx(0.25)


def test_a_rate_that_ramps_up_forgets_the_start():
    ramped = Average(rate=0.99, rampup=0.05)
    assert decay(ramped, 8, 0) == 0.0
    assert decay(ramped, 8, 8 * 20) == pytest.approx(0.5)  # a twentieth of 20 steps is one
    assert decay(ramped, 8, 8 * 10**6) == decay(Average(rate=0.99), 8, 0) == 0.99
    assert decay(Average(rate=0.99), 8, 8) == 0.99


@pytest.mark.parametrize(
    ("ema", "share"),
    [
        ({"rate": 0.9999}, 0.9999**400),
        ({"rate": 0.99}, 0.99**400),
        ({"halflife": 500_000.0}, 0.5 ** (400 * 32 / 500_000)),
        ({"rate": 0.9999, "rampup": 0.05}, 0.0),
        ({"halflife": 500_000.0, "rampup": 0.05}, 0.0),
    ],
)
def test_what_an_average_holds_of_the_start_is_the_product_of_its_decays(ema, share):
    average = Average(**ema)
    found = initial_share(average, 32, 400)
    product = math.prod(decay(average, 32, 32 * step) for step in range(1, 400))
    assert found == pytest.approx(share, abs=BEGUN)
    assert product == pytest.approx(share, abs=BEGUN)
    text = remark(spec(steps=400, batch=16, ema=ema))
    assert bool(text) == (initial_share(average, 16, 400) >= BEGUN)


def test_a_remark_is_of_one_average_at_one_step():
    one = spec(steps=400, batch=16, ema=[{"rate": 0.9999, "rampup": 0.05}, {"rate": 0.99}])
    assert remark(one) == remark(one, "raw") == ""
    assert remark(one, "ema2") == "the average ema2 still holds 2 % of the initial weights"
    assert remark(one, "ema2", 50) == "the average ema2 still holds 61 % of the initial weights"
    assert remark(one, step=0) == "the average still holds 100 % of the initial weights"


def test_models_of_splits_are_averaged_over_their_own_steps():
    content = base()
    content["formulation"] = {"kind": "ddpm", "splits": [1.0]}
    lists = [{"split": 0, "steps": 20}, {"split": 1, "steps": 600}]
    content["training"] |= {"ema": {"rate": 0.99}, "models": lists}
    one = next(iter(runs(load(content)).values())).spec
    assert remark(one) == "the average still holds 82 % of the initial weights"
    # At step 120 the first has had its 20 steps, and the other 100.
    assert remark(one, step=120) == "the average still holds 82 % of the initial weights"
    assert remark(one, step=10) == "the average still holds 100 % of the initial weights"
    imported = one.model_copy(update={"checkpoint": Identity(name="theirs")})
    assert remark(imported) == ""


def test_the_default_average_is_one_of_trained_weights(tmp_path, data):
    run(tmp_path, data, spec(steps=1, warmup=0), "start")  # after a step from the start
    moved = {}
    for name, more in (("default", {}), ("fixed", {"ema": {"rate": 0.9999}})):
        run(tmp_path, data, spec(steps=40, warmup=0, **more), name)
        start = load_file(tmp_path / "start/train/raw.safetensors")
        weights = load_file(tmp_path / name / "train/weights.safetensors")
        raw = load_file(tmp_path / name / "train/raw.safetensors")
        distance = [
            sum(float((one[key] - start[key]).square().sum()) for key in start) ** 0.5
            for one in (weights, raw)
        ]
        moved[name] = distance[0] / distance[1]
    assert moved["default"] > 0.8
    assert moved["fixed"] < 0.1


def test_flip_and_conditional_change_what_is_learned(tmp_path, data):
    run(tmp_path, data, spec(), "plain")
    run(tmp_path, data, spec(flip=True), "flip")
    run(tmp_path, data, spec(conditional=True, label_dropout=0.5), "conditional")
    assert contents(tmp_path / "plain/train") != contents(tmp_path / "flip/train")
    weights = load_file(tmp_path / "conditional/train/raw.safetensors")
    assert weights["label_emb.weight"].shape[0] == 11


NEVER_THE_SAME = """
import torch
from study.backbones.uvit import UViT


class Odd(UViT):
    def forward(self, x, noise, label=None):
        x = x.clone().put_(torch.zeros(1, dtype=torch.long), x.flatten()[:1])
        return super().forward(x, noise, label)
"""


def test_an_operation_without_a_kernel_that_repeats_is_used_and_told(
    tmp_path, data, capsys, monkeypatch
):
    (tmp_path / "odd.py").write_text(NEVER_THE_SAME, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    content = base()
    content["grid"] = {"backbone": ["odd"], "skip_scaling": ["none"], "target": ["dsm"]}
    options = {"patch_size": 2, "embed_dim": 16, "depth": 4, "num_heads": 2}
    options |= {"skip": True, "null_label": True}
    content["backbones"] = {"odd": {"family": "odd:Odd", "options": options}}
    content["training"] = {"steps": 3, "batch": 8, "lr": 1e-3}
    odd = next(iter(runs(load(content)).values())).spec
    assert run(tmp_path, data, odd)["status"] == "done"
    told = [line for line in capsys.readouterr().err.splitlines() if "last bits" in line]
    assert len(told) == 1 and "put_" in told[0]
    assert not torch.are_deterministic_algorithms_enabled()
    table = parquet.read_table(tmp_path / "a/train/dynamics.parquet").to_pandas()
    norms = table[(table.quantity == "decoder_frobenius_after") & (table["where"] == "1")]
    first, second = norms.value.iloc[:2]  # the first step was taken twice, and is logged once
    assert first == pytest.approx(second, rel=0.2)
