"""Import torch-fidelity beside a torchvision whose compiled part cannot be loaded."""

import sys
from types import ModuleType

from study.files import UserError

# torchvision describes these two operators to torch while it is imported, whether or not its
# compiled part, which defines them, was found.
_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_torchvision() -> ModuleType:
    """Import torchvision; where its compiled part is unusable, without the compiled part.

    A torchvision wheel built for another torch (PyPI's beside a CPU build) stops at its first
    operator. Only after that very error are the operators declared, as a second declaration
    would clash with a compiled part that does load. Data sets, transforms and models then work;
    calling ``nms`` raises torchvision's own error.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error) or "does not exist" not in str(error):
            raise
        import torch

        for operator in _OPERATORS:
            torch.library.define(f"torchvision::{operator}", _SCHEMA)
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torchvision
    return torchvision


def import_torch_fidelity() -> ModuleType:
    """Import torch-fidelity. Raises ``UserError`` where it is not installed."""
    try:
        import_torchvision()
        import torch_fidelity
    except ModuleNotFoundError as error:
        raise UserError(
            f"fidelity metrics need the package {error.name}, which is not installed: "
            "pip install torch-fidelity torchvision"
        ) from None
    return torch_fidelity
