"""Where a result came from: versions, commit, machine, time and memory."""

import platform
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "longskip",
    "torch",
    "accelerate",
    "xformers",
    "torchvision",
    "torch-fidelity",
    "numpy",
    "pandas",
    "snakemake",
)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def git_state() -> dict[str, Any]:
    """Commit of the source tree that is running, and whether it had uncommitted changes."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            encoding="utf-8",
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "changed": None}


@cache
def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def provenance(device: Any = None) -> dict[str, Any]:
    """Facts about this process for a result's JSON.

    ``device`` is a ``torch.device`` or ``None``; a CUDA device is named by its driver.
    """
    name = None if device is None else str(device)
    torch = sys.modules.get("torch")
    if name is not None and name.startswith("cuda") and torch is not None:
        name = torch.cuda.get_device_name(device)
    return {
        "git": git_state(),
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES if _version(package)},
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": None if torch is None else torch.get_num_threads(),
        "device": name,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


class Stopwatch:
    """Wall time and peak memory of a stage.

    ``seconds`` runs from construction (plus ``before``, time spent by earlier, interrupted
    attempts); ``peak_memory_mib`` is the peak resident set of the process, or, on CUDA, the peak
    of the allocator.
    """

    def __init__(self, device: Any = None, before: float = 0.0) -> None:
        self.device = device
        self._start = time.perf_counter() - before
        if self._on_cuda():
            sys.modules["torch"].cuda.reset_peak_memory_stats(device)

    def _on_cuda(self) -> bool:
        return self.device is not None and str(self.device).startswith("cuda")

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @property
    def peak_memory_mib(self) -> float:
        if self._on_cuda():
            return sys.modules["torch"].cuda.max_memory_allocated(self.device) / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)
