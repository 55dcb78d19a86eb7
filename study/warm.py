"""One import for many jobs: a process that has imported the stages forks a child for each.

Half of a small job's time goes to importing torch and what belongs to it. Where a workflow runs
its jobs on its own machine, the first of them starts a process that imports once. All of them hand
it their command (`hand_over`): it forks a child that runs the command with the job's arguments,
folder, environment and standard streams. The job's own process stays, hands signals on to the child
and ends as the child ends; where it is killed, the child is. So whoever started the job sees no
difference. The warm process leaves no file and ends with the workflow; children that then still
run go on without it.

Where anything stands in the way (another system, a GPU, a training of several processes, a stage
by hand or on a node of a cluster) the command runs in its own process, as ever.
"""

import gc
import hashlib
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any

from study.processes import STOP_SIGNALS, THREADS, own_environment, set_threads

WORKFLOW = "LONGSKIP_WARM"
"""Set by a workflow for jobs that may be handed over: its process's number. Empty: none may."""

STAGES = {"train", "generate", "evaluate", "probe"}
"""Those with many jobs in a study."""

MODULES = (
    *("study.cli", "study.combinations", "study.training", "study.sampling.draw"),
    *("study.fidelity.evaluate", "study.fidelity.classifier", "study.probes.base"),
    *("study.ledger.devices", "pandas", "pyarrow.parquet", "torch._dynamo"),
)
"""What the stages import."""


# --- the job -------------------------------------------------------------------------------------


def hand_over() -> None:
    """Let the warm process run this command, and end as it ends; return where it must not."""
    options = dict(zip(sys.argv[1:], sys.argv[2:]))
    workflow = os.environ.get(WORKFLOW, "")
    if not workflow or not STAGES.intersection(sys.argv[1:2]) or options.get("--gpus") != "0":
        return
    if "processes" in options.get("--machine", "") or sys.getfilesystemencoding() != "utf-8":
        return
    connection = _connect(workflow, options.get("--threads"))
    if connection is None:
        return
    ignored = [number for number in STOP_SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
    request = {
        "arguments": sys.argv,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "ignored": ignored,
    }
    before: dict[int, Any] = {}

    def tell(number: int, _frame: object) -> None:
        with suppress(OSError):
            connection.send(bytes([number]))

    with suppress(OSError), open(os.memfd_create("request"), "w+", encoding="utf-8") as file:
        json.dump(request, file)
        file.flush()
        socket.send_fds(connection, [b"!"], [0, 1, 2, file.fileno()])
        before = {n: signal.signal(n, tell) for n in STOP_SIGNALS if n not in ignored}
        if connection.recv(1):  # it has begun: now it is done there or not at all
            code = connection.recv(1)
            if not code:  # killed, most likely for want of memory
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(code[0])
    for number, handler in before.items():
        signal.signal(number, handler)


def _connect(workflow: str, threads: str | None) -> socket.socket | None:
    """A connection to the warm process of this workflow, which is started if there is none.

    Its address is a name without a file, made of all that a process has from its start.
    """
    environment = [os.environ.get(name) for name in (*THREADS, "PYTHONUTF8", "PYTHONHASHSEED")]
    own = repr((sys.executable, sys.path, os.getcwd(), threads, environment))
    address = f"longskip-{os.getuid()}-{workflow}-{hashlib.sha256(own.encode()).hexdigest()[:16]}"
    started, end = None, time.monotonic() + 30
    while time.monotonic() < end:
        over = started is not None and started.poll() is not None
        connection = socket.socket(socket.AF_UNIX)
        with suppress(OSError):
            connection.connect(f"\0{address}")
            return connection if _ours(connection) else None
        connection.close()
        if over:  # it cannot be
            return None
        if started is None:
            command = [sys.executable, "-m", "study.warm", address, workflow, threads or ""]
            started = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # what a terminal sends reaches it by the jobs alone
            )
        time.sleep(0.02)
    return None


def _ours(connection: socket.socket) -> bool:
    """Whether the other end belongs to the same user."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", found)[1] == os.getuid()


# --- the warm process ----------------------------------------------------------------------------


def serve(address: str, workflow: int, threads: str) -> None:
    """Import the stages; fork a child for every job, until the workflow ends.

    Nothing here may start a thread or look for GPUs: a child could not use what it inherits then.
    """
    set_threads(threads)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0{address}")
    listener.listen(128)
    alive = os.pidfd_open(workflow)
    with own_environment():
        for name in MODULES:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a child that looked for garbage here would copy the memory that it shares
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    while True:
        ready, _, _ = select.select([listener, alive], [], [])
        if alive in ready:
            return
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.settimeout(10)
            word, files, _, _ = socket.recv_fds(connection, 1, 4)
            if word and _ours(connection) and os.fork() == 0:
                listener.close()
                os.close(alive)
                connection.settimeout(None)
                os._exit(_run(connection, files))
            for file in files:
                os.close(file)


def _run(connection: socket.socket, files: list[int]) -> int:
    """In a child: the job's command as if it had been started for it. Returns its exit status."""
    *standard, described = files
    for number, file in enumerate(standard):
        os.dup2(file, number)
        os.close(file)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", closefd=False)
    with open(described, encoding="utf-8") as file:
        file.seek(0)
        request = json.load(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in STOP_SIGNALS:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else usual)
    sys.argv = request["arguments"]
    connection.send(b"!")
    threading.Thread(target=_follow, args=(connection,), name="study-job", daemon=True).start()
    code: Any = 1
    try:
        from study.cli import main

        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    code = code if isinstance(code, int) else 0 if code is None else 1
    with suppress(OSError):
        connection.send(bytes([code & 255]))
    return code


def _follow(connection: socket.socket) -> None:
    """Take the signals that the job's own process gets, and end where that was killed."""
    while word := connection.recv(1):
        os.kill(os.getpid(), word[0])
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
