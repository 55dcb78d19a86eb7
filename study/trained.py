"""A run's network as training left it: its weights, and the denoiser that they make."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from study import bounded, tensors
from study.backbones.base import Backbone
from study.diffusion import formulations
from study.diffusion.base import Denoiser
from study.diffusion.split import SplitDenoiser
from study.files import UserError, read_object
from study.network import networks_of
from study.spec.run import Spec

WEIGHTS = {"ema": "weights.safetensors", "raw": "raw.safetensors"}
"""Files in a run's ``train/``: the averaged weights, and those of the last step."""


class BrokenWeights(UserError):
    """Weights that are not finite: a result of their run, which has no samples and no features."""


def read_status(train: str | Path) -> dict[str, Any]:
    """``status.json`` of the run in ``train``. Raises ``UserError`` where it is no such file."""
    path = Path(train) / "status.json"
    status = read_object(path, "status", "spec")
    told = {"done": (), "diverged": ("step", "reason")}.get(str(status["status"]))
    if not isinstance(status["spec"], dict) or told is None or not status.keys() >= set(told):
        raise UserError(f"{path}: not the status of a training; train the run again")
    return status


def weights_file(train: str | Path, which: str = "ema") -> Path:
    """The file of the averaged (``ema``) or last (``raw``) weights of the run in ``train``.

    Raises ``UserError`` where it is missing.
    """
    path = Path(train) / WEIGHTS[which]
    if not path.exists():
        raise UserError(f"{path}: missing; train the run again (delete {train})")
    return path


def load_weights(network: Backbone, train: str | Path, which: str = "ema") -> Path:
    """Load the weights of the run in ``train``; returns their file.

    Raises ``UserError`` where it is missing or does not fit, ``BrokenWeights`` where a weight is
    not finite.
    """
    path = weights_file(train, which)
    with bounded.reading(path, "a file of weights"):
        weights = tensors.read_safetensors(path)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path}: {str(error).splitlines()[-1].strip()}") from None
    broken = {name: int((~value.isfinite()).sum()) for name, value in weights.items()}
    if count := sum(broken.values()):
        first = next(name for name, number in broken.items() if number)
        verb = "weight is" if count == 1 else "weights are"
        raise BrokenWeights(f"{path.name}: {count} {verb} not finite, the first of them in {first}")
    return path


def denoiser_of(spec: Spec, network: Backbone, device: torch.device) -> Denoiser:
    """D(x; sigma) of a run's network, in the precision that the run was trained in.

    Of a split network it asks the part that is responsible for sigma.
    """
    precision = spec.training.precision
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)

    def evaluating(one: Any) -> Any:
        def evaluate(x: Tensor, noise: Tensor, label: Tensor | None = None, **more: Any) -> Tensor:
            with torch.autocast(device.type, dtype=half, enabled=half is not None):
                return one(x, noise, label, **more).float()

        return evaluate

    made = formulations(spec.formulation, noise_scale=spec.backbone.noise_scale)
    denoisers = [
        formulation.denoiser(evaluating(one))
        for formulation, one in zip(made, networks_of(network), strict=True)
    ]
    if len(denoisers) == 1:
        return denoisers[0]
    return SplitDenoiser(denoisers, sorted(spec.formulation.splits, reverse=True))
