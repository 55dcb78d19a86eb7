"""Local GPU slots: two jobs never share a device by accident.

Snakemake counts GPUs but hands out none. A job therefore takes slots here: lock files in a folder
of this machine, held with ``flock``, which the kernel lets go however the process ends.
"""

import fcntl
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

from study.files import UserError

MASK = "CUDA_VISIBLE_DEVICES"
HELD = "LONGSKIP_GPUS_HELD_BY"
"""Number of the process that holds the devices of the mask; its children share them."""


@cache
def _uuids() -> tuple[str, ...]:
    """UUIDs of this machine's NVIDIA devices in the driver's order; empty without a driver."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
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


@contextmanager
def alone(folder: str | Path) -> Iterator[None]:
    """Wait until no other process works in ``folder``, and keep others out of it.

    When a workflow is killed its jobs may live on; the same job, started again, waits here for
    the first to finish instead of writing beside it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = (Path(folder) / "lock").open("ab")
    os.set_inheritable(file.fileno(), True)  # as with GPU slots
    with file:
        with suppress(OSError):  # a file system without flock
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def occupied(folder: str | Path) -> bool:
    """Whether a living process keeps others out of ``folder`` (``alone``)."""
    try:
        with (Path(folder) / "lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such folder, or a file system without flock
        return False
    return False


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
