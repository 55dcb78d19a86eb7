"""Reference features and statistics: once per dataset and extractor."""

import shutil
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from study import bounded, tensors
from study.data import Archive
from study.fidelity.neighbours import radii
from study.files import UserError, atomic, read_json, sha256, write_json
from study.provenance import Stopwatch, provenance

FEATURES_FILE = "features.safetensors"
RADII_FILE = "radii.safetensors"
RECORD_FILE = "reference.json"
IDENTITY = {"extractor", "precision", "resize", "dataset", "dataset_sha256", "split", "moments"}


class _ArchiveImages:
    """An archive's images, read by slices and never held all at once."""

    def __init__(self, archive: Archive) -> None:
        self.archive = archive

    def __len__(self) -> int:
        return len(self.archive)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.archive.images(range(*rows.indices(len(self))))


def statistics(features: Tensor) -> dict[str, Tensor]:
    """Mean [F] and unbiased (n - 1) covariance [F, F] of features [n, F], as torch-fidelity has
    them: the mean in the features' precision, the covariance in float64."""
    from study.fidelity.extractors import torch_fidelity

    found = torch_fidelity.metric_fid.fid_features_to_statistics(features)
    return {
        "mean": torch.from_numpy(found["mu"]),
        "covariance": torch.from_numpy(np.atleast_2d(found["sigma"])),
    }


def make_reference(
    data: str | Path,
    extractor: str,
    weights: str | Path | None,
    out_dir: str | Path,
    *,
    device: Any = None,
) -> dict[str, Any]:
    """Compute the features of all images of the archive ``data`` into ``out_dir``.

    Written: ``features.safetensors`` (``features`` [n, F] float32, ``mean`` [F] and
    ``covariance`` [F, F] as `statistics` gives them), a copy of the extractor's weights, so that
    the folder is all that `evaluate` needs, and, last, ``reference.json`` with the identity. Where
    the folder already holds a reference of the same identity, and its files are as recorded,
    nothing is computed. Returns the content of ``reference.json``.

    Raises ``UserError`` for an unknown extractor, missing or wrong weights, latents, fewer than
    two images, or features that are not finite.
    """
    from study.fidelity import extractors

    cls = extractors.extractor_class(extractor)
    source = cls.find_weights(weights)
    archive = Archive(data)
    if archive.latents:
        raise UserError(f"{data}: holds latents; a reference needs the decoded images")
    if len(archive) < 2:
        raise UserError(f"{data}: holds one image; a reference needs at least two")
    identity = {
        "extractor": extractor,
        "extractor_sha256": None if source is None else sha256(source),
        "dataset": archive.name,
        "dataset_sha256": archive.sha256,
        "split": archive.meta.get("split") or "all",
        "images": len(archive),
        "resolution": archive.resolution,
        "channels": archive.channels,
        "precision": cls.precision,
        "resize": cls.resize,
        "moments": "torch-fidelity",  # by whom they are computed; older folders had others
        "tool": "torch-fidelity",
        "tool_version": extractors.torch_fidelity.__version__,
    }
    out_dir = Path(out_dir)
    present = _recorded(out_dir)
    if present is not None and present["identity"] == identity:
        return present

    loaded = extractors.load(extractor, source, device)
    where = loaded.device
    watch = Stopwatch(where)
    features = extractors.extract(loaded, _ArchiveImages(archive))["features"]
    broken = int((~features.isfinite().all(1)).sum())
    if broken:
        raise UserError(
            f"{data}: features of {broken} of {len(features)} images are not finite: "
            "the extractor's weights are broken"
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / RECORD_FILE).unlink(missing_ok=True)  # it vouches for the files beside it
    with atomic(out_dir / FEATURES_FILE) as temporary:
        save_file({"features": features, **statistics(features)}, temporary)
    copy = None
    if source is not None:
        copy = f"weights{source.suffix}"
        with atomic(out_dir / copy) as temporary:
            shutil.copyfile(source, temporary)
    record = {
        "identity": identity,
        "features": features.shape[1],
        "features_sha256": sha256(out_dir / FEATURES_FILE),
        "weights": copy,
        "seconds": round(watch.seconds, 3),
        "peak_memory_mib": round(watch.peak_memory_mib, 1),
        "provenance": provenance(where),
    }
    write_json(out_dir / RECORD_FILE, record)
    return record


def _recorded(folder: Path) -> dict[str, Any] | None:
    """The record of a complete reference in ``folder``; ``None`` where it must be computed."""
    try:
        record = read_json(folder / RECORD_FILE)
        complete = sha256(folder / FEATURES_FILE) == record["features_sha256"]
        if record["weights"] is not None:
            found = sha256(folder / record["weights"])
            complete = complete and found == record["identity"]["extractor_sha256"]
        identity = record["identity"]
        sound = all(isinstance(identity[key], int) for key in ("images", "resolution", "channels"))
        return record if complete and sound and identity.keys() >= IDENTITY else None
    except (UserError, OSError, KeyError, TypeError, AttributeError):
        return None


class Features:
    """Features of images that others are measured against, and what metrics need of them."""

    def __init__(self, features: Tensor) -> None:
        self.features = features

    @cached_property
    def statistics(self) -> dict[str, Tensor]:
        """Their ``mean`` and ``covariance``."""
        return statistics(self.features)

    def radii(self, device: torch.device) -> Tensor:
        """Radii of their balls, [n]."""
        return radii(self.features.to(device))


class Reference(Features):
    """A reference folder that `make_reference` wrote.

    Attributes: ``identity`` (dict), ``weights`` (path or ``None``), ``features`` [n, F] float32
    and ``statistics`` (``mean``, ``covariance``). Raises ``UserError`` where the folder
    is no complete reference.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        record = _recorded(self.folder)
        if record is None:
            raise UserError(f"{folder}: not a complete reference; make it with `study reference`")
        self.identity: dict[str, Any] = record["identity"]
        self.weights = None if record["weights"] is None else self.folder / record["weights"]
        with bounded.reading(self.folder / FEATURES_FILE, "a reference"):
            stored = tensors.read_safetensors(self.folder / FEATURES_FILE)
        wanted = {"features": 2, "mean": 1, "covariance": 2}
        if {key: value.dim() for key, value in stored.items()} != wanted or not all(
            value.is_floating_point() and bool(value.isfinite().all()) for value in stored.values()
        ):
            raise UserError(f"{folder}: not a reference; make it anew with `study reference`")
        super().__init__(stored.pop("features"))
        self.statistics = stored
        self.sha256: str = record["features_sha256"]

    def radii(self, device: torch.device) -> Tensor:
        """Radii of the features' balls, [n]; computed at the first call, and kept in the folder."""
        path, wanted = self.folder / RADII_FILE, {"features_sha256": self.sha256}
        with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
            if file.metadata() == wanted:
                return file.get_tensor("radii").to(device)
        found = super().radii(device)
        # In a folder that can only be read, or is full, they are computed every time.
        with suppress(OSError, UserError, SafetensorError), atomic(path) as temporary:
            save_file({"radii": found.cpu()}, temporary, wanted)
        return found

    def same_weights(self, path: str | Path | None) -> Path | None:
        """``path``, if it holds the weights the reference was made with; else ``UserError``."""
        wanted = self.identity["extractor_sha256"]
        if path is None and wanted is None:
            return None
        if path is None or not Path(path).is_file():
            raise UserError(f"{path}: no such file with the extractor's weights")
        if sha256(path) != wanted:
            raise UserError(
                f"{path}: not the weights that {self.folder} was made with: make the reference anew"
            )
        return Path(path)
