"""Launchers' variables, signals, and one training in several processes: kills, locks, ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import util
from pathlib import Path

import psutil
import pytest
from miniature import base

from study import processes
from study.arms import runs
from study.data.convert import convert
from study.files import UserError, read_json
from study.spec.study import load

ROOT = Path(__file__).parents[1]
OUTPUTS = ["weights.safetensors", "raw.safetensors", "dynamics.parquet"]

LAUNCHED = {
    "torchrun": "RANK=1 LOCAL_RANK=1 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 GROUP_RANK=0 ROLE_RANK=1 "
    "MASTER_ADDR=127.0.0.1 MASTER_PORT=29511 TORCHELASTIC_USE_AGENT_STORE=True",
    "MPI and Slurm": "PMI_SIZE=2 PMI_RANK=0 PMIX_RANK=0 OMPI_COMM_WORLD_SIZE=2 MPI_LOCALRANKID=1 "
    "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_LOCAL_RANK=1 MV2_COMM_WORLD_SIZE=2 "
    "SLURM_NTASKS=2 SLURM_PROCID=1 SLURM_LOCALID=1 SLURM_NNODES=2 GLOO_SOCKET_IFNAME=x0",
    "accelerate": "ACCELERATE_USE_CPU=false ACCELERATE_MIXED_PRECISION=bf16 "
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 ACCELERATE_DYNAMO_BACKEND=EAGER "
    "ACCELERATE_TORCH_DEVICE=meta ACCELERATE_USE_PARALLELISM_CONFIG=true "
    "PARALLELISM_CONFIG_DP_SHARD_SIZE=2 ACCELERATE_USE_FSDP=true FSDP_VERSION=2 "
    "ACCELERATE_USE_DEEPSPEED=true ACCELERATE_USE_MEGATRON_LM=true "
    "ACCELERATE_USE_SAGEMAKER=true LOCAL_RANK=0 ACCELERATE_CPU_AFFINITY=true",
    "nonsense": "RANK=x LOCAL_RANK=y WORLD_SIZE=z MASTER_PORT=p PMI_SIZE=many",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.zip"
    convert({**base()["dataset"], "max_images": 64}, path)
    return path


def spec(**training) -> dict:
    content = base()
    content["grid"] = {"backbone": ["uvit"], "skip_scaling": ["ls"], "target": ["dsm"]}
    content["backbones"] = {"uvit": {"options": {"embed_dim": 16, "depth": 2, "num_heads": 2}}}
    content["training"] = {"steps": 3, "batch": 8, "lr": 1e-3, **training}
    return next(iter(runs(load(content)).values())).spec


def command(data: Path, folder: Path, the_spec: dict, **machine) -> list[str]:
    return [
        *(sys.executable, "-m", "study", "train", "--spec", the_spec.key),
        *("--data", str(data), "--out", str(folder / "train"), "--state", str(folder / "state")),
        *("--threads", "2", "--gpus", "0", "--machine", json.dumps(machine)),
    ]


def finish(command: list[str], **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **variables}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "train" / name).read_bytes() for name in OUTPUTS}


def at_work(folder: Path) -> list[psutil.Process]:
    """The living processes of a training, in the order in which they were started."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = str(folder / "state") in process.cmdline()
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.pid)


