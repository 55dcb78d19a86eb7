"""The small classifier whose features the extractor ``digits`` measures fidelity with.

No network trained elsewhere knows 8 x 8 grey digits (Inception resizes to 299 x 299 and was trained
on photographs), so the workflow trains one on the dataset itself. Its numbers compare arms of one
study; they are no FID.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from study import bounded, tensors
from study.data import Archive
from study.files import UserError, canonical_json, parse_json, sha256, write_bytes, write_json
from study.provenance import Stopwatch, provenance

FEATURES = 64
REQUIRED_ACCURACY = 0.97  # on digits; a network below it has not learned them
_HELD_OUT = 5  # every fifth image of a class
_BATCH = 64
_STEPS = 800
_PEAK_LR = 4e-3


class Classifier(nn.Module):
    """A convolutional network: images [N, C, R, R] in [-1, 1] -> features [N, 64], logits [N, K].

    Two 3 x 3 convolutions per level, average pooling between levels until the side is at most 4,
    then a hidden layer of 64 units, the features. SiLU rather than ReLU: no unit is exactly
    constant over a data set, so the covariance of the features keeps its rank. ``scale`` gives
    features a mean variance of 1 over the training images; without it their size, and with it
    the size of every distance, would be an accident of training.
    """

    def __init__(self, resolution: int, channels: int, classes: int, width: int = 32) -> None:
        super().__init__()
        self.options = {
            "resolution": resolution,
            "channels": channels,
            "classes": classes,
            "width": width,
        }
        layers: list[nn.Module] = []
        side, fan_in, level = resolution, channels, 0
        while True:
            fan_out = width * 2 ** min(level, 2)
            for _ in range(2):
                layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.SiLU()]
                fan_in = fan_out
            if side <= 4:
                break
            layers.append(nn.AvgPool2d(2, ceil_mode=True))
            side, level = -(-side // 2), level + 1
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.hidden = nn.Linear(fan_in * side * side, FEATURES)
        self.head = nn.Linear(FEATURES, classes)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.silu(self.hidden(self.body(images)))
        return hidden * self.scale, self.head(hidden)


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices (training, held out) of labels int64 [N]: each class's every fifth image is held out.

    Stratified, and a function of the labels alone: no seed moves an image across.
    """
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        held_out[np.flatnonzero(labels == label)[_HELD_OUT - 1 :: _HELD_OUT]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def to_unit(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 0..255 -> [-1, 1]."""
    return images.to(dtype) / 127.5 - 1


def _shifted(images: Tensor, reach: int) -> Tensor:
    """Each image moved by its own random number of pixels, at most ``reach``, edges repeated."""
    count, _, height, width = images.shape
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    down, right = torch.randint(0, 2 * reach + 1, (2, count, 1))
    rows = (down + torch.arange(height))[:, None, :, None]
    columns = (right + torch.arange(width))[:, None, None, :]
    sample = torch.arange(count)[:, None, None, None]
    channel = torch.arange(images.shape[1])[None, :, None, None]
    return padded[sample, channel, rows, columns]


def _fit(network: Classifier, images: Tensor, labels: Tensor) -> None:
    optimiser = torch.optim.AdamW(network.parameters(), lr=_PEAK_LR, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _PEAK_LR, total_steps=_STEPS)
    reach = max(1, images.shape[-1] // 8)
    network.train()
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(_STEPS):
        while len(order) < _BATCH:
            order = torch.cat([order, torch.randperm(len(images))])
        batch, order = order[:_BATCH], order[_BATCH:]
        _, logits = network(_shifted(images[batch], reach))
        loss = F.cross_entropy(logits, labels[batch])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()


def _predict(network: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits in float64."""
    exact = copy.deepcopy(network).eval().double()
    with torch.no_grad():
        parts = [exact(part.double()) for part in images.split(256)]
    features, logits = zip(*parts, strict=True)
    return torch.cat(features), torch.cat(logits)


def train_classifier(
    data: str | Path, out: str | Path, seed: int = 0, required: float | None = None
) -> dict[str, Any]:
    """Train the classifier on the labelled archive ``data``; write ``out`` and its JSON beside it.

    ``out`` (safetensors) holds the weights and, as metadata, the network's options; the JSON of
    the same name holds accuracy, seed, split, hashes and provenance, and is returned. Runs on one
    CPU thread; the same archive, seed and machine give the same bytes.

    ``required`` is the held-out accuracy (0..1) below which nothing is written; by default 0.97
    for the bundled digits and 0 for other archives. Raises ``UserError`` below it, and for an
    archive that has no labels, holds latents, or is too large to train on in memory.
    """
    archive = Archive(data)
    if archive.latents:
        raise UserError(f"{data}: holds latents; the classifier needs images")
    if archive.labels is None:
        raise UserError(f"{data}: has no labels; the classifier needs a labelled archive")
    if not archive.fits():
        raise UserError(f"{data}: too large for the small classifier; use extractor inception")
    training, held_out = split(archive.labels)
    if not len(held_out) or archive.num_classes < 2:
        raise UserError(f"{data}: needs at least two classes, and five images in one of them")
    if required is None:
        source = archive.meta.get("source") or {}
        kind = source.get("kind") if isinstance(source, dict) else source
        required = REQUIRED_ACCURACY if kind == "digits" else 0.0

    watch = Stopwatch()
    images = to_unit(torch.from_numpy(archive.images()).permute(0, 3, 1, 2), torch.float32)
    labels = torch.from_numpy(archive.labels)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on how many threads share them
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = Classifier(archive.resolution, archive.channels, archive.num_classes)
            _fit(network, images[training], labels[training])
        features, _ = _predict(network, images[training])
        network.scale /= features.var(0).mean().sqrt().float()
        _, logits = _predict(network, images[held_out])
    finally:
        torch.set_num_threads(threads)
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    if not all(value.isfinite().all() for value in weights.values()):
        raise UserError(f"{data}: the classifier's training diverged: try another seed")
    wrong = int((logits.argmax(1) != labels[held_out]).sum())
    accuracy = 1 - wrong / len(held_out)
    if accuracy < required:
        raise UserError(
            f"{data}: the classifier is right on {accuracy:.1%} of {len(held_out)} held-out "
            f"images, needs {required:.0%}: try another seed, or check the labels"
        )

    # One metadata key only: safetensors writes several in no fixed order.
    write_bytes(out, save(weights, metadata={"classifier": canonical_json(network.options)}))
    record = {
        "accuracy": accuracy,
        "errors": wrong,
        "required_accuracy": required,
        "seed": seed,
        "split": {
            "rule": "every fifth image of each class is held out",
            "training": len(training),
            "held_out": len(held_out),
        },
        "dataset": archive.name,
        "dataset_sha256": archive.sha256,
        "options": network.options,
        "features": FEATURES,
        "training": {"steps": _STEPS, "batch": _BATCH, "peak_lr": _PEAK_LR},
        "sha256": sha256(out),
        "seconds": round(watch.seconds, 3),
        "peak_memory_mib": round(watch.peak_memory_mib, 1),
        "provenance": provenance("cpu"),
    }
    write_json(Path(out).with_suffix(".json"), record)
    return record


def load_classifier(path: str | Path) -> Classifier:
    """The network in a file that `train_classifier` wrote, in evaluation mode, float32.

    Raises ``UserError`` where the file is missing or another kind of file.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; make the classifier with `study extractor`")
    foreign = UserError(f"{path}: not a classifier written by `study extractor`")
    with bounded.reading(path, "a classifier written by `study extractor`"):
        weights = tensors.read_safetensors(Path(path))
        with safe_open(path, framework="pt") as file:
            described = (file.metadata() or {}).get("classifier")
    options = parse_json(described, path) if described is not None else None
    names = {"resolution", "channels", "classes", "width"}
    if not isinstance(options, dict) or options.keys() != names:
        raise foreign
    if not all(isinstance(n, int) and 0 < n < 2**20 for n in options.values()):
        raise foreign
    try:
        with torch.device("meta"):  # without memory, until the weights are known to be as large
            network = Classifier(**options)
        network.load_state_dict(weights, assign=True)
    except (TypeError, ValueError, RuntimeError):
        raise foreign from None
    if not all(value.isfinite().all() for value in weights.values()):
        raise UserError(f"{path}: holds numbers that are not finite; make it anew")
    return network.float().eval().requires_grad_(False)
