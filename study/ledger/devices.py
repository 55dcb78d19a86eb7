"""Local GPU slots, and folders that one job at a time works in.

Snakemake counts GPUs but hands out none. A job therefore takes slots here: lock files in a folder
of this machine, held with ``flock``, which the kernel lets go however the process ends. Folders of
runs may lie on a file system of many machines, where ``flock`` alone is not to be trusted.
"""

import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

from study.files import Stopped, UserError, sweep
from study.processes import STOPPED

MASK = "CUDA_VISIBLE_DEVICES"
HELD = "LONGSKIP_GPUS_HELD_BY"
"""Number of the process that holds the devices of the mask; its children share them."""


@cache
def _uuids() -> tuple[str, ...]:
    """UUIDs of this machine's NVIDIA devices in the driver's order; empty without a driver."""
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, encoding="utf-8"
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    if listing.returncode:
        return ()
    return tuple(re.findall(r"^GPU \d+: .*\(UUID: ([^)]+)\)", listing.stdout, flags=re.MULTILINE))


def visible() -> list[str]:
    """Names of the devices that this process may use, as ``CUDA_VISIBLE_DEVICES`` writes them.

    An existing mask is honoured; without one, all NVIDIA devices of the machine count.
    """
    mask = os.environ.get(MASK)
    if mask is None:
        return [str(index) for index in range(len(_uuids()))]
    names: list[str] = []
    for name in mask.split(","):
        name = name.strip()
        if not name or name.startswith("-"):  # CUDA ignores what follows an invalid entry
            break
        names.append(name)
    return names


def _identity(name: str) -> str:
    """One file name per physical device, however a mask writes it."""
    uuids = _uuids()
    if name.isdigit() and int(name) < len(uuids):
        name = uuids[int(name)]
    return re.sub(r"[^A-Za-z0-9-]", "_", name)


def default_slots_dir() -> Path:
    """Where this user's slots are kept: on the machine itself, for all studies alike."""
    return Path(tempfile.gettempdir()) / f"longskip-gpus-{os.getuid()}"


def _lock(path: Path, wait: bool) -> IO[bytes] | None:
    """Hold ``path`` until the file returned is closed; ``None`` if another process holds it."""
    file = path.open("ab")
    # Programs that this process starts with open files (a training in several processes) keep
    # the lock for as long as they live, also when this process is killed.
    os.set_inheritable(file.fileno(), True)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    return file


BEAT = 15.0
"""Seconds between the signs of life that the holder of a folder gives."""

SILENT = 120.0
"""Seconds without one after which a holder on another machine counts as dead."""

PATIENCE = 10.0
"""Seconds that a job waits for another one which may just be ending."""


class Busy(Stopped):
    """Another living job has the folder."""


@contextmanager
def alone(folder: str | Path, name: str = "lock") -> Iterator[None]:
    """Keep other processes out of ``folder`` (or, with other names, from one of its files).

    When a workflow is killed its jobs may live on. The same job, started again, does not write
    beside them, and does not wait for hours on a device that it holds: it raises ``Busy`` unless
    the other one ends within ``PATIENCE`` seconds.

    The lock is held with ``flock`` by this process and by those that it starts with open files.
    For file systems where that means nothing on other machines, or nothing at all, the file says
    who holds it, and its time of change is a sign of life.
    """
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + PATIENCE
    while (claimed := _claim(path)) is None:
        if time.monotonic() > end:
            raise Busy(f"another job has {folder} ({_holder(path)}); this one leaves")
        time.sleep(0.1)
    file, own = claimed
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, own, ended), name="study-lock", daemon=True)
    beat.start()
    try:
        sweep(folder)
        yield
    finally:
        ended.set()
        beat.join()
        path.unlink(missing_ok=True)
        file.close()


def _claim(path: Path) -> tuple[IO[bytes], bytes] | None:
    """Take the lock file ``path``, and what it now says, unless another living process has it."""
    file = path.open("a+b")
    os.set_inheritable(file.fileno(), True)  # as with GPU slots
    told = True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # a file system without flock
        told = False
    try:
        there = os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        there = False
    if not there or _lives(_record(path), told):  # not there: its last holder has removed it
        file.close()
        return None
    file.truncate(0)
    own = {"host": socket.gethostname(), "pid": os.getpid(), "since": round(time.time(), 3)}
    text = json.dumps(own).encode()
    file.write(text)
    file.flush()
    return file, text


