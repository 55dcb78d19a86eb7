"""Replaying one golden case (recorded weights, inputs and outputs) on a network."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def same_side(case: dict[str, Any], key: str, tensors: dict[str, Tensor]) -> None:
    """Raise ``ValueError`` where the constructor speaks of images of another size than ``in/x``.

    For networks that run on images of any size.
    """
    told, side = case["constructor"].get(key), tensors["in/x"].shape[-1]
    if told not in (None, side):
        raise ValueError(f"{key} is {told}, but in/x has {side}")


def replay(
    network: nn.Module,
    case: dict[str, Any],
    tensors: dict[str, Tensor],
    forward: Callable[[Tensor], Tensor],
    output: str,
) -> dict[str, Tensor]:
    """Load a case's weights, run it once, and return what it records of that run.

    ``weights/<key>`` must fit ``network`` exactly (``RuntimeError`` otherwise). ``forward`` maps
    ``in/x`` to the prediction, returned under the name ``output``. With ``in/cotangent`` G the
    scalar sum(prediction * G) is differentiated: ``out/grad_x``, and ``out/param_grad_norms`` in
    the order of the case's ``param_names``. ``out/act/<sub-module>`` is that module's output.
    """
    prefix = "weights/"
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    network.load_state_dict(weights)
    network.eval()

    outputs: dict[str, Tensor] = {}
    hooks = []
    for name in tensors:
        if name.startswith("out/act/"):

            def keep(_module: nn.Module, _inputs: Any, value: Tensor, name: str = name) -> None:
                # Recomputed activations (checkpointing) come a second time.
                outputs.setdefault(name, value.detach().clone())

            module = network.get_submodule(name.removeprefix("out/act/"))
            hooks.append(module.register_forward_hook(keep))

    x = tensors["in/x"].clone().requires_grad_()
    prediction = forward(x)
    if "in/cotangent" in tensors:
        (prediction * tensors["in/cotangent"]).sum().backward()
        outputs["out/grad_x"] = x.grad
        parameters = dict(network.named_parameters())
        norms = [_norm(parameters[name].grad) for name in case["param_names"]]
        outputs["out/param_grad_norms"] = torch.stack(norms)
    for hook in hooks:
        hook.remove()
    outputs[output] = prediction.detach()
    return outputs


def _norm(gradient: Tensor | None) -> Tensor:
    return torch.zeros(()) if gradient is None else gradient.norm()
