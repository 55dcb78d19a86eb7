"""What is around a command: launchers' variables, signals that ask it to leave, its processes.

One training may be several processes on this machine. They are started here and not by
``torch.distributed.run``, which puts them in sessions of their own with closed descriptors: so they
inherit the locks of the run and of its GPUs, get the signals of their group, and die with the
command that started them.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals that ask to leave: people, closed terminals, and schedulers before a time limit."""

STOPPED = 75
"""Exit status of a command that was asked to leave and goes on when it is given again."""

AFTER = 5.0
"""Seconds that the other processes have to leave when one has."""

# --- the environment -----------------------------------------------------------------------------

LAUNCHERS = (
    # accelerate's own, with its plugins
    *("ACCELERATE_", "DEEPSPEED_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_"),
    # MPI: OpenMPI, MPICH, Intel, MVAPICH; torchrun, gloo
    *("OMPI_", "PMI_", "PMIX_", "MPI_", "I_MPI_", "MV2_", "PET_", "TORCHELASTIC_", "GLOO_"),
)
"""Beginnings of variables by which launchers tell torch and accelerate what to do."""

_GROUP = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE NODE_RANK NPROC GROUP_RANK GROUP_WORLD_SIZE \
ROLE_NAME ROLE_RANK ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT INIT_METHOD FORK_LAUNCHED"
_DEVICE = "PJRT_DEVICE USE_TORCH_XLA XLA_USE_BF16 XLA_DOWNCAST_BF16 TPU_NAME"
_PRECISION = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE NVIDIA_TF32_OVERRIDE DNNL_DEFAULT_FPMATH_MODE \
ONEDNN_DEFAULT_FPMATH_MODE"
LAUNCHED = frozenset(f"{_GROUP} {_DEVICE} {_PRECISION}".split())
"""Whole names of such variables, and of those by which containers change the arithmetic."""

OURS = "LONGSKIP_PROCESS"
"""Set in the processes of one training: the numbers of a `Place`."""


@dataclass(frozen=True)
class Place:
    """Where a process stands among those of its training.

    ``listener`` is the descriptor of the socket at ``port`` where they meet, ``alive`` that of a
    pipe which ends when the command ends that started them.
    """

    rank: int
    processes: int
    port: int
    listener: int
    alive: int


def place() -> Place | None:
    """This process's place in a training of several processes; ``None`` in any other."""
    numbers = os.environ.get(OURS)
    return Place(*map(int, numbers.split())) if numbers else None


@contextmanager
def own_environment() -> Iterator[None]:
    """The environment without what other launchers put there, and with our own processes' places.

    To be entered before torch is imported, or at least before an ``Accelerator`` is made.
    """
    before = {
        name: value
        for name, value in os.environ.items()
        if name in LAUNCHED or name.startswith(LAUNCHERS)
    }
    for name in before:
        del os.environ[name]
    here, added = place(), {}
    if here is not None:
        added = {"RANK": here.rank, "LOCAL_RANK": here.rank}
        added |= {"WORLD_SIZE": here.processes, "LOCAL_WORLD_SIZE": here.processes}
        os.environ.update({name: str(value) for name, value in added.items()})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        os.environ.update(before)


# --- signals -------------------------------------------------------------------------------------


class Asked(SystemExit):
    """Asked to leave, in a stage that can do so anywhere."""


def listen(handler: Callable[[int, Any], None]) -> None:
    """Let ``handler`` take the signals that ask to leave; what is ignored (nohup) stays ignored."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def leave_when_asked() -> None:
    """Unwind at such a signal, so that nothing stays half-written; Ctrl-C does so in any Python."""

    def leave(number: int, _frame: object) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Asked(f"stopped by {signal.Signals(number).name}; the same command goes on")

    listen(leave)


# --- several processes ---------------------------------------------------------------------------


def launch(command: list[str], processes: int) -> int:
    """Run ``command`` in so many processes, which are one training; returns their exit status.

    They share the group, the standard streams and the inheritable descriptors of this process and
    die with it. Signals that ask to leave are handed on.
    """
    children: list[subprocess.Popen] = []
    asked: list[int] = []

    def hand_on(number: int, _frame: object) -> None:
        asked.append(number)
        for child in children:
            child.send_signal(number)

    listen(hand_on)
    alive, _ours = os.pipe()  # our end is closed by the kernel, however this process ends
    os.set_inheritable(alive, True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.set_inheritable(True)
        port, listener = server.getsockname()[1], server.fileno()
        try:
            for rank in range(processes):
                numbers = f"{rank} {processes} {port} {listener} {alive}"
                environment = {**os.environ, OURS: numbers}
                child = subprocess.Popen(command, env=environment, close_fds=False)
                children.append(child)
                if asked:  # before this child was there to hear of it
                    child.send_signal(asked[0])
            return _attend(children, asked)
        finally:
            for child in children:
                child.kill()
            for child in children:
                child.wait()


def _attend(children: list[subprocess.Popen], asked: list[int]) -> int:
    """Wait for the processes of a training; where one fails or leaves, not long for the others."""
    end = None
    while True:
        codes = [child.poll() for child in children]
        for rank, code in enumerate(codes):
            if code in (None, 0, STOPPED, 130):
                continue
            if code > 0:  # the process has said why
                return code
            name = signal.Signals(-code).name
            if asked:
                print(f"study: stopped by {name}; the same command goes on", file=sys.stderr)
                return STOPPED
            print(
                f"study: process {rank} of {len(children)} was killed ({name}) and the others with "
                "it; the same command goes on from the last checkpoint",
                file=sys.stderr,
            )
            return 1
        left = STOPPED in codes or 130 in codes
        if None not in codes or (end and time.monotonic() > end):
            return STOPPED if left else 0
        # The first one writes the results; others may end before it, and not long after it.
        if end is None and (left or codes[0] is not None):
            end = time.monotonic() + AFTER
        time.sleep(0.02)


def join() -> None:
    """In a process that `launch` started: die with it."""
    here = place()
    if here is None:
        return
    if sys.platform == "linux":  # at once, whatever this process is doing
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG

    def watch() -> None:
        os.read(here.alive, 1)
        os._exit(1)

    threading.Thread(target=watch, name="study-alive", daemon=True).start()


def meet(backend: str) -> None:
    """Make the process group of torch, where this process is one of several."""
    here = place()
    if here is None:
        return
    from torch import distributed

    store = distributed.TCPStore(
        "127.0.0.1",
        here.port,
        here.processes,
        is_master=here.rank == 0,
        # Bound by the launcher, so that nobody else can take the port meanwhile.
        master_listen_fd=here.listener if here.rank == 0 else None,
    )
    distributed.init_process_group(backend, store=store, rank=here.rank, world_size=here.processes)


def speaks() -> bool:
    """Whether this process is the one that speaks for its training."""
    here = place()
    return here is None or here.rank == 0


def hold_back(seconds: float) -> None:
    """Let the first process speak of a mistake that all find, and the launcher end the others.

    Where one process is killed or leaves, the others fail for its sake: they are ended before they
    have said so.
    """
    here = place()
    if here is not None:
        time.sleep(seconds + 2 * here.rank)