def _record(path: Path) -> dict[str, Any]:
    """Who holds a lock file, and ``seen``, when it last gave a sign of life; empty if none says."""
    try:
        record = json.loads(path.read_bytes())
        return {**record, "pid": int(record["pid"]), "seen": path.stat().st_mtime}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _lives(record: dict[str, Any], told: bool) -> bool:
    """Whether the holder may be alive; ``told``: ``flock`` knows of none on this machine."""
    if not record or time.time() - record["seen"] > SILENT:
        return False
    if record.get("host") != socket.gethostname():
        return True
    if told:
        return False
    try:
        os.kill(record["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _holder(path: Path) -> str:
    record = _record(path)
    if not record:
        return "it is locked"
    text = f"process {record['pid']} on {record.get('host')}"
    if record.get("host") != socket.gethostname():
        silent = max(0, round(time.time() - record["seen"]))
        text += (
            f", which gave a sign of life {silent} s ago; it counts as dead after {SILENT:.0f} s"
        )
    return text


def _beat(path: Path, own: bytes, ended: threading.Event) -> None:
    """Give signs of life; end this process where somebody else has taken the lock."""
    while not ended.wait(BEAT):
        try:
            lost = path.read_bytes() != own
            if not lost:
                os.utime(path)
        except FileNotFoundError:
            lost = True
        except OSError:  # a file server that is away for a moment
            continue
        if lost:
            print(f"study: {path} was taken or removed; this job leaves", file=sys.stderr)
            sys.stderr.flush()
            os._exit(STOPPED)


def occupied(folder: str | Path, name: str = "lock") -> bool:
    """Whether a living process keeps others out of ``folder`` (``alone``), here or elsewhere."""
    path, told = Path(folder) / name, True
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:  # a file system without flock
        told = False
    return _lives(_record(path), told)


@contextmanager
def acquire(
    n: int | None = None,
    slots_dir: str | Path | None = None,
    jobs_per_gpu: int | None = None,
    devices: list[str] | None = None,
    poll: float = 0.5,
) -> Iterator[list[str]]:
    """Hold slots on ``n`` different devices, and show this process no other device.

    Waits until all ``n`` are free at once; those who wait are served one after the other, so that
    a job that needs many devices is not overtaken for ever. ``n`` is 0 for the CPU, ``None`` for
    one device where there is one. ``jobs_per_gpu`` jobs may share a device (default: the
    environment variable ``LONGSKIP_JOBS_PER_GPU``, else 1). A child of a process that holds slots
    shares them (``accelerate launch``). Call it before CUDA is initialised.

    Yields the devices' names. Raises ``UserError`` if the machine has fewer than ``n`` devices.
    """
    names = visible() if devices is None else devices
    if n is None:
        n = min(1, len(names))
    if n > len(names):
        raise UserError(
            f"gpus: {n} asked for, {len(names)} visible here; lower `gpus`, or widen {MASK}"
        )
    if n and os.environ.get(HELD, str(os.getpid())) != str(os.getpid()):
        yield names
        return
    if jobs_per_gpu is None:
        jobs_per_gpu = int(os.environ.get("LONGSKIP_JOBS_PER_GPU", "1"))
    folder = Path(slots_dir) if slots_dir is not None else default_slots_dir()
    with ExitStack() as held:
        taken: list[str] = []
        if n:
            folder.mkdir(parents=True, exist_ok=True)
            with _lock(folder / "queue.lock", wait=True):
                while True:
                    taken = _take(n, names, jobs_per_gpu, folder, held)
                    if taken:
                        break
                    time.sleep(poll)
        before = {name: os.environ.get(name) for name in (MASK, HELD)}
        os.environ.update({MASK: ",".join(taken), HELD: str(os.getpid())})
        try:
            yield taken
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def _take(n: int, names: list[str], jobs_per_gpu: int, folder: Path, held: ExitStack) -> list[str]:
    """Lock one slot on each of ``n`` devices, the emptiest first; all of them or none."""
    with ExitStack() as attempt:
        taken: dict[str, None] = {}
        for layer in range(jobs_per_gpu):
            for name in names:
                if name in taken or len(taken) == n:
                    continue
                file = _lock(folder / f"{_identity(name)}.{layer}.lock", wait=False)
                if file is not None:
                    attempt.enter_context(file)
                    taken[name] = None
        if len(taken) < n:
            return []
        held.enter_context(attempt.pop_all())
        return [name for name in names if name in taken]
