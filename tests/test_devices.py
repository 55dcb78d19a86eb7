"""GPU slots: never shared by accident, never leaked. Folders: one living job in each."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from study.files import UserError
from study.ledger import devices

JOB = """
import os, sys, time
from study.ledger.devices import acquire

slots, log, seconds, n, share = sys.argv[1:]
with acquire(int(n), slots, int(share), poll=0.01) as taken:
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join(taken)
    for name in taken:
        os.write(file, f"+ {name}\\n".encode())
    time.sleep(float(seconds))
    for name in taken:
        os.write(file, f"- {name}\\n".encode())
"""


@pytest.fixture(autouse=True)
def no_driver(monkeypatch):
    """The tests' devices are names; no driver is asked."""
    monkeypatch.setattr(devices, "_uuids", lambda: ())
    monkeypatch.delenv(devices.MASK, raising=False)
    monkeypatch.delenv(devices.HELD, raising=False)
    monkeypatch.delenv("LONGSKIP_JOBS_PER_GPU", raising=False)


def start(folder: Path, mask: str, seconds: float = 0.05, n: int = 1, share: int = 1):
    return subprocess.Popen(
        [sys.executable, "-c", JOB, str(folder / "slots"), str(folder / "log")]
        + [str(value) for value in (seconds, n, share)],
        env={**os.environ, devices.MASK: mask},
        cwd=Path(devices.__file__).parents[1],
    )


def most_at_once(log: Path) -> dict[str, int]:
    """Largest number of jobs that each device had at the same time."""
    now, most = Counter(), Counter()
    for line in log.read_text().splitlines():
        sign, name = line.split()
        now[name] += 1 if sign == "+" else -1
        most[name] = max(most[name], now[name])
    return dict(most)


