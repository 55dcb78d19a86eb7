"""Divergence is a result: when a run stops early, and what it last was."""

import math
from dataclasses import dataclass, field
from typing import Any

SMOOTHING = 0.95
"""Weight of the past in the smoothed loss: about 20 steps."""


@dataclass
class Watch:
    """Watches loss and gradient norm of every step.

    ``factor``: the smoothed loss may exceed its running best by this factor; ``None`` switches
    spikes off. A mixed-precision run may skip up to ``skips`` steps in a row (the loss scale is
    then being lowered); every other non-finite value ends the run.
    """

    factor: float | None
    skips: int = 0
    smoothed: float = 0.0
    best: float = math.inf
    seen: int = 0
    skipped: int = 0
    last_finite: dict[str, Any] = field(default_factory=dict)

    def step(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Reason to stop at ``step``, before its update is applied, or ``None``."""
        if not math.isfinite(loss):
            return "non-finite loss"
        if not math.isfinite(grad_norm):
            self.skipped += 1
            return "non-finite gradient" if self.skipped > self.skips else None
        self.skipped = 0
        self.seen += 1
        self.smoothed = SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss
        smoothed = self.smoothed / (1 - SMOOTHING**self.seen)
        self.best = min(self.best, smoothed)
        if self.factor is not None and smoothed > self.factor * self.best:
            return "loss spike"
        self.last_finite = {"step": step, "loss": loss, "grad_norm": grad_norm}
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "smoothed": self.smoothed,
            "best": self.best,
            "seen": self.seen,
            "skipped": self.skipped,
            "last_finite": dict(self.last_finite),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        for key, value in state.items():
            setattr(self, key, value)
