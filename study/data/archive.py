"""Dataset archives: stored PNG or ``.npy`` entries in a zip, with labels in ``dataset.json``.

The layout is that of EDM and StyleGAN2-ADA's dataset tools (``00000/img00000000.png``, a JSON with
``labels: [[entry, class], ...]`` or ``null``), so archives travel in both directions. Ours carry
more keys in the same JSON; other tools ignore them.
"""

import hashlib
import io
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from study.data.reading import (
    ITEM,
    Zip,
    bounded,
    classes_of,
    dataset_json,
    json_size,
    labels_of,
    one_line,
    read_npy,
    shown,
)
from study.files import UserError
from study.leftovers import is_kept

if TYPE_CHECKING:
    import torch

IMAGE_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("png", "jpg", "jpeg", "jpe", "jfif", "webp", "avif", "bmp", "dib", "gif", "tif", "tiff"),
        *("ppm", "pgm", "pbm", "pnm"),
    )
)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
GIB = 2**30

# What `dataset.json` may say of an archive, beside labels and the names of classes.
DESCRIBED: dict[str, tuple[type, str]] = {
    "name": (str, "text"),
    "moments": (bool, "true or false"),
    "sha256": (str, "64 hexadecimal digits"),
    "split": (str, "text"),
    "source": (dict, "an object"),
}


def encode_png(image: np.ndarray) -> bytes:
    """An uncompressed PNG of a uint8 image [H, W, C] with C = 1 or 3.

    Written here rather than by an imaging library: the bytes then depend on the pixels alone, not
    on the version of a library or of its zlib, and reading them back is a copy.
    """
    height, width, channels = image.shape
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # column 0: filter type "none"
    rows[:, 1:] = image.reshape(height, -1)
    raw = rows.tobytes()
    stream = bytearray(b"\x78\x01")  # zlib header: deflate, 32 KiB window, fastest
    for start in range(0, len(raw), 0xFFFF):
        block = raw[start : start + 0xFFFF]
        last = start + 0xFFFF >= len(raw)
        stream += struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF) + block
    stream += struct.pack(">I", zlib.adler32(raw))
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", bytes(stream)), (b"IEND", b""))
    return PNG_SIGNATURE + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def encode_npy(array: np.ndarray) -> bytes:
    """The ``.npy`` bytes (format 1.0, little-endian float32) of a latent [C, H, W]."""
    buffer = io.BytesIO()
    array = np.ascontiguousarray(array, "<f4")
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _decode_plain_png(data: bytes) -> np.ndarray | None:
    """Pixels of an 8-bit grey or RGB PNG whose rows are unfiltered; ``None`` for any other."""
    if data[:8] != PNG_SIGNATURE or data[37:41] != b"IDAT" or data[24] != 8 or data[28]:
        return None
    channels = {0: 1, 2: 3}.get(data[25])
    if channels is None:
        return None
    width, height = struct.unpack_from(">II", data, 16)
    (length,) = struct.unpack_from(">I", data, 33)
    size = height * (1 + width * channels)
    if not 0 < size <= ITEM:
        return None
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(memoryview(data)[41 : 41 + length], size + 1)
    except zlib.error:
        return None
    if len(raw) != size or not stream.eof:  # the stream goes on in a further chunk
        return None
    rows = np.frombuffer(raw, np.uint8).reshape(height, -1)
    if rows[:, 0].any():
        return None
    return rows[:, 1:].reshape(height, width, channels)


def _decode_image(data: bytes) -> np.ndarray:
    pixels = _decode_plain_png(data)
    if pixels is not None:
        return pixels
    from study.data.pixels import Unusable, open_image

    try:
        image = open_image(data)
    except Unusable as error:
        raise ValueError(error.detail) from None
    if image.mode not in ("L", "RGB"):
        raise ValueError(f"mode {image.mode}, neither 8-bit grey (L) nor RGB")
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _decode_latent(data: bytes) -> np.ndarray:
    array = read_npy(data)
    if array.ndim != 3 or array.dtype.kind != "f":
        raise ValueError(f"{array.dtype} of shape {list(array.shape)}, not float [C, H, W]")
    array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise ValueError("has values that are not finite")
    return array


