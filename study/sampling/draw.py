"""From seeds to images: every sample is a function of its own seed."""

import shutil
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from study import bounded
from study.averaging import remark
from study.backbones.base import check_attention
from study.data import Archive
from study.diffusion.guidance import guided
from study.diffusion.samplers import NoiseSource, sampler
from study.files import (
    UserError,
    atomic,
    canonical_json,
    read_json,
    read_object,
    sha256,
    write_json,
)
from study.network import arithmetic, build_network
from study.pictures import in_order, tile
from study.provenance import Stopwatch, provenance
from study.sampling.decoder import LatentDecoder, load_decoder
from study.spec.guidance import guidance_options, nfe
from study.spec.measuring import BestOf, Decoding, Measurement
from study.spec.metrics import NUMBERS
from study.spec.run import Spec
from study.trained import BrokenWeights, denoiser_of, load_weights, read_status

GRID = 10
"""Rows and columns of the sample grid."""


def to_uint8(images: Tensor) -> np.ndarray:
    """Finite images [B, C, H, W] in [-1, 1] as uint8 [B, H, W, C]; values outside are clipped."""
    scaled = (images.float() * 127.5 + 128).clip(0, 255).to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()


def _save_picture(path: Path, picture: Image.Image) -> None:
    with atomic(path) as temporary:
        picture.save(temporary, format="PNG")


def finite(samples: Tensor) -> Tensor:
    """Which of the samples [B, ...] hold finite numbers alone, bool [B]."""
    return samples.isfinite().flatten(1).all(1)


