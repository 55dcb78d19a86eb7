"""What does a number mean? The same metrics of images that are no network's.

- ``real``: images of the data set itself, as many as are sampled. What is left between them and the
  whole data set is the finite number of images alone; all of them are at distance 0.
- ``gaussian``: a normal distribution with the mean and covariance of the pixels. Whoever is no
  better has learned less than the second moments.
- ``noise``: independent pixels, each value as likely as any other.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator, Philox

from study.data import Archive, order
from study.fidelity import extractors
from study.fidelity.evaluate import METRICS, measure, metric_name, requested
from study.fidelity.reference import Reference
from study.files import UserError, write_json
from study.provenance import Stopwatch, provenance
from study.randomness import seed_of

FITTED = 4096
"""Images, at most, whose pixels the normal distribution is fitted to."""
ROOM = 2**28
"""Numbers, at most, that these images have."""


class _Drawn:
    """Images that are made row by row, each a function of its number, when they are read."""

    def __init__(self, count: int, make: Callable[[np.ndarray], np.ndarray]) -> None:
        self.count, self.make = count, make

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.make(np.arange(*rows.indices(self.count)))


def _generator(*names: int | str) -> Generator:
    return Generator(Philox(key=seed_of("reference points", *names)))


def real(archive: Archive, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """Images of the data set: none twice before all were there."""

    def make(rows: np.ndarray) -> np.ndarray:
        first, last = int(rows[0]), int(rows[-1]) + 1
        return archive.images(order(seed, first, last - first, len(archive)))

    return make


def gaussian(archive: Archive, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """Draws from the normal distribution of the pixels, rounded and clipped to 0 ... 255.

    A draw is mean + sum_j z_j (x_j - mean) / sqrt(m - 1) over m images x_j with z ~ N(0, 1): its
    covariance is that of the images, which is never formed.
    """
    shape = (archive.resolution, archive.resolution, archive.channels)
    most = max(2, min(FITTED, ROOM // int(np.prod(shape)), len(archive)))
    pixels = archive.images(order(seed, 0, most, len(archive))).reshape(most, -1)
    mean = pixels.mean(0, dtype=np.float64).astype(np.float32)
    spread = (pixels - mean) / np.float32(np.sqrt(most - 1))

    def make(rows: np.ndarray) -> np.ndarray:
        z = np.stack(
            [_generator("gaussian", seed, int(r)).standard_normal(most, np.float32) for r in rows]
        )
        drawn = np.rint(mean + z @ spread).clip(0, 255)
        return drawn.astype(np.uint8).reshape(-1, *shape)

    return make


def noise(archive: Archive, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """Independent pixels, uniform over 0 ... 255."""
    shape = (archive.resolution, archive.resolution, archive.channels)

    def make(rows: np.ndarray) -> np.ndarray:
        return np.stack(
            [_generator("noise", seed, int(row)).integers(0, 256, shape, np.uint8) for row in rows]
        )

    return make


POINTS = {"real": real, "gaussian": gaussian, "noise": noise}


def reference_points(
    data: str | Path,
    reference: str | Path,
    out: str | Path,
    *,
    images: int | None = None,
    metrics: tuple[str, ...] = METRICS,
    seed: int = 0,
    code: str | None = None,
) -> dict[str, Any]:
    """Measure ``POINTS`` against the folder ``reference`` of the archive ``data``; write ``out``.

    ``images`` is how many samples the numbers stand beside (``None``: as many as the archive has):
    Frechet distances depend on it. Raises ``UserError`` for an unknown metric, and where the
    reference is of other images.
    """
    known, archive = Reference(reference), Archive(data)
    metrics = requested({"metrics": metrics}, known)
    if known.identity["dataset_sha256"] != archive.sha256:
        raise UserError(f"{reference}: a reference of other images than those of {data}")
    extractor = extractors.load(known.identity["extractor"], known.weights)
    watch, count = Stopwatch(extractor.device), images or len(archive)
    points: dict[str, dict[str, float | None]] = {}
    for name, kind in POINTS.items():
        found = extractors.extract(extractor, _Drawn(count, kind(archive, seed)))
        scores = measure(found["features"], found.get("logits"), known, metrics, extractor.device)
        points[name] = {base: score.value for base, score in scores.items()}
    record = {
        "reference": known.identity,
        "images": count,
        "seed": seed,
        "points": points,
        "metrics": {
            base: metric_name(base, known.identity["extractor"], count) for base in points["real"]
        },
        "code": code,
        "seconds": round(watch.seconds, 3),
        "peak_memory_mib": round(watch.peak_memory_mib, 1),
        "provenance": provenance(extractor.device),
    }
    write_json(out, record)
    return record
