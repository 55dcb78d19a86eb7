"""How far is a training, for ``study status`` and for people?"""

import sys
import time
from pathlib import Path

from tqdm import tqdm

from study.files import write_json


class Progress:
    """``state/progress.json`` for ``study status``, and a progress bar for people."""

    def __init__(self, folder: Path, start: int, steps: int, seconds: float, main: bool) -> None:
        self.folder, self.steps, self.main = folder, steps, main
        self.before, self.begun, self.written = seconds, time.time(), 0.0
        interval = 1.0 if sys.stderr.isatty() else 20.0
        self.bar = tqdm(
            total=steps,
            initial=start,
            desc="train",
            unit="step",
            mininterval=interval,
            disable=not main,
            dynamic_ncols=True,
        )

    def __call__(self, step: int, loss: float) -> None:
        self.bar.update(step - self.bar.n)
        if not self.main or time.time() - self.written < 2.0:
            return
        self.written = time.time()
        self.bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
        seconds = self.before + self.written - self.begun
        write_json(
            self.folder / "progress.json",
            {
                "stage": "train",
                "step": step,
                "steps": self.steps,
                "seconds": seconds,
                "time": self.written,
            },
        )
