"""Damaged and hostile files as sources of data: one line, or the same content as ever.

All files are tried in one process of bounded memory and time (`main`, below). What may not happen:
another exception, a crash, memory that a small file does not need, a file that runs code, content
that is other than in the sound file.
"""

import gzip
import io
import json
import os
import pickle
import re
import resource
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_data import cifar_batch, fill, latent, make_tar, make_zip, npy, png

MEMORY, PEAK, SECONDS = 3 * 2**30, 2**29, 120
CLASSES = {f"{name}/{k}.png": png(ord(name) + k) for name in "abc" for k in range(3)}
REFUSED, ANY, SAME = "refused", "any", "same"


# --- building ------------------------------------------------------------------------------------


def zeros(size: int) -> bytes:
    """A raw deflate stream of so many zeros, made of copies of one block of a MiB."""
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = pack.compress(bytes(2**20)) + pack.flush(zlib.Z_FULL_FLUSH)
    return block * (size >> 20) + b"\x03\x00"


def raw_zip(*entries: tuple[str, bytes, int, int], crc: int = 0, at: int | None = None) -> bytes:
    """A zip of (name, bytes, method, declared size), with the sizes in zip64 fields."""
    body, listing = b"", b""
    for name, data, method, size in entries:
        offset = len(body) if at is None else at
        common = struct.pack("<HHHHHI", 45, 0, method, 0, 0, crc or zlib.crc32(data))
        zip64 = struct.pack("<HHQQ", 1, 16, size, len(data))
        ends = struct.pack("<IIHH", 2**32 - 1, 2**32 - 1, len(name), len(zip64))
        body += b"PK\3\4" + common + ends + name.encode() + zip64 + data
        listing += b"PK\1\2" + struct.pack("<H", 45) + common + ends
        listing += struct.pack("<HHHII", 0, 0, 0, 0, offset) + name.encode() + zip64
    end = struct.pack("<HHHHIIH", 0, 0, len(entries), len(entries), len(listing), len(body), 0)
    return body + listing + b"PK\5\6" + end


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, stream: bytes, bits: int = 8, color: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", stream) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def edm(content: Any = None, files: dict[str, bytes] | None = None) -> dict[str, bytes]:
    """Files of an archive as EDM's tools write it; ``content`` is its dataset.json."""
    images = {f"0000{k // 2}/img{k:08d}.png": png(k) for k in range(4)}
    if content is None:
        content = {"labels": [[name, k % 3] for k, name in enumerate(images)]}
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return {**images, **(files or {}), "dataset.json": text}


def lmdb_bytes(folder: Path, count: int = 200) -> bytes:
    import lmdb

    with lmdb.open(str(folder)) as database, database.begin(write=True) as transaction:
        for seed in range(count):
            side = 48 if seed % 5 == 0 else 8  # some in pages of their own
            transaction.put(f"{seed * 7919 % 997:040x}".encode(), png(seed, side, side))
    return (folder / "data.mdb").read_bytes()


def tar_entry(name: str, size: bytes, kind: bytes = b"0", data: bytes = b"") -> bytes:
    """A header whose size field (12 bytes) is given as it stands, then ``data`` in whole blocks."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[156:157], header[148:156] = size, kind, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % 512)


def base256(number: int) -> bytes:
    return (number % 256**12 | (0 if number < 0 else 1 << 95)).to_bytes(12, "big")


def header(shape: str, descr: str = "'<f4'", version: bytes = b"\1\0") -> bytes:
    """An .npy without content that declares a shape."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + len(text).to_bytes(2 + 2 * (version > b"\1\0"), "little") + text


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def pair(second: Any, first: Any = None) -> bytes:
    """U-ViT's form of a latent: an array of two objects."""
    both = np.empty(2, object)
    both[:] = [latent(0) if first is None else first, second]
    return npy(both)


# --- pickles -------------------------------------------------------------------------------------

RAN: list[str] = []


def target(*_: Any) -> dict:
    RAN.append("a file ran code")
    return {}


class Calls:
    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple:
        return self.reduced


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


DTYPE_O = b"cnumpy\ndtype\n" + text("O8") + b"\x89\x88\x87R"


