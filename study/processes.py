"""What is around a command: launchers' variables, signals that ask it to leave, its processes.

One training may be several processes on this machine. They are started here and not by
``torch.distributed.run``, which puts them in sessions of their own with closed descriptors: so they
inherit the locks of the run and of its GPUs, get the signals of their group, and die with the
command that started them.
"""

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals that ask to leave: people, closed terminals, and schedulers before a time limit."""

STOPPED = 75
"""Exit status of a command that was asked to leave and goes on when it is given again."""

AFTER = 10.0
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


THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""What numerical libraries read when they are imported."""


def set_threads(threads: int | str | None) -> None:
    """Threads of the numerical libraries; to be called before they are imported."""
    if threads:
        os.environ.update(dict.fromkeys(THREADS, str(threads)))


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

    def __init__(self, why: str) -> None:
        super().__init__(STOPPED)
        self.why = why

    def __str__(self) -> str:
        return self.why


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
    die with it. Signals that ask to leave are handed on. What is to be said the first one says:
    the words of the others are shown where they alone failed.
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
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server.set_inheritable(True)
        port, listener = server.getsockname()[1], server.fileno()
        words = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(processes)]
        try:
            for rank in range(processes):
                numbers = f"{rank} {processes} {port} {listener} {alive}"
                child = subprocess.Popen(
                    command,
                    env={**os.environ, OURS: numbers},
                    stderr=words[rank] if rank else None,
                    close_fds=False,
                )
                children.append(child)
                if asked:  # before this child was there to hear of it
                    child.send_signal(asked[0])
            codes = _ends(children)
        finally:
            for child in children:
                child.kill()
            for child in children:
                child.wait()
        return _verdict(codes, words, bool(asked))


def _ends(children: list[subprocess.Popen]) -> list[int | None]:
    """Exit statuses of the processes of a training; ``None`` of those that outstayed the others.

    Where one was killed, nobody waits for the others; where one fails or leaves, or the first one
    has written the results, they have a little time.
    """
    end = math.inf
    while True:
        codes = [child.poll() for child in children]
        if None not in codes or min(code or 0 for code in codes) < 0 or time.monotonic() > end:
            return codes
        if codes[0] is not None or any(codes):
            end = min(end, time.monotonic() + AFTER)
        time.sleep(0.02)


def _verdict(codes: list[int | None], words: list[IO[bytes]], asked: bool) -> int:
    """The exit status of a training of several processes, said where they have not said why."""
    killed = [(rank, code) for rank, code in enumerate(codes) if code is not None and code < 0]
    if killed:
        rank, code = killed[0]
        name = signal.Signals(-code).name
        text = (
            f"stopped by {name}; the same command goes on"
            if asked
            else f"process {rank} of {len(codes)} was killed ({name}) and the others with it; the "
            "same command goes on from the last checkpoint"
        )
        if codes[0] not in (STOPPED, 130):  # it has not said so itself
            # On a line of its own, also after the progress bar of a process that was killed.
            print(f"\nstudy: {text}", file=sys.stderr)
        return STOPPED if asked else 1
    if STOPPED in codes or 130 in codes:
        return STOPPED
    failed = [rank for rank, code in enumerate(codes) if code]
    if not failed:
        return 0
    if failed[0] > 0:
        words[failed[0]].seek(0)
        sys.stderr.write(words[failed[0]].read().decode(errors="replace"))
    return codes[failed[0]] or 0


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


def hold_back() -> None:
    """Let the launcher end this process before it speaks, where it fails for another one's sake."""
    if place() is not None:
        time.sleep(AFTER + 3)