def wait_for(condition, seconds: float = 20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_eight_jobs_and_a_killed_holder_on_two_slots(tmp_path):
    holder = start(tmp_path, "0,1", seconds=600)
    log = tmp_path / "log"
    wait_for(lambda: log.exists() and log.read_text())
    held = log.read_text().split()[1]
    jobs = [start(tmp_path, "0,1") for _ in range(8)]
    wait_for(lambda: len(log.read_text().splitlines()) > 2)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with log.open("a") as file:
        file.write(f"- {held}\n")
    assert [job.wait(30) for job in jobs] == [0] * 8
    assert most_at_once(log) == {"0": 1, "1": 1}
    # Nothing leaked: both slots can be had at once.
    with devices.acquire(2, tmp_path / "slots", devices=["0", "1"]) as taken:
        assert taken == ["0", "1"]


def test_a_job_that_needs_all_devices_is_served(tmp_path):
    jobs = [start(tmp_path, "0,1,2", n=n) for n in (1, 3, 1, 2, 3, 1)]
    assert [job.wait(30) for job in jobs] == [0] * 6
    assert set(most_at_once(tmp_path / "log").values()) == {1}
    assert (tmp_path / "log").read_text().count("+") == 11


def test_devices_are_shared_when_asked_but_filled_evenly(tmp_path):
    with devices.acquire(1, tmp_path, 2, ["0", "1"]) as first:
        with devices.acquire(1, tmp_path, 2, ["0", "1"]) as second:
            with devices.acquire(2, tmp_path, 2, ["0", "1"]) as both:
                assert (first, second, both) == (["0"], ["1"], ["0", "1"])


def test_mask_is_honoured_and_restored(tmp_path, monkeypatch):
    monkeypatch.setenv(devices.MASK, "GPU-1f, 3,-1,2")
    assert devices.visible() == ["GPU-1f", "3"]
    with devices.acquire(1, tmp_path) as taken:
        assert taken == ["GPU-1f"]
        assert os.environ[devices.MASK] == "GPU-1f"
    assert os.environ[devices.MASK] == "GPU-1f, 3,-1,2"


def test_one_device_under_two_names_is_one_slot(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "_uuids", lambda: ("GPU-a", "GPU-b"))
    assert devices.visible() == ["0", "1"]
    with devices.acquire(1, tmp_path, 1, ["1"]):
        assert not devices._take(1, ["GPU-b"], 1, tmp_path, None)


def test_children_of_a_holder_share_its_devices(tmp_path):
    with devices.acquire(2, tmp_path / "slots", 1, ["4", "5", "6"]):
        child = start(tmp_path, os.environ[devices.MASK], n=2)
        assert child.wait(20) == 0
    assert (tmp_path / "log").read_text().split() == ["+", "4", "+", "5", "-", "4", "-", "5"]
    assert devices.HELD not in os.environ


def test_a_folder_is_for_one_process_at_a_time(tmp_path):
    program = (
        "import sys, time; from study.ledger.devices import alone\n"
        "with alone(sys.argv[1]):\n"
        "    open(sys.argv[2], 'a').write('+')\n"
        "    time.sleep(0.2)\n"
        "    open(sys.argv[2], 'a').write('-')\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "state"), str(tmp_path / "log")]
    root = Path(devices.__file__).parents[1]
    jobs = [subprocess.Popen(command, cwd=root) for _ in range(3)]
    assert [job.wait(20) for job in jobs] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "+-+-+-"


HOLDER = """
import sys, time
from study.ledger import devices
devices.BEAT = 0.05
with devices.alone(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A living process that has the folder ``state``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "state")],
        cwd=Path(devices.__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(devices, "PATIENCE", 0.2)


def enter(folder: Path) -> None:
    with devices.alone(folder):
        pass


def test_a_job_leaves_at_once_while_another_one_lives_and_not_when_it_is_dead(
    tmp_path, holder, impatient
):
    state = tmp_path / "state"
    with pytest.raises(
        devices.Busy, match=rf"has .*state \(process {holder.pid} on .*\); this one"
    ):
        enter(state)
    holder.kill()
    holder.wait()
    assert (state / "lock").exists()
    enter(state)
    assert list(state.iterdir()) == []


def test_a_busy_run_costs_no_device_and_says_so_in_one_line(tmp_path):
    """The lock comes first: with the only device taken, the job leaves all the same."""
    program = (
        "from study.ledger import devices; devices.PATIENCE = 0.2; "
        "from study.cli import main; main()"
    )
    wanted = '{"sampler": {"kind": "edm_heun"}}'
    arguments = ["generate", "--run-dir", str(tmp_path), "--measurement", wanted, "--gpus", "1"]
    arguments += ["--data", "none.zip", "--out", str(tmp_path / "measurements/m")]
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    slots = temporary / f"longskip-gpus-{os.getuid()}"
    held = devices.alone(tmp_path / "state/measurements", "m.lock")
    with held, devices.acquire(1, slots, devices=["5"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=Path(devices.__file__).parents[1],
            env={**os.environ, devices.MASK: "5", "TMPDIR": str(temporary), devices.HELD: ""},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 75
    assert done.stderr.startswith("study: another job has ")
    assert done.stderr.count("\n") == 1


def record(folder: Path, host: str, pid: int, silent: float = 0.0) -> None:
    """What a holder leaves whose ``flock`` is not seen here."""
    folder.mkdir(exist_ok=True)
    lock = folder / "lock"
    lock.write_text(json.dumps({"host": host, "pid": pid, "since": 0.0}))
    os.utime(lock, (time.time() - silent, time.time() - silent))


def test_a_holder_on_another_machine_counts_while_it_gives_signs_of_life(tmp_path, impatient):
    record(tmp_path, "elsewhere", 1, silent=60)
    with pytest.raises(devices.Busy, match=r"process 1 on elsewhere, .* 60 s ago; .* after 120 s"):
        enter(tmp_path)
    record(tmp_path, "elsewhere", 1, silent=devices.SILENT + 1)
    enter(tmp_path)
    (tmp_path / "lock").write_text("not a record")
    enter(tmp_path)


def test_without_flock_the_record_tells(tmp_path, impatient, monkeypatch):
    def absent(*_arguments):
        raise OSError("no locks here")

    monkeypatch.setattr(devices.fcntl, "flock", absent)
    here = devices.socket.gethostname()
    record(tmp_path, here, os.getpid())
    with pytest.raises(devices.Busy):
        enter(tmp_path)
    dead = subprocess.Popen(["true"])
    dead.wait()
    record(tmp_path, here, dead.pid)
    enter(tmp_path)


def test_a_holder_whose_lock_was_taken_leaves(tmp_path, holder):
    record(tmp_path / "state", "elsewhere", 1)
    assert holder.wait(20) == 75
    assert "was taken or removed; this job leaves" in holder.stderr.read()


def test_cpu_job_sees_no_device(tmp_path, monkeypatch):
    monkeypatch.setenv(devices.MASK, "0,1")
    with devices.acquire(0, tmp_path) as taken:
        assert taken == []
        assert os.environ[devices.MASK] == ""


def test_default_is_one_device_or_the_cpu(tmp_path, monkeypatch):
    with devices.acquire(slots_dir=tmp_path) as taken:
        assert taken == []
    monkeypatch.setenv(devices.MASK, "5")
    with devices.acquire(slots_dir=tmp_path) as taken:
        assert taken == ["5"]


def test_more_than_there_are_is_one_line(tmp_path):
    with pytest.raises(UserError) as error:
        with devices.acquire(3, tmp_path, devices=["0"]):
            pass
    assert "3 asked for, 1 visible" in str(error.value)
    assert "\n" not in str(error.value)