def forged(address: int, core: str = "core", state: bytes | None = None) -> bytes:
    """An object type whose flags say that it is plain bytes, so that an address is an object."""
    if state is None:
        state = b"(K\x03" + text("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"
    scalar = f"cnumpy.{core}.multiarray\nscalar\n".encode()
    content = b"C\x08" + struct.pack("<Q", address)
    return b"\x80\x04" + scalar + DTYPE_O + state + b"b" + content + b"\x86R)R."


def pickles() -> Iterator[tuple[str, bytes]]:
    """Pickles of which none is a batch of images or a latent."""
    for core in ("core", "_core"):
        yield f"forged type {core}", forged(id(target), core)
    yield "forged type with fields", forged(
        id(target),
        state=b"(K\x03" + text("|") + b"N" + text("a") + b"\x85}" + text("a") + DTYPE_O
        + b"K\x00\x86sK\x08K\x08K\x00t",
    )  # fmt: skip
    yield (
        "array of a forged type",
        (
            b"\x80\x04cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01K\x01"
            b"\x85"
            + DTYPE_O
            + b"(K\x03"
            + text("|")
            + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            b"\x89C\x08" + struct.pack("<Q", id(target)) + b"tb."
        ),
    )
    changed = b"cnumpy\ndtype\n" + text("u1") + b"\x89\x88\x87R"
    yield (
        "type of all arrays",
        b"\x80\x04" + changed + b"(K\x03" + text(">") + b"NNNK\x07K\x07K\x00tb.",
    )
    yield "attribute of a function", b"\x80\x02cnumpy.core.multiarray\nscalar\n}U\x01aK\x01sb."
    for name in ("os system", "numpy.core.multiarray frombuffer", "numpy.core.numeric fromfile",
                 "builtins getattr", "__builtin__ eval", "numpy dtype.newbyteorder"):  # fmt: skip
        module, _, function = name.partition(" ")
        yield name, f"c{module}\n{function}\n".encode() + text("true") + b"\x85R."
        yield f"{name}, by text", b"\x80\x04" + text(module) + text(function) + b"\x93)R."
    yield "call", pickle.dumps(Calls(target), 2)
    yield "call in data", pickle.dumps({b"data": Calls(target), b"labels": []}, 4)
    yield "extension", b"\x80\x04\x82\x01."
    yield "persistent", b"Pabc\n."
    for place in (2**16, 2**30, 2**32 - 1):
        yield f"memo {place}", b"\x80\x02}r" + struct.pack("<I", place) + b"."
    for size in (2**20, 2**34, 2**62, 2**64 - 1):
        eight = struct.pack("<Q", size)
        for name, code in (("frame", 0x95), ("text", 0x8D), ("bytes", 0x8E), ("bytearray", 0x96)):
            yield f"{name} of {size}", b"\x80\x05" + bytes([code]) + eight + b"abc."
    for code in b"XBT\x8b":
        yield f"long {code}", b"\x80\x03" + bytes([code]) + struct.pack("<I", 2**31 - 1) + b"abc."
    yield "tuples as keys", b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s."
    yield "many tuples", b"\x80\x02)" + b"q\x00h\x00h\x00\x87" * 200 + b"."
    yield "deep", b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    yield "many", b"\x80\x02(" + b"}" * 3_000_000 + b"l."
    encode = (
        b"c_codecs\nencode\nq\x00" + text("a" * 2**20) + b"q\x01" + text("latin1") + b"\x86q\x02R"
    )
    yield "encoded again and again", b"\x80\x02(" + encode + b"h\x00h\x02R" * 100_000 + b"l."
    yield "itself", b"\x80\x02]q\x00h\x00a."
    yield "digits", b"I" + b"9" * 5000 + b"\n."
    yield "no stop", b"\x80\x02}"
    yield "nothing", b""
    yield "takes too much", b"\x80\x02K\x01\x86."
    yield (
        "wrong shape",
        pickle.dumps(np.zeros((2, 3)), 4).replace(b"K\x02K\x03\x86", b"K\x09K\x09\x86"),
    )
    huge = b"\x8a\x08" + struct.pack("<q", 2**50)
    yield "huge shape", pickle.dumps(np.zeros((2, 3)), 4).replace(b"K\x02K\x03\x86", huge + b"\x85")


# --- the files -----------------------------------------------------------------------------------


class Cases:
    """Files under ``folder``, each with its source, settings, and what must come of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0

    def put(self, what: str, source: str, files: bytes | dict[str, bytes], expected: str = REFUSED,
            suffix: str = "", **spec: Any) -> tuple:  # fmt: skip
        self.number += 1
        path = self.folder / f"{self.number}{suffix}"
        if isinstance(files, bytes):
            path.write_bytes(files)
        else:
            path.mkdir()
            fill(path, files)
        return what, source, path, expected, spec

    def pickled(self) -> Iterator[tuple]:
        for what, content in pickles():
            batch = {f"data_batch_{k}": content for k in range(1, 6)}
            yield self.put(f"CIFAR-10: {what}", "cifar10", batch)
            beside = npy(np.empty(2, object))
            beside = beside[: beside.index(b"\n") + 1] + content
            yield self.put(f"latent: {what}", "latents", {"0.npy": beside, "1.npy": npy(latent(0))})

    def zips(self) -> Iterator[tuple]:
        good = [(name, data, 0, len(data)) for name, data in CLASSES.items()]
        images = list(edm().items())
        stored = [(name, data, 0, len(data)) for name, data in images]
        bomb = zeros(8 * 2**30)
        for source, sound in (("zip", good), ("archive", stored)):
            name = f"{sound[0][0].rpartition('/')[0]}/img00000009.png"
            for what, entries in {
                "bomb": [*sound, (name, bomb, 8, 8 * 2**30)],
                "bomb that says little": [*sound, (name, bomb, 8, 100)],
                "zip64 size": [*sound, (name, png(), 0, 2**40)],
                "zip64 size, packed": [*sound, (name, zeros(2**20), 8, 2**62)],
                "other method": [*sound, (name, png(), 12, 268)],
                "unknown method": [*sound, (name, png(), 97, 268)],
                "bomb of a dataset.json": [*good[:1], ("dataset.json", bomb, 8, 8 * 2**30)],
            }.items():
                yield self.put(f"{source}: {what}", source, raw_zip(*entries), suffix=".zip")
            many = [(sound[0][0], png(), 0, len(png()))] * 2000
            yield self.put(f"{source}: equal names", source, raw_zip(*many), suffix=".zip")
            over = [(f"a/{k}.png", png(), 0, len(png())) for k in range(2000)]
            yield self.put(f"{source}: overlapping", source, raw_zip(*over, at=0), suffix=".zip")
        for name in ("d/" * 20_000 + "a.png", "a" * 60_000 + ".png", "9" * 6000 + "/1.png"):
            yield self.put(
                "zip: long name", "zip", raw_zip((name, png(), 0, len(png()))), suffix=".zip"
            )
        for source in ("ffhq", "celeba"):
            entry = ("9" * 6000 + ".png", png(), 0, len(png()))
            yield self.put(f"{source}: long number", source, raw_zip(entry), suffix=".zip")
        forging = raw_zip(
            ("a\nstudy: done\x1b[2J.png", b"?", 0, 1), ("b.png", png(), 0, len(png()))
        )
        yield self.put("zip: escape codes in a name", "zip", forging, suffix=".zip")

    def images(self) -> Iterator[tuple]:
        row = zlib.compress(bytes(8 * 25))
        packed = b"\x78\x9c" + zeros(2 * 2**30)
        for what, image in {
            "much behind the pixels": png_of(8, 8, packed),
            "more pixels than there are": png_of(60_000, 60_000, row),
            "size 2^31": png_of(2**31 - 1, 2**31 - 1, row),
            "no size": png_of(0, 0, row),
            "16 bits": png_of(8, 8, zlib.compress(bytes(8 * 49)), 16),
            "ppm": b"P6 99999 99999 255\n",
            "ppm, 16 bits": b"P6 8 8 65535\n" + bytes(384),
            "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
            "gif": b"GIF89a\xff\xff\xff\xff\xf0\0\0" + bytes(900),
            "heic": b"\0\0\0\x18ftypheic" + bytes(40),
        }.items():
            # Behind the pixels Pillow does not look, nor need we.
            expected = ANY if what == "much behind the pixels" else REFUSED
            files = {"a/0.png": image, "b/1.png": png(1)}
            yield self.put(f"folder: {what}", "folder", files, expected)
            archive = make_zip(self.folder / "made.zip", {"0.png": image, "1.png": png(1)}, 8)
            yield self.put(f"archive: {what}", "archive", archive.read_bytes(), expected, ".zip")
            many = {f"{k}.png": image for k in range(4)}
            yield self.put(f"folder: only {what}", "folder", many, expected)

    def described(self) -> Iterator[tuple]:
        names = [name for name in edm() if name.endswith(".png")]
        pairs = [[name, k] for k, name in enumerate(names)]
        for what, content in {
            "no JSON": b"{",
            "not UTF-8": b'{"labels": [["\xff\xfe\xfa", 0]]}',
            "deep": b'{"labels": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            "deep objects": b'{"a":' * 100_000,
            "digits": b'{"labels": [["a", ' + b"9" * 5000 + b"]]}",
            "large": b'{"labels": [' + b"[]," * 3_000_000 + b"[]]}",
            "a list": pairs,
            "a number": 5,
            "labels a number": {"labels": 5},
            "labels text": {"labels": "abc"},
            "labels no pairs": {"labels": [1, 2]},
            "labels of two letters": {"labels": ["ab", "cd"]},
            "labels longer": {"labels": [[*p, 1] for p in pairs]},
            "names that are lists": {"labels": [[[name], 1] for name in names]},
            "two labels": {"labels": [*pairs, [names[0], 3]]},
            "two labels by key": b'{"labels": {"%s": 0, "%s": 1}}' % ((names[0].encode(),) * 2),
            "labels twice": b'{"labels": null, "labels": null}',
            "one missing": {"labels": pairs[1:]},
            "one too many": {"labels": [*pairs, ["x.png", 0]]},
            **{
                f"label {what}": {"labels": [[names[0], label], *pairs[1:]]}
                for what, label in {
                    "negative": -1, "2^31": 2**31, "2^70": 2**70, "a fraction": 1.5,
                    "text": "1", "true": True, "null": None, "a vector": [0, 1],
                    "not a number": float("nan"), "an object": {"a": 1}, "10^5": 100_000,
                }.items()
            },
            "few classes": {"labels": pairs, "classes": ["a"]},
            "classes a number": {"labels": pairs, "classes": 5},
            "classes text": {"labels": pairs, "classes": "abcdef"},
            "classes numbers": {"labels": pairs, "classes": [1, 2, 3, 4]},
            "too many classes": {"labels": pairs, "classes": ["x"] * 100_001},
        }.items():  # fmt: skip
            # A list or number named dataset.json is no archive's: only an archive must be one.
            both = edm(content)
            zipped = make_zip(self.folder / "made.zip", both, 8).read_bytes()
            yield self.put(f"archive: {what}", "archive", zipped, suffix=".zip")
            yield self.put(f"unpacked archive: {what}", "archive", both)
            yield self.put(f"folder: {what}", "folder", both)
        for key, value in {
            "sha256": 5, "sha256 ": "abc", "name": 5, "name ": {}, "moments": 5, "split": [],
            "source": "x", "images": 3, "images ": 10**30,
        }.items():  # fmt: skip
            content = {"labels": pairs, key.strip(): value}
            yield self.put(f"archive: {key} is {value}", "archive", edm(content))
        for where in ("00000/dataset.json", "other/dataset.json"):
            files = {k: v for k, v in edm().items() if k != "dataset.json"}
            for source in ("archive", "folder"):
                files[where] = edm()["dataset.json"]
                yield self.put(f"{source}: {where}", source, files)

    def arrays(self) -> Iterator[tuple]:
        four = latent(0)
        for what, data in {
            "10^9 latents": header("(1000000000, 4, 8, 8)"),
            "overflowing": header("(4294967296, 4294967296, 4, 4)"),
            "negative": header("(-4, 4, 4)") + bytes(256),
            "huge number": header(f"({'9' * 4000},)"),
            "deep": header("(" * 500 + ")" * 500),
            "unary": header("-" * 8000 + "1"),
            "a call": header("__import__('os').system('true')"),
            "no dictionary": b"\x93NUMPY\1\0\x05\0(1,)\n",
            "long header": b"\x93NUMPY\2\0\xff\xff\xff\xff{}\n",
            "no header": b"\x93NUMPY",
            "version": header("(4, 4, 4)", version=b"\x09\0") + bytes(256),
            "text": header("(1,)", "'<U500000000'"),
            "structure": header("(4,)", "[('a', '<f4', (4, 4))]") + bytes(256),
            "objects": header("(3,)", "'|O'") + pickle.dumps([1, 2, 3]),
            "empty": npy(np.zeros((0, 8, 8), np.float32)),
            "no pixels": npy(np.zeros((4, 0, 0), np.float32)),
            "not finite": npy(np.full((4, 4, 4), np.nan)),
            "infinite in float32": npy(np.full((4, 4, 4), 1e300)),
            "complex": npy(np.zeros((4, 4, 4), complex)),
            "short": npy(four)[:-1],
            "long": npy(four) + b"\0",
        }.items():
            yield self.put(f"npy: {what}", "latents", {"0.npy": data, "1.npy": npy(four)})
            zipped = make_zip(self.folder / "made.zip", {"0.npy": npy(four), "1.npy": data}, 8)
            yield self.put(f"archive of npy: {what}", "archive", zipped.read_bytes(), suffix=".zip")
            inside = make_zip(self.folder / "made.npz", {"arr_0.npy": data}, 8).read_bytes()
            yield self.put(f"npz: {what}", "latents", {"a.npz": inside, "1.npy": npy(four)})
        stack = np.stack([four] * 3)
        start = header("(1000000000, 4, 8, 8)")
        size = len(start) + 10**9 * 4 * 64 * 4
        forging = raw_zip(("latents.npy", start + bytes(100), 0, size))
        yield self.put("npz: 10^9 latents, declared", "latents", {"a.npz": forging})
        tiny = header("(20000000, 1, 1, 1)", "'<f2'")
        content = zlib.compressobj(9, zlib.DEFLATED, -15)
        content = content.compress(tiny + bytes(40_000_000)) + content.flush()
        crc = zlib.crc32(tiny + bytes(40_000_000))
        many = raw_zip(("latents.npy", content, 8, len(tiny) + 40_000_000), crc=crc)
        yield self.put("npz: very many", "latents", {"a.npz": many})
        for what, labels in {
            "2^31": [0, 1, 2**31],
            "negative": [0, 1, -1],
            "2^63": np.array([0, 1, 2**63], np.uint64),
            "fractions": [0.5, 1, 2],
            "too few": [1],
            "objects": np.array([1, 2, {}], object),
        }.items():
            yield self.put(
                f"npz: labels {what}", "latents", {"a.npz": npz(latents=stack, labels=labels)}
            )
        for what, label in {
            "2^70": 2**70, "negative": -1, "text": "a", "fraction": 1.5, "list": [1], "none": None,
            "array": np.arange(3),
        }.items():  # fmt: skip
            yield self.put(f"pair: label {what}", "latents", {"0.npy": pair(label)})
        yield self.put("pair: list", "latents", {"0.npy": pair(1, [[1.0]])})
        yield self.put("pair: text", "latents", {"0.npy": pair(1, "abc")})
        labels = {"2^31": 2**31, "fraction": 3.7, "infinite": np.inf, "two": [1, 2]}
        for what, label in labels.items():
            files = {"x_features/0.npy": npy(four), "x_labels/0.npy": npy(np.array(label))}
            yield self.put(f"DiT: label {what}", "latents", files)
        yield self.put(
            "npz: twice", "latents", {"a.npz": raw_zip(*[("arr_0.npy", npy(four), 0, 384)] * 2)}
        )

    def tars(self) -> Iterator[tuple]:
        first, end = tar_entry("a/1.png", b"%011o\0" % len(png()), data=png()), bytes(1024)
        for what, entry in {
            "size 2^40": tar_entry("a/2.png", base256(2**40)),
            "size 2^80": tar_entry("a/2.png", base256(2**80)),
            "size negative": tar_entry("a/2.png", base256(-1024)),
            "size -512": tar_entry("a/2.png", base256(-512)),
            "name of 2^40": tar_entry("a/2.png", base256(2**40), b"L"),
            "name of -512": tar_entry("a/2.png", base256(-512), b"L"),
            "header of 2^40": tar_entry("a/2.png", base256(2**40), b"x"),
            "header of 2^30": tar_entry("a/2.png", base256(2**30), b"g"),
            **{
                f"said to be {size}": tar_entry("h", b"%011o\0" % (len(size) + 9), b"x",
                                               b"%02d size=%s\n" % (len(size) + 9, size))
                + tar_entry("a/2.png", b"%011o\0" % len(png()), data=png())
                for size in (b"9" * 13, b"9" * 24, b"-1024", b"-99999999")
            },
            "headers of headers": tar_entry("h", b"%011o\0" % 0, b"x") * 5000,
            "link": tar_entry("a/2.png", b"%011o\0" % 0, b"2"),
            "device": tar_entry("a/2.png", b"%011o\0" % 0, b"3"),
            "pipe": tar_entry("a/2.png", b"%011o\0" % 0, b"6"),
            "sparse": tar_entry("a/2.png", b"%011o\0" % 0, b"S"),
            "damaged header": b"?" * 512,
        }.items():  # fmt: skip
            last = tar_entry("b/1.png", b"%011o\0" % len(png()), data=png())
            yield self.put(f"tar: {what}", "tar", first + entry + last + end, suffix=".tar")
        yield self.put("tar: no end", "tar", first, suffix=".tar")
        block = gzip.compress(bytes(2**24))
        yield self.put("tar: bomb", "tar", block * 150, suffix=".tar.gz")

    def folders(self) -> Iterator[tuple]:
        for what, make in {
            "pipe": os.mkfifo,
            "device": lambda path: path.symlink_to("/dev/zero"),
            "broken link": lambda path: path.symlink_to("nowhere"),
            "sparse": lambda path: (path.touch(), os.truncate(path, 8 * 2**30)),
        }.items():
            for source in ("folder", "archive", "lsun", "latents", "cifar10"):
                content = {"latents": ("0.npy", npy(latent(0))), "cifar10": ("data_batch_1", b"")}
                name, data = content.get(source, ("0.png", png()))
                case = self.put(f"{source}: {what}", source, {name: data})
                make(case[2] / name.replace("0", "1").replace("batch_1", "batch_2"))
                yield case

    def damaged(self, random: np.random.Generator, each: int) -> Iterator[tuple]:
        """Sound files with bytes lost or changed."""
        batches = {f"cifar/data_batch_{k}": cifar_batch(k) for k in range(1, 6)}
        tar = make_tar(self.folder / "made.tar", CLASSES).read_bytes()
        zipped = make_zip(self.folder / "made.zip", CLASSES, 8).read_bytes()
        described = make_zip(self.folder / "made.zip", edm(), 8).read_bytes()
        latents = npz(latents=np.stack([latent(k) for k in range(5)]), labels=np.arange(5) % 3)
        batch, database = batches["cifar/data_batch_2"], lmdb_bytes(self.folder / "lmdb")
        # Content, the folder that is made of it, source, suffix. The first have check sums.
        sound: list[tuple[str, bytes, Callable[[bytes], Any], str, str]] = [
            ("zip", zipped, bytes, "zip", ".zip"),
            ("archive", described, bytes, "archive", ".zip"),
            ("archive as zip", described, bytes, "zip", ".zip"),
            ("tar", tar, bytes, "tar", ".tar"),
            ("tar.gz", gzip.compress(tar, mtime=0), bytes, "tar", ".tar.gz"),
            ("npz", latents, lambda data: {"a.npz": data}, "latents", ""),
            ("CIFAR-10", batch, lambda d: batches | {"cifar/data_batch_2": d}, "cifar10", ""),
            ("LMDB", database, lambda data: {"data.mdb": data}, "lsun", ""),
            ("npy", npy(latent(1)), lambda d: {"0.npy": d, "1.npy": npy(latent(2))}, "latents", ""),
            ("pair", pair(np.int64(2)), lambda data: {"0.npy": data}, "latents", ""),
            ("dataset.json", edm()["dataset.json"], lambda data: edm(data), "archive", ""),
        ]
        for order, (what, content, wrap, source, suffix) in enumerate(sound):
            spec = {"resolution": 8} if source == "lsun" else {}
            yield self.put(f"{what}: sound", source, wrap(content), SAME, suffix, **spec)
            for index in range(each):
                data = bytearray(content)
                kind, expected = "cut", SAME
                if index % 2 == 0:
                    del data[int(random.integers(len(data))) :]
                else:
                    kind, expected = "changed", SAME if order < 6 else ANY
                    bad = (random.bytes(1), b"\xff" * 8, bytes(8), b"\xff\xff\xff\x7f")[
                        index // 2 % 4
                    ]
                    for at in random.integers(0, len(data), 1 + index % 3):
                        data[at : at + len(bad)] = bad
                files = wrap(bytes(data))
                yield self.put(f"{what}: {kind} {index}", source, files, expected, suffix, **spec)

    def __iter__(self) -> Iterator[tuple]:
        yield from self.pickled()
        yield from self.zips()
        yield from self.images()
        yield from self.described()
        yield from self.arrays()
        yield from self.tars()
        yield from self.folders()
        yield from self.damaged(np.random.default_rng(7), 24)


def main(folder: Path) -> None:
    """Try all files under a memory limit; print what came of each, as a line of JSON."""
    from study.data.archive import Archive
    from study.data.convert import convert
    from study.files import UserError

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    out = folder / "out.zip"
    sound: dict[str, str] = {}
    before = np.dtype(np.uint8).str, np.dtype(object).flags
    for what, source, path, expected, spec in Cases(folder):
        print(json.dumps({"trying": what}), flush=True)
        began, result, said = time.process_time(), "accepted", ""
        try:
            found = convert({"source": source, "name": "x", **spec}, out, path)["sha256"]
            Archive(out).verify()
            kind, _, rest = what.partition(": ")
            if rest == "sound":
                sound[kind] = found
            if expected == SAME and found != sound[kind]:
                result = "accepted with other content"
            out.unlink()
        except UserError as error:
            result, said = "refused", str(error)
        except Exception as error:
            result, said = "raised", f"{type(error).__name__}: {error}"
        if RAN or before != (np.dtype(np.uint8).str, np.dtype(object).flags):
            result, said = "ran code", str(RAN)
            RAN.clear()
        seconds = time.process_time() - began
        # Not getrusage, which knows the size of the process that started this one.
        peak = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        print(json.dumps({"what": what, "expected": expected, "result": result, "said": said[:2000],
                          "lines": said.count("\n") + 1, "printable": said.isprintable(),
                          "seconds": seconds, "peak": peak}), flush=True)  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    pytest.importorskip("lmdb")
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux, which says how much memory a process had")
    folder = tmp_path_factory.mktemp("hostile")
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        cwd=Path(__file__).parent,
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (lines[-1:], done.returncode, done.stderr[-3000:])
    return [line for line in lines if "what" in line]


def test_every_file_is_refused_in_one_line_or_read_as_ever(results):
    assert len(results) > 500
    wrong = [
        (case["what"], case["result"], case["said"])
        for case in results
        if case["result"]
        not in {"refused": {"refused"}}.get(case["expected"], {"refused", "accepted"})
    ]
    assert not wrong
    said = [(c["what"], c["said"]) for c in results if c["result"] == "refused"]
    assert not [(w, s) for w, s in said if not s.isprintable() or not 20 < len(s) < 2000]
    assert not [w for w, s in said if " ()" in s]


def test_small_files_need_little_memory_and_time(results):
    assert max(case["peak"] for case in results) < PEAK
    slow = [(case["what"], case["seconds"]) for case in results if case["seconds"] > 8]
    assert not slow


def test_sound_files_are_accepted(results):
    sound = [case for case in results if case["what"].endswith(": sound")]
    assert len(sound) == 11
    assert {case["result"] for case in sound} == {"accepted"}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
