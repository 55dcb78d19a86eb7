"""Where do the weights of a run lie in its ``train/``? No heavy imports."""

from pathlib import Path

LAST = {"ema": "weights.safetensors", "raw": "raw.safetensors"}
"""The first average, and the weights themselves, at the last step."""

SNAPSHOTS = "snapshots"
"""The folder of what is kept of earlier steps, and of the further averages at the last."""


def snapshot(train: str | Path, which: str, step: int) -> Path:
    """The file of ``ema``, ``ema2``, ... or ``raw`` after ``step`` steps."""
    return Path(train) / SNAPSHOTS / f"{step:09d}.{which}.safetensors"
