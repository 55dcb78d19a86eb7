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
from study.weights import LAST, snapshot


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


def weights_file(train: str | Path, which: str = "ema", step: int | None = None) -> Path:
    """The file of a run's weights after ``step`` steps (``None``: as many as it was trained).

    ``which``: an average, by its name in ``Spec.averages``, or ``raw``; ``train`` is the run's
    folder of that name. Raises ``UserError`` where it is missing, which says how to get it.
    """
    train = Path(train)
    path = train / LAST[which] if step is None and which in LAST else None
    if path is None:
        status = read_status(train)
        last = status["step"]
        path = snapshot(train, which, last if step is None else step)
        if step == last and which in LAST and not path.exists():
            path = train / LAST[which]
        if not path.exists() and path.name not in _kept(status):
            raise UserError(f"{path}: {_not_kept(status, which, step)}")
    if not path.exists():
        raise UserError(f"{path}: missing; train the run again (delete {train})")
    return path


def _kept(status: dict[str, Any]) -> set[str]:
    """Names of the files that a training says it has kept, and of those of the last step."""
    listed = status.get("snapshots", {}).items()
    names = {snapshot("", which, int(step)).name for step, files in listed for which in files}
    return names | set(LAST.values())


def _not_kept(status: dict[str, Any], which: str, step: int | None) -> str:
    """Why a run has no such weights, and how to get them."""
    spec = Spec.read(status["spec"])
    if which not in (*spec.averages, "raw"):
        return f"the run has {', '.join((*spec.averages, 'raw'))}; training.ema lists averages"
    if step is not None and step > status["step"]:
        how = "diverged at" if status["status"] == "diverged" else "was trained to"
        return f"the run {how} step {status['step']}; take an earlier one"
    wanted = f"{{at: [{step}], raw: true}}" if which == "raw" else f"[{step}]"
    return f"not kept; train with training.snapshots: {wanted}"


def load_weights(
    network: Backbone, train: str | Path, which: str = "ema", step: int | None = None
) -> Path:
    """Load the weights of the run in ``train`` (see ``weights_file``); returns their file.

    Raises ``UserError`` where it is missing or does not fit, ``BrokenWeights`` where a weight is
    not finite.
    """
    path = weights_file(train, which, step)
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
