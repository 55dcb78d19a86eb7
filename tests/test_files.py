"""Files appear whole or not at all, and nothing half-written stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from study import files
from study.files import atomic, sweep, write_text

WRITER = """
import sys, time
from study.files import atomic
with atomic(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    if sys.argv[2:]:
        sys.stdin.read()
    else:
        time.sleep(600)
"""


def writer(path: Path, *flags: str) -> subprocess.Popen:
    """A process in the middle of writing ``path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), *flags],
        cwd=Path(files.__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "writing\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_writer_left_goes_with_the_next_write_in_its_folder(tmp_path):
    process = writer(tmp_path / "large.pt")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(names(tmp_path)) == 1
    write_text(tmp_path / "other.json", "whole")
    assert names(tmp_path) == ["other.json"]


def test_a_living_writer_keeps_what_it_writes(tmp_path):
    process = writer(tmp_path / "large.pt", "until told")
    write_text(tmp_path / "large.pt", "another")
    sweep(tmp_path)
    process.communicate("", timeout=60)
    assert process.returncode == 0
    assert names(tmp_path) == ["large.pt"]
    assert (tmp_path / "large.pt").read_text() == "half"


def test_what_another_machine_writes_is_left_behind_only_after_a_day(tmp_path, monkeypatch):
    process = writer(tmp_path / "large.pt")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    monkeypatch.setattr(files.socket, "gethostname", lambda: "elsewhere")
    sweep(tmp_path)
    (left,) = tmp_path.iterdir()
    before = time.time() - files.ABANDONED - 60
    os.utime(left, (before, before))
    sweep(tmp_path)
    assert names(tmp_path) == [left.name]  # its file has changed since
    os.utime(left / "large.pt", (before, before))
    sweep(tmp_path)
    assert names(tmp_path) == []


def test_without_flock_nobody_is_taken_for_dead_at_once(tmp_path, monkeypatch):
    def absent(*_arguments):
        raise OSError("no locks here")

    monkeypatch.setattr(files.fcntl, "flock", absent)
    with atomic(tmp_path / "a") as temporary:
        temporary.write_text("a")
        write_text(tmp_path / "b", "b")
    assert names(tmp_path) == ["a", "b"]


def test_a_failed_write_leaves_the_former_content_and_nothing_else(tmp_path):
    write_text(tmp_path / "a.txt", "former")

    def write():
        with atomic(tmp_path / "a.txt") as temporary:
            temporary.write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "former"


def test_files_of_libraries_that_write_privately_follow_the_umask(tmp_path):
    with atomic(tmp_path / "w.safetensors") as temporary:
        save_file({"a": torch.zeros(2)}, temporary)
    write_text(tmp_path / "plain", "")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1
