"""The backbones on recorded weights: predictions, activations, gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from study.backbones.songunet import SongUNet
from study.parity import official
from study.parity.case import Case, Tensors


def weights_of(tensors: Tensors, prefix: str = "weights/") -> Tensors:
    """The recorded weights under their official names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def same_side(case: Case, key: str, tensors: Tensors) -> None:
    """Raise ``ValueError`` where the constructor speaks of images of another size than ``in/x``.

    For networks that run on images of any size.
    """
    told, side = case["constructor"].get(key), tensors["in/x"].shape[-1]
    if told not in (None, side):
        raise ValueError(f"{key} is {told}, but in/x has {side}")


def replay(
    network: nn.Module,
    case: Case,
    tensors: Tensors,
    forward: Callable[[Tensor], Tensor],
    output: str,
) -> Tensors:
    """Load a case's weights, run it once, and return what it records of that run.

    ``weights/<key>`` must fit ``network`` exactly (``RuntimeError`` otherwise). ``forward`` maps
    ``in/x`` to the prediction, returned under the name ``output``. With ``in/cotangent`` G the
    scalar sum(prediction * G) is differentiated: ``out/grad_x``, and ``out/param_grad_norms`` in
    the order of the case's ``param_names``. ``out/act/<sub-module>`` is that module's output.
    """
    network.load_state_dict(weights_of(tensors))
    network.eval()

    outputs: Tensors = {}
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


def uvit(case: Case, tensors: Tensors) -> Tensors:
    """U-ViT and ScaleLong."""
    network = official.uvit(**case["constructor"])
    label = tensors["in/y"].long() if "in/y" in tensors else None

    def forward(x: Tensor) -> Tensor:
        return network(x, tensors["in/timesteps"], label, context=tensors.get("in/context"))

    outputs = replay(network, case, tensors, forward, "out/pred")
    if network.labels:
        outputs["out/null_label"] = torch.full((len(tensors["in/x"]),), network.labels - 1)
    return outputs


GUIDED = 3
"""U-DiT's official guidance acts on the first three channels only, whatever they are."""


def udit(case: Case, tensors: Tensors) -> Tensors:
    """U-DiT: activations and gradients in training, predictions in the merged form."""
    network = official.udit(**case["constructor"])
    same_side(case, "input_size", tensors)
    scale = case.get("cfg_scale")
    if (scale is None) != ("in/cfg_y" not in tensors):
        raise ValueError("cfg_scale and in/cfg_y go together")
    noise = tensors["in/t"]
    label = tensors["in/y"].long() if "in/y" in tensors else None
    drops = [tensors.get(f"in/label_drop_uniform_{k}") for k in (1, 2, 3)]
    uniform = None if any(drop is None for drop in drops) else drops

    def forward(x: Tensor) -> Tensor:
        return network(x, noise, label, label_drop_uniform=uniform)

    outputs = replay(network, case, tensors, forward, "out/pred_train")
    merged = network.merged()
    with torch.no_grad():
        outputs["out/pred"] = merged(tensors["in/x"], noise, label)
        if "in/cfg_y" in tensors:
            half = tensors["in/x"][: len(tensors["in/x"]) // 2]
            both = merged(half.repeat(2, 1, 1, 1), tensors["in/cfg_t"], tensors["in/cfg_y"].long())
            conditional, null = both[:, :GUIDED].chunk(2)
            mixed = (null + scale * (conditional - null)).repeat(2, 1, 1, 1)
            outputs["out/pred_cfg"] = torch.cat([mixed, both[:, GUIDED:]], 1)
    return outputs


def patch_unet(case: Case, tensors: Tensors) -> Tensors:
    """The Patched U-Net."""
    network = official.patch_unet(**case["constructor"])
    same_side(case, "image_size", tensors)
    if case["constructor"].get("use_fp16"):
        raise ValueError("use_fp16 must be false: the cases are compared in float32")
    label = tensors["in/y"].long() if "in/y" in tensors else None
    noise = tensors["in/t"]
    outputs = replay(network, case, tensors, lambda x: network(x, noise, label), "out/pred")
    if "out/null_label" in tensors:
        outputs["out/null_label"] = torch.full_like(tensors["out/null_label"], network.num_classes)
    return outputs


def check_filters(network: SongUNet, weights: Tensors) -> None:
    """Raise ``ValueError`` where weights hold other resampling filters than the network has."""
    for name, ours in network.state_dict().items():
        if name.endswith("resample_filter") and not torch.allclose(ours, weights.get(name, ours)):
            raise ValueError(f"resample_filter: the weights have another one in {name}")


def songunet(case: Case, tensors: Tensors) -> Tensors:
    """DDPM++ and NCSN++."""
    network = official.songunet(**case["constructor"])
    check_filters(network, weights_of(tensors))
    noise = tensors["in/noise_labels"]
    label = tensors.get("in/class_labels")
    augment = tensors.get("in/augment_labels")
    outputs = replay(network, case, tensors, lambda x: network(x, noise, label, augment), "out/F")
    if "out/F_without_augment_labels" in tensors:
        with torch.no_grad():
            outputs["out/F_without_augment_labels"] = network(tensors["in/x"], noise, label)
    return outputs
