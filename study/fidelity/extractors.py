"""Feature extractors: uint8 images -> features (and class logits), the registry of them.

A new extractor is one class below and one line in `EXTRACTORS`. Every class is a torch-fidelity
feature extractor, registered there as ``longskip-<name>``, so ``torch_fidelity.calculate_metrics``
takes it by name as well as ours do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from study.ahead import Ahead
from study.fidelity.torchvision_fix import import_torch_fidelity
from study.files import UserError, sha256

torch_fidelity = import_torch_fidelity()

# File name and content of torch-fidelity's Inception weights: the network of the original FID
# (TensorFlow's inception-2015-12-05), converted.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


GPU_BATCH = 256
"""Images per call that fill a GPU."""


class Images(Protocol):
    """N images that are read by slices: an array uint8 [N, H, W, C], or an archive's view."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> np.ndarray: ...


class Extractor(torch_fidelity.FeatureExtractorBase):
    """Base of the extractors.

    ``forward`` takes uint8 [N, C, H, W], C = 1 or 3 (torch-fidelity's own inputs have 3), and
    returns those of ``(features [N, F] float32, logits [N, K] float32)`` that were asked for.

    Class attributes
    ----------------
    batch : int
        Images per call of the network. A constant of the extractor, and the last call is filled
        up, so that features do not depend on how many images come together.
    uses_gpu : bool
        Whether a GPU is used where there is one.
    precision : str
        Floating-point format of the network's arithmetic. Features are rounded to float32.
    resize : str
        The resize rule, in words; it is applied inside ``forward``.
    frechet : str
        Name of the Frechet distance on these features: ``fid`` for torch-fidelity's Inception
        network and no other.
    """

    batch: ClassVar[int]
    uses_gpu: ClassVar[bool] = False
    precision: ClassVar[str]
    resize: ClassVar[str]
    frechet: ClassVar[str] = "fd"

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__(name, features_list)
        self.prepare(feature_extractor_weights_path)

    def prepare(self, weights: str | None) -> None:
        """Build the network from its weights file. Nothing by default."""

    @classmethod
    def find_weights(cls, weights: str | Path | None) -> Path | None:
        """The weights file to use when the user names ``weights``; ``None``: there are none.

        Raises ``UserError`` where the extractor needs weights that cannot be had.
        """
        if weights is not None:
            raise UserError(f"{weights}: extractor {cls.registry_name()} takes no weights")
        return None

    @classmethod
    def registry_name(cls) -> str:
        return next(name for name, entry in EXTRACTORS.items() if entry is cls)

    @property
    def device(self) -> torch.device:
        """Where images must be; the CPU for an extractor without weights."""
        return next(self.parameters(), torch.empty(0)).device

    def compute(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 [N, C, H, W] -> (features, logits), or (features,) without class probabilities."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UserError(
                f"extractor {self.name}: images are {images.dtype} {list(images.shape)}, "
                "expected uint8 [N, 1 or 3, H, W]"
            )
        found = dict(zip(self.get_provided_features_list(), self.compute(images), strict=True))
        return tuple(found[layer].float() for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False  # compiled kernels may round differently

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 3, 8, 8, dtype=torch.uint8)


def _single_channel(images: Tensor, name: str) -> Tensor:
    """[N, 1, H, W]; three equal channels, torch-fidelity's form of grey images, count as one."""
    if images.shape[1] == 3 and not (images == images[:, :1]).all():
        raise UserError(f"extractor {name} was trained on grey images, these have colours")
    return images[:, :1]


class Digits(Extractor):
    """The classifier that `study.fidelity.classifier` trained on the dataset itself: 64 features.

    Arithmetic is float64, which makes the float32 features the same for any batch size, and any
    machine up to a last bit.
    """

    batch = 256
    precision = "float64"
    resize = "none: images have the resolution of the training archive"

    def prepare(self, weights: str | None) -> None:
        from study.fidelity.classifier import load_classifier

        if weights is None:
            raise UserError(
                "extractor digits needs weights: train them with `study extractor`, "
                "then give their file"
            )
        self.network = load_classifier(weights).double()

    @classmethod
    def find_weights(cls, weights: str | Path | None) -> Path | None:
        if weights is None:
            raise UserError(
                "extractor digits needs --weights FILE: the .classifier.safetensors "
                "that `study extractor` writes"
            )
        if not Path(weights).is_file():
            raise UserError(f"{weights}: no such file; make it with `study extractor`")
        return Path(weights)

    def compute(self, images: Tensor) -> tuple[Tensor, ...]:
        from study.fidelity.classifier import to_unit

        options = self.network.options
        if options["channels"] == 1:
            images = _single_channel(images, "digits")
        expected = (options["channels"], options["resolution"], options["resolution"])
        if tuple(images.shape[1:]) != expected:
            raise UserError(
                f"extractor digits was trained on images of {' x '.join(map(str, expected))}, "
                f"these are {' x '.join(map(str, images.shape[1:]))}"
            )
        return self.network(to_unit(images, torch.float64))