def wait_for(condition, seconds: float = 120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# --- launchers' variables --------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    done = finish(command(data, folder, spec()))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("launcher", LAUNCHED)
def test_a_launchers_variables_change_nothing(data, plain, tmp_path, launcher):
    variables = dict(pair.split("=") for pair in LAUNCHED[launcher].split())
    done = finish(command(data, tmp_path, spec()), **variables)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(plain)
    assert read_json(tmp_path / "train/status.json")["processes"] == 1


def test_a_caller_in_python_keeps_its_variables(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    before = dict(os.environ)
    with processes.own_environment():
        assert not {"RANK", "ACCELERATE_MIXED_PRECISION"} & set(os.environ)
        with processes.own_environment():
            pass
    assert dict(os.environ) == before


def test_no_variable_that_decides_how_accelerate_runs_is_unknown():
    """Fails where a new accelerate reads more of them: sort them into ``study.processes``."""
    harmless = {
        *("OMP_NUM_THREADS", "KMP_AFFINITY", "KMP_BLOCKTIME", "PYTORCH_ENABLE_MPS_FALLBACK"),
        *("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "PT_HPU_LAZY_MODE", "CUDA_VISIBLE_DEVICES"),
    }
    folder = Path(util.find_spec("accelerate").origin).parent
    modules = ("state", "accelerator", "parallelism_config", "utils/environment")
    text = "".join((folder / f"{module}.py").read_text() for module in modules)
    found = set(re.findall(r"environ(?:\.get)?[(\[]\s*\"([A-Z][A-Z0-9_]+)\"", text))
    found |= set(re.findall(r"parse_\w+_from_env\(\s*\"([A-Z][A-Z0-9_]+)\"", text))
    for names in re.findall(r"get_int_from_env\(\s*\[([^\]]+)\]", text):
        found |= set(re.findall(r"\"(\w+)\"", names))
    assert {"LOCAL_RANK", "PMI_SIZE", "ACCELERATE_USE_FSDP"} <= found
    unknown = {
        name
        for name in found - harmless
        if name not in processes.LAUNCHED and not name.startswith(processes.LAUNCHERS)
    }
    assert unknown == {"FOO"}  # of a docstring


# --- signals ---------------------------------------------------------------------------------


def test_a_signal_that_is_ignored_stays_ignored():
    before = {number: signal.getsignal(number) for number in processes.STOP_SIGNALS}
    noted = []
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        processes.listen(lambda number, _frame: noted.append(number))
        for number in processes.STOP_SIGNALS:
            os.kill(os.getpid(), number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert noted == [number for number in processes.STOP_SIGNALS if number != signal.SIGHUP]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_other_stages_leave_at_once_and_half_written_nothing(data, plain, tmp_path, name):
    shutil.copytree(plain / "train", tmp_path / "train")
    wanted = '{"sampler": {"kind": "edm_heun", "steps": 1000}, "images": 64}'
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "study", "generate", "--run-dir", str(tmp_path)),
            *("--measurement", wanted, "--batch", "1", "--data", str(data), "--gpus", "0"),
            *("--out", str(tmp_path / "measurements/m"), "--threads", "1"),
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    part = tmp_path / "state/measurements/m/00000000.npz"
    wait_for(part.exists)
    process.send_signal(getattr(signal, name))
    said = process.communicate(timeout=60)[1]
    assert "Traceback" not in said
    if name == "SIGINT":
        assert process.returncode == 130
    else:
        assert process.returncode == processes.STOPPED
        assert said.endswith(f"study: stopped by {name}; the same command goes on\n")
    assert not list((tmp_path / "measurements/m").iterdir())
    assert not [path for path in (tmp_path / "state").rglob("*") if ".writing" in path.name]
    assert not (tmp_path / "state/lock").exists()
    assert part.exists()


# --- several processes -----------------------------------------------------------------------


def test_two_processes_are_killed_anyhow_and_end_in_the_same_bytes(data, tmp_path):
    long, machine = spec(steps=300), {"processes": 2, "save_every": 0.05}
    done = finish(command(data, tmp_path / "whole", long, **machine))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done at step 300") == 1
    folder = tmp_path / "killed"
    saved = folder / "state/checkpoint.pt"
    moments = [
        (os.kill, signal.SIGKILL, -9),  # the launcher alone
        (os.killpg, signal.SIGKILL, -9),
        (os.kill, signal.SIGUSR1, 75),
        (os.killpg, signal.SIGHUP, 75),
        (None, signal.SIGKILL, 1),  # one of the two
    ]
    for kill, number, expected in moments:
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        process = subprocess.Popen(
            command(data, folder, long, **machine),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        wait_for(lambda before=before: saved.exists() and saved.stat().st_mtime_ns > before)
        if kill is None:
            at_work(folder)[-1].kill()
        else:
            kill(process.pid, number)
        said = process.communicate(timeout=30)[1]
        wait_for(lambda: not at_work(folder), 10)
        lines = re.findall("^study:.*", said, re.MULTILINE)
        assert process.returncode == expected, said
        assert "Traceback" not in said
        assert len(lines) == (0 if expected == -9 else 1)
        if expected == 75:
            name = signal.Signals(number).name
            assert re.match(rf"study: stopped by {name} at step \d+ of 300; the same", lines[0])
        if expected == 1:
            assert lines[0].startswith("study: process 1 of 2 was killed (SIGKILL)")
        assert not (folder / "train").exists()
    done = finish(command(data, folder, long, **machine))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resumed at step") == 1
    assert contents(folder) == contents(tmp_path / "whole")
    assert {path.name for path in (folder / "state").iterdir()} == {
        "checkpoint.pt",
        "lineage.json",
        "progress.json",
    }


SLOW = """
import time
from study import processes
from study.training import checkpoint

make, save, processes.AFTER = checkpoint.Saver.__init__, checkpoint.save, 1.0
checkpoint.Saver.__init__ = lambda self, folder, beside: make(self, folder, beside=True)
checkpoint.save = lambda *given: (time.sleep(4), save(*given))
"""


def test_a_checkpoint_that_is_written_beside_the_training_outlasts_the_other_processes(
    data, tmp_path
):
    (tmp_path / "sitecustomize.py").write_text(SLOW, encoding="utf-8")
    process = subprocess.Popen(
        command(data, tmp_path / "run", spec(steps=100_000), processes=2),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for((tmp_path / "run/state/progress.json").exists)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    assert "stopped by SIGTERM at step" in said
    assert (tmp_path / "run/state/checkpoint.pt").is_file()


def test_a_mistake_that_all_processes_find_is_one_line(data, tmp_path):
    done = finish(command(data, tmp_path, spec(precision="fp16"), processes=2))
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "fp16" in line] == [
        "study: training.precision: fp16 needs a GPU, but this job runs on cpu; use fp32 or bf16"
    ]
    assert "Traceback" not in done.stderr


RANK = """
import os, sys, time
from study import processes
processes.join()
rank = processes.place().rank
spoken, what = sys.argv[1], sys.argv[2 + rank]
while rank and not os.path.exists(spoken):
    time.sleep(0.01)
print(f"{rank} speaks", file=sys.stderr, flush=True)
open(spoken, "a").close()
if what == "stays":
    time.sleep(600)
if what == "killed":
    os.kill(os.getpid(), 9)
sys.exit(int(what))
"""


@pytest.mark.parametrize(
    ("ends", "status", "said"),
    [
        (["0", "0"], 0, ["0 speaks"]),
        (["2", "2"], 2, ["0 speaks"]),
        (["stays", "1"], 1, ["0 speaks", "1 speaks"]),
        (["75", "75"], 75, ["0 speaks"]),
        (["75", "stays"], 75, ["0 speaks"]),
        (["1", "75"], 75, ["0 speaks"]),  # it failed because the other one had left
        (["130", "130"], 75, ["0 speaks"]),
        (["0", "stays"], 0, ["0 speaks"]),
        (["stays", "killed"], 1, ["0 speaks", "", "study: process 1 of 2 was killed (SIGKILL) "]),
    ],
)
def test_processes_end_together_and_speak_once(tmp_path, ends, status, said):
    program = (
        "import sys; from study import processes; processes.AFTER = 3.0\n"
        "sys.exit(processes.launch([sys.executable, '-c', *sys.argv[1:]], 2))"
    )
    done = finish([sys.executable, "-c", program, RANK, str(tmp_path / "spoken"), *ends])
    assert done.returncode == status
    lines = done.stderr.splitlines()
    assert [line[: len(start)] for line, start in zip(lines, said, strict=True)] == said


def test_what_processes_cannot_share_is_refused_before_anything_starts(data, tmp_path):
    content = base() | {"machine": {"processes": 3}}
    with pytest.raises(UserError, match=r"training\.batch: 8 images cannot be shared by 3 proc"):
        runs(load(content))
    content["machine"] = {"processes": 2, "gpus": 1}
    with pytest.raises(UserError, match=r"machine\.processes: 2 processes need a GPU each"):
        runs(load(content))
    content["machine"] = {"processes": 2, "gpus": 2}
    assert runs(load(content))
    done = finish(command(data, tmp_path, spec(), processes=3))
    assert done.returncode == 2
    assert done.stderr == (
        "study: training.batch: 8 images cannot be shared by 3 processes; take a multiple\n"
    )
    assert not (tmp_path / "state").exists()


# --- xformers --------------------------------------------------------------------------------


def test_no_job_loads_xformers_unasked(data, tmp_path):
    arguments = command(data, tmp_path, spec())[1:]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "study.training.loop" in done.stderr
    assert "xformers" not in done.stderr


def test_xformers_without_a_gpu_is_one_line_before_anything_starts(data, tmp_path):
    content = base()
    content["training"]["attention"] = "xformers"
    with pytest.raises(UserError, match=r"xformers needs an NVIDIA GPU, but machine\.gpus is 0"):
        runs(load(content))
    assert runs(load(content | {"machine": {"gpus": 1}}))
    by_hand = spec().changed(training={"attention": "xformers"})
    done = finish(command(data, tmp_path, by_hand))
    assert done.returncode == 2
    assert done.stderr.startswith("study: training.attention: xformers needs an NVIDIA GPU")
    assert done.stderr.count("\n") == 1
