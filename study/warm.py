"""One import for many jobs: a process that has imported the stages forks a child for each.

Half of a small job's time goes to importing torch and what belongs to it. Where a workflow runs
its jobs on its own machine, the first of them starts a process that imports once. All of them hand
it their command (`hand_over`): it forks a child that runs the command with the job's arguments,
folder, environment and standard streams. The job's own process stays, hands signals on to the child
and ends as the child ends; where it is killed, the child is. So whoever started the job sees no
difference. The warm process leaves no file and ends with the workflow; children that then still
run go on without it.

Where anything stands in the way (another system, a GPU, several threads or processes, a stage by
hand or on a node of a cluster) the command runs in its own process, as ever.
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
from typing import NoReturn

from study.processes import (
    STOP_SIGNALS,
    STOPPED,
    Asked,
    leave_when_asked,
    own_environment,
    set_threads,
)

WORKFLOW = "LONGSKIP_WARM"
"""Set by a workflow for jobs that may be handed over: its process's number. Empty: none may."""

STAGES = {"train", "generate", "evaluate", "points", "probe"}
"""Those with many jobs in a study."""

MODULES = (
    *("study.cli", "study.combinations", "study.training", "study.sampling.draw"),
    *("study.fidelity.evaluate", "study.fidelity.classifier", "study.probes.base"),
    *("study.ledger.devices", "pandas", "pyarrow.parquet", "torch._dynamo"),
)
"""What the stages import."""


HANDED_ON = (*STOP_SIGNALS, signal.SIGTSTP, signal.SIGCONT)
PID = struct.Struct("i")


# --- the job -------------------------------------------------------------------------------------


def hand_over() -> None:
    """Let the warm process run this command, and end as it ends; return where it must not."""
    options = dict(zip(sys.argv[1:], sys.argv[2:]))
    workflow = os.environ.get(WORKFLOW, "")
    if not workflow or not STAGES.intersection(sys.argv[1:2]):
        return
    # A library that has more threads starts them when it is imported.
    if options.get("--gpus") != "0" or options.get("--threads") != "1":
        return
    if "processes" in options.get("--machine", "") or sys.getfilesystemencoding() != "utf-8":
        return
    connection = _connect(workflow)
    if connection is None:
        return
    ignored = [number for number in HANDED_ON if signal.getsignal(number) is signal.SIG_IGN]
    request = {
        "arguments": sys.argv,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "ignored": ignored,
    }
    child, asked = 0, []

    def tell(number: int, _frame: object) -> None:
        asked.append(number)
        if child:
            _tell(child, number)

    before = {n: signal.signal(n, tell) for n in HANDED_ON if n not in ignored}
    begun = b""
    with suppress(OSError), open(os.memfd_create("request"), "w+", encoding="utf-8") as file:
        json.dump(request, file)
        file.flush()
        socket.send_fds(connection, [b"!"], [0, 1, 2, file.fileno()])
        begun = connection.recv(PID.size, socket.MSG_WAITALL)
    if len(begun) == PID.size:  # from here on it is done there or not at all
        (child,) = PID.unpack(begun)
        for number in list(asked):
            _tell(child, number)
        code = b""
        with suppress(OSError):
            code = connection.recv(1)
        if code:
            os._exit(code[0])
        os.kill(os.getpid(), signal.SIGKILL)  # as the child was, most likely for want of memory
    for number, handler in before.items():
        signal.signal(number, handler)
    for number in asked:
        os.kill(os.getpid(), number)


def _tell(child: int, number: int) -> None:
    """Hand a signal on; one that stops stops both."""
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGSTOP if number == signal.SIGTSTP else number)
        if number == signal.SIGTSTP:
            os.kill(os.getpid(), signal.SIGSTOP)


def _connect(workflow: str) -> socket.socket | None:
    """A connection to the warm process of this workflow, which is started if there is none.

    Its address is a name without a file, made of all that a process has from its start.
    """
    environment = [os.environ.get(name) for name in ("PYTHONUTF8", "PYTHONHASHSEED")]
    own = repr((sys.executable, sys.path, os.getcwd(), environment))
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
            command = [sys.executable, "-m", "study.warm", address, workflow]
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


def serve(address: str, workflow: int) -> None:
    """Import the stages; fork a child for every job, until the workflow ends.

    Nothing here may start a thread or look for GPUs: a child could not use what it inherits then.
    """
    set_threads(1)
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
        files: list[int] = []
        with connection, suppress(OSError):
            connection.settimeout(1)
            if _ours(connection):
                word, files, _, _ = socket.recv_fds(connection, 1, 4)
                if word and os.fork() == 0:
                    listener.close()
                    os.close(alive)
                    connection.settimeout(None)
                    _run(connection, files)
        for file in files:
            os.close(file)


def _run(connection: socket.socket, files: list[int]) -> NoReturn:
    """In a child: the job's command as if it had been started for it, and its end."""
    code = 1
    try:
        _become(files)
        threading.Thread(target=_follow, args=(connection,), name="study-job", daemon=True).start()
        code = _command(connection)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            connection.send(bytes([code & 255]))
        os._exit(code & 255)


def _become(files: list[int]) -> None:
    """Take a job's streams, folder, environment, arguments, and what it does with signals."""
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
    for number in HANDED_ON:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else usual)
    sys.argv = request["arguments"]
    leave_when_asked()


def _command(connection: socket.socket) -> int:
    """Say that the command begins, which lets signals come, and run it; its exit status."""
    try:
        connection.send(PID.pack(os.getpid()))
        from study.cli import main

        main()
    except Asked as error:  # before the command could say so itself
        print(f"study: {error}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("study: interrupted", file=sys.stderr)
        return 130
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _follow(connection: socket.socket) -> None:
    """End where the job's own process has ended."""
    with suppress(OSError):
        connection.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