class Inception(Extractor):
    """torch-fidelity's ``inception-v3-compat``: 2048 pooled features, 1008 logits without bias.

    The network of FID; the Inception networks of EDM's and guided-diffusion's evaluators are other
    conversions, and their numbers differ a little. Grey images are repeated to three channels.
    float32 with TF32 off; ``feature_extractor_internal_dtype="float64"`` is not offered, as
    torch-fidelity 0.4 silently computes it in float32.
    """

    batch = 32
    uses_gpu = True
    precision = "float32"
    resize = "inside the network: bilinear to 299 x 299 as in TensorFlow 1, corners not aligned"
    frechet = "fid"

    def prepare(self, weights: str | None) -> None:
        path = self.find_weights(weights)
        self.network = torch_fidelity.FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=str(path),
        )

    @classmethod
    def find_weights(cls, weights: str | Path | None) -> Path | None:
        """A file with the one right content: the one given, torch-fidelity's copy, or a download.

        Unpickling runs what a file says, so nothing is loaded whose hash is not the published one.
        """
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        name = URL_INCEPTION_V3.rpartition("/")[2]
        wanted = f"{name}, sha256 {INCEPTION_SHA256[:8]}..."
        if weights is not None:
            path = Path(weights)
            if not path.is_file():
                raise UserError(f"{path}: no such file; extractor inception needs {wanted}")
        else:
            path = Path(torch.hub.get_dir()) / "checkpoints" / name
            if not path.is_file():
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    torch.hub.download_url_to_file(
                        URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256, progress=False
                    )
                except (OSError, RuntimeError) as error:
                    raise UserError(
                        f"extractor inception: its weights are not in {path.parent} and cannot be "
                        f"downloaded ({error}): give the file ({wanted}) as weights"
                    ) from None
        found = sha256(path)
        if found != INCEPTION_SHA256:
            raise UserError(
                f"{path}: sha256 {found[:8]}... is not torch-fidelity's Inception network; "
                f"FID needs {wanted}"
            )
        return path

    def compute(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.network(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images)


class Pixels(Extractor):
    """Pixel values in [0, 1] as features: no network, so no class probabilities and no IS.

    Sees means and covariances of pixels only. For tests, and where there are no labels to train a
    classifier with.
    """

    batch = 1024
    precision = "float32"
    resize = "area average to 8 x 8 where larger"

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("features",)

    def compute(self, images: Tensor) -> tuple[Tensor, ...]:
        values = images.float() / 255
        if max(values.shape[2:]) > 8:
            values = F.adaptive_avg_pool2d(values, 8)
        return (values.flatten(1),)


EXTRACTORS: dict[str, type[Extractor]] = {
    "digits": Digits,
    "inception": Inception,
    "pixels": Pixels,
}


def extractor_class(name: str) -> type[Extractor]:
    """The class registered as ``name``. Raises ``UserError`` that lists the names there are."""
    if name not in EXTRACTORS:
        raise UserError(f"no extractor {name!r}; there are {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name]


def register(name: str, cls: type) -> str:
    """Register ``cls`` with torch-fidelity as ``longskip-<name>``, once; return that name."""
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    registered = f"longskip-{name}"
    if registered not in FEATURE_EXTRACTORS_REGISTRY:
        torch_fidelity.register_feature_extractor(registered, cls)
    return registered


def registered(name: str) -> str:
    """The name by which torch-fidelity knows our extractor ``name``, registered on demand."""
    return register(name, extractor_class(name))


def load(name: str, weights: str | Path | None = None, device: Any = None) -> Extractor:
    """The extractor ``name`` with its weights, ready: evaluation mode, no gradients.

    ``device``: by default a GPU where the extractor uses one and there is one, else the CPU.
    """
    cls = extractor_class(name)
    path = cls.find_weights(weights)
    if device is None:
        device = "cuda" if cls.uses_gpu and torch.cuda.is_available() else "cpu"
    extractor = cls(
        registered(name),
        list(cls.get_provided_features_list()),
        feature_extractor_weights_path=None if path is None else str(path),
    )
    return extractor.requires_grad_(False).eval().to(device)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Full float32 products on a GPU (no TF32) and the same algorithm on every call."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def extract(extractor: Extractor, images: Images) -> dict[str, Tensor]:
    """Features of ``images`` (uint8 [N, H, W, C]): {"features": [N, F], "logits": [N, K]}, float32.

    ``logits`` is absent where the extractor has none; N = 0 gives tensors without rows. Images
    are read ``extractor.batch`` at a time (on a GPU at least ``GPU_BATCH``), the next ones while
    the network works; a shorter last batch is filled up with black images, so
    every call has the same shape and an image's features depend neither on N nor on the rest.
    """
    layers = extractor.get_requested_features_list()
    parts: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    device = extractor.device
    size = extractor.batch if device.type == "cpu" else max(extractor.batch, GPU_BATCH)

    def read(number: int) -> tuple[int, Tensor]:
        chunk = torch.from_numpy(np.ascontiguousarray(images[number * size : (number + 1) * size]))
        batch = chunk.new_zeros(size, *chunk.shape[1:])
        batch[: len(chunk)] = chunk
        return len(chunk), batch.permute(0, 3, 1, 2).contiguous()

    calls = -(-max(len(images), 1) // size)
    ahead = Ahead(read, calls)
    with torch.inference_mode(), exact_arithmetic():
        for number in range(calls):
            rows, batch = ahead(number)
            results = extractor(batch.to(device))
            for layer, values in zip(layers, results, strict=True):
                parts[layer].append(values[:rows].cpu())
    return {layer: torch.cat(values) for layer, values in parts.items()}