class Fingerprint:
    """SHA-256 of a dataset's content: decoded values and labels in order, however stored."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._shape: tuple[int, ...] | None = None

    def add(self, value: np.ndarray) -> None:
        """Add one image (uint8 [H, W, C]) or latent (float32 [C, H, W])."""
        if self._shape is None:
            self._shape = value.shape
            kind = "image" if value.dtype == np.uint8 else "latent"
            self._hash.update(f"{kind} {' '.join(map(str, value.shape))}\n".encode())
        dtype = np.uint8 if value.dtype == np.uint8 else "<f4"
        self._hash.update(np.ascontiguousarray(value, dtype).data)

    def finish(self, labels: Sequence[int] | np.ndarray | None) -> str:
        """The hexadecimal digest after all values, with their labels (or ``None``)."""
        self._hash.update(b"unlabelled" if labels is None else b"labels")
        if labels is not None:
            self._hash.update(np.asarray(labels, "<i8").tobytes())
        return self._hash.hexdigest()


class _Folder:
    """Entries of an unpacked archive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = sorted(
            (Path(folder) / name).relative_to(path).as_posix()
            for folder, _, names in os.walk(path)
            for name in names
        )

    def read(self, name: str, most: float = ITEM) -> bytes:
        path = self.path / name
        if not path.is_file():  # opening a pipe would wait for ever
            raise ValueError("not a plain file")
        bounded(size := path.stat().st_size, size, most)
        return path.read_bytes()


