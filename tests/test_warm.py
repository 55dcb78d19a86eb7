"""Jobs that a warm process runs: the same results, words, signals and ends as in their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from miniature import base

from study.arms import runs
from study.data.convert import convert
from study.spec.study import load
from study.warm import WORKFLOW, hand_over

ROOT = Path(__file__).parents[1]
OUTPUTS = ["weights.safetensors", "raw.safetensors", "dynamics.parquet"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has what it needs")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.zip"
    convert({**base()["dataset"], "max_images": 64}, path)
    return path


@pytest.fixture(scope="module")
def workflow():
    """A process whose jobs these are."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.communicate(b"\n")
    end = time.monotonic() + 20
    while (left := warm(process.pid)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left


def warm(workflow: int) -> list[psutil.Process]:
    """The living warm processes of a workflow, and the children that run its jobs."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if "study.warm" in words and str(workflow) in words:
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.create_time())


def command(data: Path, folder: Path, steps: int = 3, **training) -> list[str]:
    content = base()
    content["grid"] = {"backbone": ["uvit"], "skip_scaling": ["ls"], "target": ["dsm"]}
    content["backbones"] = {"uvit": {"options": {"embed_dim": 16, "depth": 2, "num_heads": 2}}}
    content["training"] = {"steps": steps, "batch": 8, "lr": 1e-3, **training}
    spec = next(iter(runs(load(content)).values())).spec
    return [
        *(sys.executable, "-m", "study", "train", "--spec", spec.key),
        *("--data", str(data), "--out", str(folder / "train"), "--state", str(folder / "state")),
        *("--threads", "1", "--gpus", "0", "--machine", '{"log_every":64,"save_every":0.2}'),
    ]


def start(command: list[str], workflow: int | str) -> subprocess.Popen:
    environment = {**os.environ, WORKFLOW: str(workflow)}
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **piped)


def finish(job: subprocess.Popen) -> tuple[int, str, str]:
    out, err = job.communicate(timeout=120)
    return job.returncode, out, err


def training(folder: Path) -> None:
    """Wait until a training has saved a checkpoint."""
    wait_until((folder / "state" / "checkpoint.pt").is_file)


def wait_until(holds) -> None:
    end = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "train" / name).read_bytes() for name in OUTPUTS}


def test_the_same_bytes_and_words_with_one_import(data, tmp_path, workflow):
    code, out, _ = finish(start(command(data, tmp_path / "cold"), ""))
    assert code == 0 and not warm(workflow.pid)
    for name in ("first", "second"):
        done = finish(start(command(data, tmp_path / name), workflow.pid))
        assert done[:2] == (0, out), done
        assert contents(tmp_path / name) == contents(tmp_path / "cold")
    (server,) = warm(workflow.pid)
    threads = sorted(
        path.read_text().strip() for path in Path(f"/proc/{server.pid}/task").glob("*/comm")
    )
    # jemalloc's, which pyarrow brings, knows of forks; a child could not use any other
    assert threads in (["python"], ["jemalloc_bg_thd", "python"])


def test_several_jobs_at_once(data, tmp_path, workflow):
    jobs = [start(command(data, tmp_path / str(n)), workflow.pid) for n in range(4)]
    assert [finish(job)[0] for job in jobs] == [0, 0, 0, 0]
    assert len({tuple(contents(tmp_path / str(n)).values()) for n in range(4)}) == 1
    assert len(warm(workflow.pid)) == 1


def test_a_mistake_is_the_same_line(data, tmp_path, workflow):
    wrong = command(tmp_path / "none.zip", tmp_path / "run")
    assert finish(start(wrong, workflow.pid)) == finish(start(wrong, ""))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_training(data, tmp_path, workflow, number):
    long = command(data, tmp_path, 100_000)
    job = start(long, workflow.pid)
    training(tmp_path)
    job.send_signal(number)
    code, _, err = finish(job)
    assert code == 75 and f"stopped by {number.name}" in err
    assert (tmp_path / "state" / "checkpoint.pt").is_file()
    assert not (tmp_path / "state" / "lock").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("after", [0.3, 1.0])
def test_a_signal_at_the_start_is_heard(data, tmp_path, number, code, after):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as workflow:
        job = start(command(data, tmp_path, 100_000), workflow.pid)
        time.sleep(after)  # the modules are being imported
        job.send_signal(number)
        status, out, err = finish(job)
        assert (status, out) in [(code, ""), (75, "")], err
        assert "Traceback" not in err and err.count("study: ") == 1
        workflow.communicate(b"\n")


def test_a_job_whose_warm_process_is_gone_hears_a_signal(data, tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as workflow:
        job = start(command(data, tmp_path, 100_000), workflow.pid)
        end = time.monotonic() + 20
        while not warm(workflow.pid) and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.3)
        job.send_signal(signal.SIGTERM)
        workflow.kill()
        assert finish(job)[0] in (75, -signal.SIGTERM)


def test_what_stops_a_job_stops_its_child(data, tmp_path, workflow):
    job = start(command(data, tmp_path, 100_000), workflow.pid)
    training(tmp_path)
    child = warm(workflow.pid)[-1]
    job.send_signal(signal.SIGTSTP)
    wait_until(lambda: child.status() == psutil.STATUS_STOPPED)
    job.send_signal(signal.SIGCONT)
    wait_until(lambda: child.status() != psutil.STATUS_STOPPED)
    job.terminate()
    assert finish(job)[0] == 75


def test_a_signal_that_is_ignored_stays_so(data, tmp_path, workflow):
    job = start(["nohup", *command(data, tmp_path, 100_000)], workflow.pid)
    training(tmp_path)
    job.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert job.poll() is None
    job.terminate()
    assert finish(job)[0] == 75


def test_a_job_that_is_killed_ends_at_once_and_goes_on(data, tmp_path, workflow):
    job = start(command(data, tmp_path / "run", 900), workflow.pid)
    training(tmp_path / "run")
    job.kill()
    finish(job)
    end = time.monotonic() + 20
    while len(warm(workflow.pid)) > 1 and time.monotonic() < end:
        time.sleep(0.05)
    assert len(warm(workflow.pid)) == 1
    assert finish(start(command(data, tmp_path / "run", 900), workflow.pid))[0] == 0
    assert finish(start(command(data, tmp_path / "whole", 900), ""))[0] == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_child_that_is_killed_kills_its_job(data, tmp_path, workflow):
    job = start(command(data, tmp_path, 100_000), workflow.pid)
    training(tmp_path)
    warm(workflow.pid)[-1].kill()
    assert finish(job)[0] == -signal.SIGKILL


def test_the_jobs_of_a_warm_process_outlive_it(data, tmp_path, workflow):
    job = start(command(data, tmp_path / "run", 900), workflow.pid)
    training(tmp_path / "run")
    warm(workflow.pid)[0].kill()
    assert finish(job)[0] == 0
    assert finish(start(command(data, tmp_path / "next", 900), workflow.pid))[0] == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "next")


def test_a_workflow_that_is_gone_changes_nothing(data, tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert finish(start(command(data, tmp_path / "run"), gone.pid))[0] == 0
    assert not warm(gone.pid)


@pytest.mark.parametrize(
    ("change", "handed"),
    [
        ({}, True),
        ({"--gpus": "1"}, False),
        ({"--threads": "2"}, False),
        ({"--machine": '{"processes":2}'}, False),
        ({"train": "schema"}, False),
    ],
)
def test_what_needs_a_process_of_its_own_has_one(
    data, tmp_path, change, handed, workflow, monkeypatch
):
    words, asked = command(data, tmp_path)[3:], []
    for key, value in change.items():
        words[words.index(key) + (key.startswith("--"))] = value
    monkeypatch.setattr(sys, "argv", ["study", *words])
    monkeypatch.setenv(WORKFLOW, str(workflow.pid))
    monkeypatch.setattr("study.warm._connect", asked.append)
    hand_over()
    assert bool(asked) == handed
