"""Fixtures that more than one file uses: copies of the project, and a finished study in one."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Jobs on a shared machine must not fight for cores; numbers must not depend on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nor on the processor: golden numbers leave less room than the order of MKL's sums takes on some.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("Snakefile", "config.yaml", "envs", "notebooks", "pyproject.toml", "study", "workflow")
SMOKE = "workflow/studies/smoke.yaml"


@dataclass(frozen=True)
class Project:
    """A copy of the project in a folder of its own."""

    folder: Path
    config: str = SMOKE

    @property
    def results(self) -> Path:
        return self.folder / "results" / Path(self.config).stem

    @property
    def reports(self) -> Path:
        return self.folder / "reports" / Path(self.config).stem

    def python(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        """Run this Python in the project, as its jobs do."""
        options = {"capture_output": True, "text": True, "timeout": 600} | options
        return subprocess.run([sys.executable, *arguments], cwd=self.folder, **options)

    def study(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        return self.python("-m", "study", *arguments, **options)

    def command(self, *flags: str) -> list[str]:
        configured = ["--configfile", self.config]
        return [sys.executable, "-m", "snakemake", *flags, *configured]

    def snakemake(self, *flags: str, **options) -> subprocess.CompletedProcess:
        options = {"capture_output": True, "text": True, "timeout": 900} | options
        return subprocess.run(self.command(*flags), cwd=self.folder, **options)

    def todo(self, *flags: str) -> dict[str, int]:
        """The jobs that a dry run lists, by rule."""
        done = self.snakemake("-n", "--cores", "2", *flags)
        assert done.returncode == 0, done.stdout + done.stderr
        return self.jobs(done)

    @staticmethod
    def jobs(listed: subprocess.CompletedProcess) -> dict[str, int]:
        """How many jobs of each rule a dry run has listed."""
        text = listed.stdout + listed.stderr
        if "Nothing to be done" in text:
            return {}
        table = re.search(r"^Job stats:\n.*?\n-+ +-+\n(.*?)^total ", text, re.MULTILINE | re.DOTALL)
        assert table, text
        rows = (line.split() for line in table[1].splitlines())
        return {rule: int(count) for rule, count in rows if rule != "all"}

    @contextmanager
    def edited(self, path: str, change: Callable[[str], str]) -> Iterator[None]:
        """The project with one file changed, and afterwards as it was, times included."""
        file = self.folder / path
        before, times = file.read_bytes(), file.stat()
        changed = change(before.decode())
        assert changed.encode() != before, f"the edit of {path} changed nothing"
        file.write_text(changed, encoding="utf-8")
        later = time.time() + 5  # as if edited after the study had finished, on any clock
        os.utime(file, (later, later))
        try:
            yield
        finally:
            file.write_bytes(before)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def draw(folder: Path, count: int = 8, seed: int = 0) -> None:
    """Class folders a and b with ``count`` random images each."""
    random = np.random.default_rng(seed)
    for name in "ab":
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = random.integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png", compress_level=0)


def copy_project(folder: Path) -> Path:
    """Copy what a study needs, and nothing that was computed, to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=ignored)
        else:
            shutil.copy2(source, folder / part)
    return folder


LONGEST = (
    *("workflow", "slurm", "reruns", "processes", "executors", "flow", "warm", "training"),
    *("surroundings", "analysis", "lineage", "fidelity", "spec"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that the last of several workers is not left with one."""
    first = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path.stem, len(first)))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A copy of the project without any results."""
    return Project(copy_project(tmp_path / "a project"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the project in which the smoke study has been run once, for real."""
    project = Project(copy_project(tmp_path_factory.mktemp("finished") / "a project"))
    done = project.snakemake("--cores", "2", "--quiet", "rules")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    (project.folder / "said").write_text(done.stderr, encoding="utf-8")
    return project