class _Zip:
    """Entries of a zip, read by position.

    ``os.pread`` keeps no file position, so one descriptor serves threads and forked processes
    alike, and an index of plain numbers is a fraction of what ``ZipFile`` holds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with Zip(path) as file:
                entries = file.by_name()
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: not a readable zip file ({one_line(error)})") from None
        self._index = {
            name: (
                info.header_offset,
                info.compress_size,
                info.file_size,
                -1 if info.flag_bits & 1 else info.compress_type,  # bit 0: encrypted
                info.CRC,
            )
            for name, info in entries.items()
        }
        self.names = sorted(self._index)
        self._descriptor: int | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        descriptor, self._descriptor = getattr(self, "_descriptor", None), None
        if descriptor is not None:
            os.close(descriptor)

    def read(self, name: str, most: float = ITEM) -> bytes:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        offset, packed, size, method, crc = self._index[name]
        bounded(size, packed, most)
        header = os.pread(self._descriptor, 30, offset)
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise ValueError("the zip is damaged here")
        name_length, extra_length = struct.unpack_from("<HH", header, 26)
        data = os.pread(self._descriptor, packed, offset + 30 + name_length + extra_length)
        if method == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-15).decompress(data, size + 1)
        elif method != zipfile.ZIP_STORED:
            raise ValueError("encrypted, or compressed by another method than deflate")
        if len(data) != size or zlib.crc32(data) != crc:
            raise ValueError("its check sum does not match: the zip is damaged")
        return data


class Archive:
    """A dataset archive: ours, or one made by EDM's or StyleGAN's tools, zipped or unpacked.

    Lazy: entries are decoded when asked for, unless `resident` was called. Safe to share between
    threads and forked processes, and to pickle.

    Attributes
    ----------
    name : str
    entries : list of str
        Names inside the archive, in order.
    resolution : int
        Height and width of an image, or of a latent.
    channels : int
        Channels that a backbone sees: 1 or 3 for images. For latents stored as moments (mean and
        standard deviation) it is half of the stored channels.
    latents, moments : bool
        Whether entries are latents; whether these are moments.
    labels : int64 [N] or None
    classes : list of str or None
        Class names by label, numbers where the archive names none; ``None`` without labels.
    num_classes : int
        0 without labels.
    meta : dict
        ``dataset.json`` without its label list.

    Raises ``UserError`` for a missing or unreadable file, no images, images that are not square,
    or labels that do not fit the images.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            mode = self.path.stat().st_mode
        except OSError:
            raise UserError(f"{path}: no such dataset archive") from None
        self._files = _Folder(self.path) if stat.S_ISDIR(mode) else _Zip(self.path)
        self.entries = [n for n in self._files.names if self._is_content(n)]
        latents = [n.endswith(".npy") for n in self.entries]
        self.latents = any(latents)
        if not self.entries:
            raise UserError(f"{path}: holds no images (PNG or other) and no latents (.npy)")
        if self.latents and not all(latents):
            raise UserError(f"{path}: holds both images and latents; an archive has one kind")

        self.meta, start = self._read_meta()
        self.labels, self.classes = self._read_labels(start)
        self.meta.pop("labels", None)
        self.name = str(self.meta.get("name") or self.path.stem)
        self.moments = self.latents and bool(
            self.meta.get("moments") or "-mean-std-" in self.entries[0]
        )
        self.num_classes = len(self.classes or ())

        self._shape: tuple[int, ...] | None = None
        self._shape = self._decode(0).shape
        height, width = self._shape[1:] if self.latents else self._shape[:2]
        if height != width:
            raise UserError(
                f"{path}: {self.entries[0]} is {height} x {width}, but entries must be square: "
                "convert the dataset with a crop"
            )
        self.resolution = height
        stored = self._shape[0 if self.latents else 2]
        if self.moments and stored % 2:
            raise UserError(f"{path}: moments need an even number of channels, not {stored}")
        self.channels = stored // 2 if self.moments else stored
        self._resident: np.ndarray | None = None
        self._sha256: str | None = self.meta.get("sha256")

    @staticmethod
    def _is_content(name: str) -> bool:
        suffix = os.path.splitext(name)[1].lower()
        return (suffix in IMAGE_SUFFIXES or suffix == ".npy") and is_kept(name.split("/"))

    def _read_meta(self) -> tuple[dict[str, Any], str]:
        """The content of ``dataset.json``, and the folder of all entries in which it lies."""
        found = [name for name in self._files.names if name.rpartition("/")[2] == "dataset.json"]
        found = [name for name in found if is_kept(name.split("/"))]
        if not found:
            return {}, ""
        start = found[0].removesuffix("dataset.json")
        if len(found) > 1 or not all(name.startswith(start) for name in self.entries):
            raise UserError(
                f"{self.path}: {shown(found[-1])} lies beside some of the entries only: one "
                "dataset.json belongs beside or above all of them"
            )
        try:
            meta = dataset_json(self._files.read(found[0], json_size(len(self.entries))))
        except (OSError, ValueError, zlib.error) as error:
            raise UserError(
                f"{self.path}: dataset.json is not readable ({one_line(error)})"
            ) from None
        where = f"{self.path}: dataset.json"
        for key, (kind, what) in DESCRIBED.items():
            if not isinstance(meta.get(key), kind | None):
                raise UserError(f"{where}: {key!r} must be {what}")
        if not re.fullmatch("[0-9a-f]{64}", meta.get("sha256") or "0" * 64):
            raise UserError(f"{where}: 'sha256' must be {DESCRIBED['sha256'][1]}")
        count = meta.get("images")
        if isinstance(count, int) and count != len(self.entries):
            raise UserError(
                f"{where} speaks of {shown(count, 40)} images, but the archive holds "
                f"{len(self.entries)}: convert it again"
            )
        return meta, start

    def _read_labels(self, start: str) -> tuple[np.ndarray | None, list[str] | None]:
        """The labels of the entries, whose names are relative to ``start``, and class names."""
        try:
            by_name = labels_of(self.meta)
            if by_name is None:
                return None, None
            labels = [by_name.pop(name.removeprefix(start), None) for name in self.entries]
            if None in labels:
                first = self.entries[labels.index(None)]
                raise ValueError(
                    f"the label list does not match the images: {labels.count(None)} of "
                    f"{len(labels)} have no label, the first is {shown(first)}"
                )
            if by_name:
                raise ValueError(
                    f"the label list does not match the images: {len(by_name) + len(labels)} "
                    f"labels for {len(labels)} images; it names {shown(min(by_name))}, which is "
                    "not there"
                )
            classes = classes_of(self.meta, max(labels))
        except ValueError as error:
            raise UserError(f"{self.path}: dataset.json: {error}") from None
        return np.array(labels, np.int64), classes or [str(k) for k in range(max(labels) + 1)]

    def __len__(self) -> int:
        return len(self.entries)

    def __getstate__(self) -> dict:
        # A process that unpickles this decodes for itself rather than receive all pixels.
        return {**self.__dict__, "_resident": None}

    def __repr__(self) -> str:
        return (
            f"<Archive {self.name}: {len(self)} {'latents' if self.latents else 'images'} of "
            f"{self.channels} x {self.resolution} x {self.resolution}, {self.num_classes} classes>"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all entries once decoded."""
        return len(self) * int(np.prod(self._shape)) * (4 if self.latents else 1)

    def fits(self, limit_bytes: int = GIB) -> bool:
        """Whether all entries, decoded, take at most ``limit_bytes`` (default 1 GiB)."""
        return self.nbytes <= limit_bytes

    def resident(self) -> np.ndarray:
        """Decode everything once and keep it; later calls of `images` and `batch` are copies.

        Returns the array that is kept (read-only), shaped as by `images`. Ask `fits` first.
        """
        if self._resident is None:
            everything = self.images()
            everything.setflags(write=False)
            self._resident = everything
        return self._resident

    def images(self, indices: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Entries as stored: uint8 [n, H, W, C], or float32 [n, C, H, W] for latents.

        ``indices`` may repeat and come in any order; ``None`` means all, in archive order.
        Raises ``IndexError`` outside 0 ... N-1, ``UserError`` for a damaged entry.
        """
        if indices is None:
            if self._resident is not None:
                return self._resident.copy()
            indices = range(len(self))
        else:
            indices = np.atleast_1d(np.asarray(indices, dtype=np.int64))
            if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
                raise IndexError(f"{self.name} has indices 0 to {len(self) - 1}")
            if self._resident is not None:
                return self._resident[indices]
        out = np.empty((len(indices), *self._shape), np.float32 if self.latents else np.uint8)
        for row, index in enumerate(indices):
            out[row] = self._decode(index)
        return out

    def batch(
        self,
        indices: Sequence[int] | np.ndarray,
        draw: "torch.Tensor | np.ndarray | None" = None,
        move: "Callable[[torch.Tensor], torch.Tensor]" = lambda stored: stored,
    ) -> "tuple[torch.Tensor, torch.Tensor | None]":
        """What training takes: (x [B, C, H, W] float32, labels [B] int64 or ``None``, on the CPU).

        ``move`` puts what is stored where x is to be made, which for images is a fourth of x.
        Images are scaled from 0..255 to [-1, 1] as x / 127.5 - 1; latents are as stored. Latents
        stored as moments give mean + std * ``draw`` with ``draw`` [B, C, H, W] standard normal,
        or the mean where ``draw`` is ``None``.
        """
        import torch

        indices = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        x = move(torch.from_numpy(self.images(indices)))
        if not self.latents:
            x = x.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
            x = x.div_(127.5).sub_(1)
        elif self.moments:
            mean, std = x.chunk(2, dim=1)
            x = mean.contiguous() if draw is None else mean + std * torch.as_tensor(draw).to(x)
        return x, None if self.labels is None else torch.from_numpy(self.labels[indices])

    @property
    def sha256(self) -> str:
        """Hash of the content (decoded values and labels in order), not of the file.

        Taken from ``dataset.json`` where recorded; computed (by decoding everything) otherwise.
        """
        if self._sha256 is None:
            self._sha256 = self._fingerprint()
        return self._sha256

    def verify(self) -> None:
        """Decode everything; raise ``UserError`` where the content is not what was recorded."""
        found, recorded = self._fingerprint(), self.meta.get("sha256")
        if recorded not in (None, found):
            raise UserError(
                f"{self.path}: the content does not match the sha256 in dataset.json: convert it "
                "again"
            )

    def _fingerprint(self) -> str:
        fingerprint = Fingerprint()
        for index in range(len(self)):
            fingerprint.add(self._decode(index))
        return fingerprint.finish(self.labels)

    def _decode(self, index: int) -> np.ndarray:
        name = self.entries[index]
        try:
            data = self._files.read(name)
            value = (_decode_latent if self.latents else _decode_image)(data)
        except MemoryError:
            raise
        except Exception as error:  # decoders of foreign bytes raise almost anything
            raise UserError(f"{self.path}: cannot read {shown(name)}: {one_line(error)}") from None
        if self._shape is not None and value.shape != self._shape:
            raise UserError(
                f"{self.path}: {name} has shape {list(value.shape)}, but "
                f"{self.entries[0]} has {list(self._shape)}: all entries must agree"
            )
        return value
