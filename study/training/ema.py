"""Exponential moving average of the weights."""

import torch
from torch import Tensor, nn


class Ema:
    """Averaged copy of a module's parameters; buffers are copied as they are.

    It starts as a copy of the initial weights.
    """

    def __init__(self, module: nn.Module) -> None:
        self.average = {key: value.detach().clone() for key, value in module.state_dict().items()}
        # Kept as lists: to look tensors up by name takes longer than to average small ones.
        self._parameters = list(module.named_parameters())
        self._buffers = [pair for pair in module.named_buffers() if pair[0] in self.average]

    @torch.no_grad()
    def update(self, decay: float, prefix: str = "") -> None:
        """average = decay * average + (1 - decay) * weights, of parameters that begin so."""
        chosen = [(key, weight) for key, weight in self._parameters if key.startswith(prefix)]
        averages = [self.average[key] for key, _ in chosen]
        torch._foreach_lerp_(averages, [weight for _, weight in chosen], 1.0 - decay)
        for key, value in self._buffers:
            self.average[key].copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the module's own keys."""
        return self.average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from saved averages."""
        for key, value in state.items():
            self.average[key].copy_(value)
