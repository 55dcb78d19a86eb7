"""Training: the loop, averages of the weights, checkpoints, divergence and the dynamics log."""

from study.training.loop import Interrupted, train

__all__ = ["Interrupted", "train"]