def _save_samples(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez(file, images, labels)


def _labels(archive: Archive, conditional: bool, seeds: range, chosen: Any) -> np.ndarray:
    """Class labels of samples. ``data``: the data set's own, classes taking turns by their shares.

    Sample i's label depends on i alone; as many samples as images have exactly their proportions.
    ``uniform``: all classes take turns; else the chosen ones do.
    """
    if not conditional:
        return np.zeros(len(seeds), np.int64)
    if chosen != "data":
        classes = range(archive.num_classes) if chosen == "uniform" else chosen.classes
        if max(classes) >= archive.num_classes:
            raise UserError(
                f"labels: {max(classes)} is no class of data set {archive.name}, whose classes are "
                f"0 to {archive.num_classes - 1}"
            )
        return np.array(classes)[np.arange(seeds.start, seeds.stop) % len(classes)]
    labels = archive.labels
    turn = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        turn[members] = (np.arange(len(members)) + 0.5) / len(members)
    taken = labels[np.lexsort((labels, turn))]
    return taken[np.arange(seeds.start, seeds.stop) % len(taken)]


def _noted(path: Path) -> Any:
    """What a note of an interrupted generation says; nothing where it is missing or damaged."""
    with suppress(UserError):
        return read_json(path)
    return None


class _Parts:
    """Finished batches on disk, so that an interrupted generation goes on where it was."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        note = folder / "identity.json"
        text = canonical_json(identity)
        if _noted(note) != text:
            self.clear()
            write_json(note, text)

    def path(self, start: int) -> Path:
        return self.folder / f"{start:08d}.npz"

    def load(self, start: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Images of the samples that are finite, and which ones those are.

        ``None`` where the batch is missing or damaged, and so must be made.
        """
        path = self.path(start)
        with suppress(OSError, ValueError, zipfile.BadZipFile, bounded.Damaged):
            return bounded.read_npz(path, "images"), bounded.read_npz(path, "whole")
        return None

    def save(self, start: int, images: np.ndarray, whole: np.ndarray, seconds: float) -> None:
        with atomic(self.path(start)) as temporary, temporary.open("wb") as file:
            np.savez(file, images=images, whole=whole)
        write_json(self.folder / "seconds.json", seconds)

    @property
    def seconds(self) -> float:
        """Time that earlier attempts spent on these batches."""
        noted = _noted(self.folder / "seconds.json")
        return noted if isinstance(noted, int | float) else 0.0

    def clear(self) -> None:
        for path in self.folder.glob("[!.]*"):
            path.unlink()

    def remove(self) -> None:
        """Leave nothing; a temporary file of a killed attempt does not stay either."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _skip(
    out: Path, archive: Archive, facts: dict[str, Any], word: str, reason: str
) -> dict[str, Any]:
    """What a run leaves that cannot be sampled: no images, and a grid that says so."""
    print(f"study: {reason}: nothing is sampled", file=sys.stderr)
    shape = (0, archive.resolution, archive.resolution, archive.channels)
    _save_samples(out / "samples.npz", np.zeros(shape, np.uint8), np.zeros(0, np.int64))
    picture = Image.new("L", (480, 480), 200)
    ImageDraw.Draw(picture).text((240, 240), word, fill=0, anchor="mm", font_size=32)
    _save_picture(out / "grid.png", picture)
    facts = {"status": "skipped", "reason": reason, "images": 0, **facts}
    write_json(out / "generate.json", {**facts, "provenance": provenance()})
    return facts


def _decoder(settings: Decoding | None, weights: str, archive: Archive) -> LatentDecoder | None:
    """What makes images of samples: a decoder for latents, nothing for images."""
    if archive.latents and settings is None:
        raise UserError(
            f"dataset.decoder: missing; data set {archive.name} holds latents, which become "
            "images only through an autoencoder (weights, scale)"
        )
    if settings is None:
        return None
    if not archive.latents:
        raise UserError(
            f"dataset.decoder: data set {archive.name} holds images; leave the decoder out"
        )
    if not weights:
        raise UserError("dataset.decoder.weights: missing; the file of the autoencoder's weights")
    decoder = load_decoder(weights, settings.scale)
    channels = decoder.post_quant_conv.in_channels
    if channels != archive.channels:
        raise UserError(
            f"dataset.decoder: decodes latents of {channels} channels, but those of "
            f"{archive.name} have {archive.channels}"
        )
    return decoder


def best_step(metric: str, values: dict[int, list[float]]) -> int | None:
    """The step whose measurements have the best mean of a metric; the earliest of equal ones.

    Steps that lack a measurement which another one has are left out: their mean is of fewer.
    """
    sign = 1 if NUMBERS[metric].better == "lower" else -1
    most = max(map(len, values.values()), default=0)
    means = {step: sign * sum(v) / most for step, v in values.items() if len(v) == most > 0}
    return min(sorted(means), key=means.__getitem__, default=None)


def _best(run_dir: Path, best: BestOf) -> int | None:
    """The snapshot of a run that other measurements found best; ``None`` where all failed."""
    values: dict[int, list[float]] = {}
    for name in best.best:
        folder = run_dir / "measurements" / name
        step = read_object(folder / "generate.json", "step")["step"]
        found = read_object(folder / f"{best.extractor}.json", "metrics", "bases")
        value = found["metrics"].get(found["bases"].get(best.metric))
        if value is not None:
            values.setdefault(step, []).append(value)
    return best_step(best.metric, values)


def generate(
    run_dir: str | Path,
    measurement: Measurement,
    data: str | Path,
    out: str | Path,
    *,
    decoder: str = "",
    batch: int = 256,
    threads: int | None = None,
    code: str | None = None,
) -> dict[str, Any]:
    """Generate the images of a trained run for one measurement.

    ``run_dir`` holds ``train/`` (and ``measurements/``, where the best snapshot is asked for);
    ``data`` is the data set archive (for the image size, the number of images and the labels);
    ``batch`` images are made at a time; ``code`` is the digest of the generating code, and batches
    that other code left unfinished are not used. Latents are decoded with the weights in the file
    ``decoder``. Writes ``samples.npz`` (``arr_0`` uint8 [n, H, W, C], ``arr_1`` int64 labels),
    ``grid.png`` and ``generate.json``, and returns what that holds.

    ``status`` is ``skipped`` for a run without images: one that diverged before the step that is
    asked for, or whose weights are not finite. It is ``diverged`` where samples (or what the
    decoder makes of them) are not finite: no image is made of these, ``not_finite`` counts them,
    ``not_finite_seeds`` names them. Else it is ``done``. Raises ``UserError`` where weights are
    missing or do not fit.
    """
    if threads:
        torch.set_num_threads(threads)
    run_dir, out = Path(run_dir), Path(out)
    train = run_dir / "train"
    status = read_status(train)
    archive = Archive(data)
    spec = Spec.read(status["spec"])  # older runs lack newer options
    draw = sampler(measurement.sampler)
    guidance = guidance_options(
        measurement.guidance and measurement.guidance.model_dump(mode="json"), spec.formulation
    )
    at = measurement.at
    step = at if isinstance(at, int) else status.get("steps", spec.steps)
    if isinstance(at, BestOf):
        step = _best(run_dir, at)
    facts = {
        "measurement": measurement.name,
        "snapshot": "best" if isinstance(at, BestOf) else at,
        "step": step,
        "seed": measurement.seed,
        "sampler": draw.options.model_dump(mode="json"),
        "guidance": None if guidance is None else guidance.model_dump(mode="json"),
        "weights": measurement.weights,
        "labels": measurement.model_dump(mode="json")["labels"],
        "nfe": nfe(measurement.sampler, guidance, spec.formulation),
        "precision": spec.training.precision,
        "code": code,
    }
    out.mkdir(parents=True, exist_ok=True)
    if step is None:
        return _skip(out, archive, facts, "no snapshot", "no snapshot has a measurement")
    if status["status"] == "diverged" and (at == "final" or step > status["step"]):
        word = f"diverged at step {status['step']}"
        return _skip(out, archive, facts, word, f"training {word}: {status['reason']}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_attention(spec.training.attention, device)
    decode = _decoder(measurement.decoder, decoder, archive)
    if decode is not None:
        decode.to(device)
        facts["decoder"] = {"scale": decode.scale, "weights_sha256": sha256(decoder)}
    network = build_network(spec, archive).to(device).eval()
    try:
        at_end = at == "final" or step == status["step"]
        path = load_weights(network, train, measurement.weights, None if at_end else step)
        weights_sha256 = sha256(path)
    except BrokenWeights as error:
        return _skip(out, archive, facts, "weights not finite", str(error))
    denoiser = denoiser_of(spec, network.merged(), device)
    if guidance is not None:
        denoiser = guided(denoiser, guidance, null_label=archive.num_classes)

    count = measurement.images or len(archive)
    seeds = range(measurement.seed, measurement.seed + count)
    conditional = spec.training.conditional
    labels = _labels(archive, conditional, seeds, measurement.labels)
    shape = (archive.channels, archive.resolution, archive.resolution)
    identity = {**facts, "spec": spec.key, "data": archive.sha256, "batch": batch}
    state = run_dir / "state" / "measurements"
    parts = _Parts(
        state / out.name,
        {**identity, "images": count, "weights_sha256": weights_sha256},
    )
    stopwatch = Stopwatch(device, before=parts.seconds)
    images, whole = [], []
    starts = range(0, count, batch)
    quiet = 1.0 if sys.stderr.isatty() else 20.0
    for start in tqdm(starts, desc="generate", unit="batch", mininterval=quiet):
        made = parts.load(start)
        if made is None:
            here = seeds[start : start + batch]
            source = NoiseSource(here, shape, ahead=device.type != "cpu")
            label = None
            if conditional:
                label = torch.from_numpy(labels[start : start + len(here)]).to(device)
            latents = source.latents().to(device)
            with arithmetic(facts["precision"]):
                made = draw.sample(denoiser, latents, label, noise=source)
            sound = finite(made)
            if decode is not None:
                made = decode.decode(made)
                sound &= finite(made)
            made = to_uint8(made[sound]), sound.cpu().numpy()
            parts.save(start, *made, stopwatch.seconds)
        images.append(made[0])
        whole.append(made[1])
        done = {"step": start + len(made[1]), "steps": count, "seconds": stopwatch.seconds}
        write_json(state / f"{out.name}.json", {"stage": "generate", **done, "time": time.time()})
    seconds = stopwatch.seconds
    samples, kept = np.concatenate(images), np.concatenate(whole)
    absent = np.flatnonzero(~kept)
    _save_samples(out / "samples.npz", samples, labels[kept])
    _save_picture(out / "grid.png", tile(in_order(samples, absent, GRID * GRID), GRID))
    broken = f"{len(absent)} of {count} samples are not finite" if len(absent) else None
    if broken:
        print(f"study: {broken}: no image is made of them", file=sys.stderr)
    young = remark(spec, measurement.weights, step)
    result = {
        "status": "diverged" if broken else "done",
        "reason": broken,
        "images": len(samples),
        "not_finite": len(absent),
        "not_finite_seeds": (measurement.seed + absent).tolist(),
        **({"remark": young} if young else {}),
        **facts,
        "weights_sha256": weights_sha256,
        "samples_sha256": sha256(out / "samples.npz"),
        "seconds": seconds,
        "images_per_second": count / seconds,
        "peak_memory_mib": stopwatch.peak_memory_mib,
        "provenance": provenance(device),
    }
    write_json(out / "generate.json", result)
    parts.remove()
    (state / f"{out.name}.json").unlink(missing_ok=True)
    return result
