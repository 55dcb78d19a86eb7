"""Who holds something: a process, told from all others by its machine, number and start.

A lock of the kernel does not reach other machines on every shared file system, so the holder is
written down, and counts as dead only where that can be seen.
"""

import os
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def _read(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8").strip()
    return ""


def _started(pid: int) -> str:
    """When a process started, in words that do not change while it lives; empty if it is gone."""
    if Path("/proc/self/stat").exists():
        state, *fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split() or [""]
        return fields[18] if state not in ("", "Z", "X") else ""
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    return subprocess.run(command, capture_output=True, encoding="utf-8").stdout.strip()


def _machine() -> dict[str, str]:
    """This machine since it was started, and the numbers that its processes go by."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "space": space,
    }


def _booted() -> float:
    """When this machine was started, in seconds since 1970; 0 where it does not say."""
    lines = _read("/proc/stat").splitlines()
    return next((float(line.split()[1]) for line in lines if line.startswith("btime")), 0.0)


def me() -> dict[str, Any]:
    """This process, as `lives` tells it from others."""
    pid = os.getpid()
    return {**_machine(), "pid": pid, "started": _started(pid), "since": time.time()}


def lives(record: Mapping[str, Any]) -> bool | None:
    """Whether the process that wrote `me` lives; ``None`` where this machine cannot tell."""
    here = _machine()
    if record.get("host") == here["host"] and record.get("boot") != here["boot"]:
        return False if record["since"] < _booted() else None
    if any(record.get(key) != here[key] for key in here):
        return None
    return bool(record["started"]) and _started(record["pid"]) == record["started"]


def name(record: Mapping[str, Any]) -> str:
    """The process for people: its number, machine and when it said so."""
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.get("since", 0)))
    return f"process {record.get('pid')} on {record.get('host')}, since {since}"
