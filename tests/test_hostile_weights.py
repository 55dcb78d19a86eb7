"""Hostile and damaged checkpoints, weights, arrays and JSON: one line each, soon, in little memory.

A few hundred files are made from a fixed seed and read by this module in a process of its own,
which may not take much more memory than it has when it begins, nor long.
"""

import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
MEMORY = 600 * 2**20
"""Bytes that reading may take beyond what the process has with everything imported."""
SECONDS = 10
"""Of processor time for one file."""
MARK = "executed"


# --- pickles by hand ---------------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


NEST = b"(K\x01K\x02t" + b"q\x00h\x00\x86" * 60  # each tuple holds the one before twice
REBUILD = named("torch._utils", "_rebuild_tensor_v2")


def stored(kind: str, key: str = "0", count: int = 4) -> bytes:
    """A reference to a storage."""
    inside = text("storage") + named("torch", f"{kind}Storage") + text(key) + text("cpu")
    return b"(" + inside + number(count) + b"tQ"


def tensor(size: bytes, stride: bytes, kind: str = "Float", offset: bytes = b"K\x00") -> bytes:
    return REBUILD + b"(" + stored(kind) + offset + size + stride + b"\x89}tR"


TENSORS = {
    "expanded": tensor(b"(\x8a\x05\x00\x00\x00\x00\x7fJ\x01\x00\x00\x00t", b"(K\x00K\x01t"),
    "beyond": tensor(b"(K\x09t", b"(K\x01t"),
    "negative": tensor(b"(J\xff\xff\xff\xfft", b"(K\x01t"),
    "huge size": tensor(b"(\x8a\x09" + b"\xff" * 8 + b"\x00t", b"(K\x01t"),
    "many dimensions": tensor(b"(" + b"K\x01" * 500 + b"t", b"(" + b"K\x01" * 500 + b"t"),
    "no tuple": tensor(b"K\x01", b"K\x01"),
    "half a storage": REBUILD + b"(" + text("storage") + b"K\x00)" + b")\x89}tR",
    "sparse": named("torch._utils", "_rebuild_sparse_tensor") + b"(K\x01tR",
    "quantised": named("torch._utils", "_rebuild_qtensor") + b"(K\x01tR",
    "meta": named("torch._utils", "_rebuild_meta_tensor_no_storage") + b"(K\x01tR",
    "of any class": named("torch._tensor", "_rebuild_from_type_v2") + b"(NNNNtR",
}

BOMBS = {
    "memo": b"}r\x00\x00\x00\x40",
    "memo text": b"}p99999999999\n",
    "frame": b"\x95" + b"\xff" * 7 + b"\x7f}",
    "unicode8": b"\x8d" + b"\xff" * 5 + b"\x00\x00\x00",
    "unicode": b"X\xff\xff\xff\x7f",
    "bytes8": b"\x8e" + b"\xff" * 5 + b"\x00\x00\x00",
    "bytearray8": b"\x96" + b"\xff" * 5 + b"\x00\x00\x00",
    "long4": b"\x8b\xff\xff\xff\x7f",
    "long text": b"L" + b"9" * 6000 + b"L\n",
    "bytearray": named("builtins", "bytearray") + b"\x8a\x06" + b"\x00" * 5 + b"\x01\x85R",
    "sets": b"\x8f" * 1_000_001,
    "marks": b"(" * 200_000,
    "deep lists": b"]" * 50_000 + b"a" * 49_999,
    "deep tuples": b")" + b"\x85" * 50_000,
    "tuples as key": b"}" + NEST + b"K\x01s",
    "tuples in a set": b"\x8f(" + NEST + b"\x90",
    "tuples in a frozenset": b"(" + NEST + b"\x91",
    "tuples in an old set": named("builtins", "set") + b"(]" + NEST + b"atR",
    "tuples as value": b"}" + text("ema") + NEST + b"s",
    "tuples as arguments": named("torch", "device") + NEST + b"R",
    "tuples as an argument": named("torch", "device") + NEST + b"\x85R",
    "tuples as a type": named("numpy", "dtype") + NEST + b"\x85R",
    "tuples as a class": named("torch_utils.persistence", "_reconstruct_persistent_obj")
    + b"}" + text("type") + text("class") + b"s" + text("class_name") + NEST + b"s\x85R",
    "tuples as a name": NEST + NEST + b"\x93",
    "tuples as identity": NEST + b"Q",
    "equal hashes": b"}("
    + b"".join(b"\x8a\x0b" + (k * (2**61 - 1)).to_bytes(11, "little") + b"N" for k in range(40_000))
    + b"u",
    "copies of a list": b"](" + b"K\x01" * 100_000 + b"eq\x00"
    + named("torch", "Size") + b"q\x01(" + b"h\x01h\x00\x85R" * 100_000 + b"l",
    "copies of a text": text("a" * 100_000) + b"q\x00"
    + named("_codecs", "encode") + b"q\x01(" + b"h\x01h\x00\x85R" * 100_000 + b"l",
    "itself": b"]q\x00h\x00a",
    "itself as state": b"}q\x00" + text("ema") + b"h\x00s",
    "key twice": b"}" + (text("a") + b"K\x01s") * 2,
    "extension": b"\x82\x01",
    "buffer": b"\x97",
}  # fmt: skip

CALLS = {
    "os.system": ("os", "system", f"touch {MARK}"),
    "posix.system": ("posix", "system", f"touch {MARK}"),
    "subprocess": ("subprocess", "getoutput", f"touch {MARK}"),
    "eval": ("builtins", "eval", f"open({MARK!r}, 'w')"),
    "exec": ("builtins", "exec", f"open({MARK!r}, 'w')"),
    "open": ("builtins", "open", f"{MARK}', 'w"),
    "old exec": ("__builtin__", "execfile", MARK),
    "code": ("code", "InteractiveInterpreter", MARK),
    "import": ("builtins", "__import__", "antigravity"),
    "getattr": ("builtins", "getattr", "a"),
    "breakpoint": ("sys", "breakpointhook", "a"),
    "pickle": ("pickle", "loads", "a"),
    "numpy.load": ("numpy", "load", MARK),
    "numpy object": ("numpy", "dtype", "O"),
    "numpy array": ("numpy.core.multiarray", "_reconstruct", "a"),
    "numpy run": ("numpy.testing._private.utils", "runstring", "a"),
    "torch.load": ("torch", "load", MARK),
    "torch.hub": ("torch.hub", "load", MARK),
    "torch package": ("torch.package", "PackageImporter", MARK),
    "torch jit": ("torch.jit.unsupported_tensor_ops", "execWrapper", MARK),
    "dots": ("torch", "serialization.os.system", f"touch {MARK}"),
    "dots in numpy": ("numpy", "core.multiarray.scalar", "a"),
    "a tensor's method": ("torch._utils", "_rebuild_parameter.__class__", "a"),
    "our own": ("study.files", "write_text", MARK),
    "type": ("builtins", "type", "a"),
}


def called(module: str, name: str, argument: str, how: str) -> bytes:
    """A call in one of the ways in which a pickle can spell it."""
    stacked = text(module) + text(name) + b"\x93"
    return {
        "reduce": named(module, name) + b"(" + text(argument) + b"tR",
        "stack": stacked + text(argument) + b"\x85R",
        "object": b"(" + stacked + text(argument) + b"o",
        "instance": b"(" + text(argument) + f"i{module}\n{name}\n".encode(),
        "new": stacked + text(argument) + b"\x85\x81",
        "new_ex": stacked + text(argument) + b"\x85}\x92",
        "build": stacked + b"}" + text("__code__") + text(argument) + b"sb",
        "state": REBUILD + b"}" + text("__class__") + stacked + b"sb",
    }[how]


WAYS = ("reduce", "stack", "object", "instance", "new", "new_ex", "build", "state")


# --- containers --------------------------------------------------------------------------------


def zipped(pickled: bytes, method: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/byteorder", b"little")
        for name, content in {"data/0": bytes(16), **more}.items():
            archive.writestr(f"a/{name}", content)
    return buffer.getvalue()


def legacy(pickled: bytes) -> bytes:
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    keys = pickle.dumps(["0"], 2)
    return magic + pickle.dumps(system, 2) + pickled + keys + struct.pack("<q", 4) + bytes(16)


def within(pickled: bytes) -> bytes:
    """As the content of a tensor in a pickled network."""
    inside = zipped(pickled)
    content = b"B" + struct.pack("<I", len(inside)) + inside
    return (
        b"\x80\x03}"
        + text("ema")
        + named("torch.storage", "_load_from_bytes")
        + (content + b"\x85Rs.")
    )


CONTAINERS = {"pickle": lambda p: p, "zip": zipped, "legacy": legacy, "tensor": within}


def whole(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


# --- sound files, which are damaged ------------------------------------------------------------


def network():
    import torch

    from study.parity.official import uvit

    torch.manual_seed(0)
    return uvit(
        img_size=8, in_chans=1, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=1
    )


OPTIONS = {"num_heads": 2}


def saved(content, new: bool = True) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def sound() -> dict[str, bytes]:
    """Files of every form with the same network in them."""
    from safetensors.torch import save

    state = network().state_dict()
    plain = {key: value.clone() for key, value in state.items()}
    return {
        "zip": saved(state),
        "legacy": saved({"model": state, "ema": state}, False),
        "pickle": pickle.dumps({"ema": plain}, 4),
        "old pickle": pickle.dumps(plain, 0),
        "safetensors": save(plain),
    }


def damaged(content: bytes, luck: random.Random) -> bytes:
    """A file that was cut, changed, doubled or shifted somewhere."""
    at, until = sorted(luck.randrange(len(content)) for _ in range(2))
    near = min(until, at + 64)
    return {
        "cut": lambda: content[:at],
        "hole": lambda: content[:at] + content[near:],
        "zeros": lambda: content[:at] + bytes(near - at) + content[near:],
        "twice": lambda: content[:near] + content[at:],
        "bits": lambda: bytes(
            byte ^ (1 << luck.randrange(8)) if luck.random() < 3 / len(content) else byte
            for byte in content
        ),
        "noise": lambda: content[:at] + luck.randbytes(8) + content[at + 8 :],
    }[luck.choice(["cut", "hole", "zeros", "twice", "bits", "noise"])]()


# --- other files -------------------------------------------------------------------------------


def described(header: bytes, content: bytes = bytes(16), length: int | None = None) -> bytes:
    """A safetensors file."""
    return struct.pack("<Q", len(header) if length is None else length) + header + content


def safetensors() -> dict[str, bytes]:
    whole = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    return {
        "sound": described(whole),
        "short": b"\x01\x02",
        "long header": described(whole, length=2**63),
        "header of the whole file": described(whole, length=len(whole) + 16),
        "no JSON": described(b"{" * 40),
        "deep": described(b'{"a":' * 100_000),
        "a list": described(b"[]"),
        "latin-1": described(b'{"\xe9":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
        "twice": described(whole[:-1] + b"," + whole[1:]),
        "huge": described(whole.replace(b"[4]", b"[4611686018427387904,4]")),
        "huge and empty": described(
            b'{"a":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}', b""
        ),
        "beyond": described(whole.replace(b"[0,16]", b"[0,999999999999]")),
        "backwards": described(whole.replace(b"[0,16]", b"[16,0]")),
        "digits": described(whole.replace(b"[4]", b"[" + b"9" * 5000 + b"]")),
        "type": described(whole.replace(b"F32", b"X99")),
        "classifier": described(
            whole[:-1] + b',"__metadata__":{"classifier":"{\\"resolution\\":99999,'
            b'\\"channels\\":3,\\"classes\\":99999,\\"width\\":99999}"}}'
        ),
        "deep classifier": described(
            whole[:-1] + b',"__metadata__":{"classifier":"' + b"[" * 100_000 + b'"}}'
        ),
    }


def array(shape: str, kind: str = "|u1", content: bytes = bytes(48), order: bool = False) -> bytes:
    """A ``.npy`` file."""
    header = f"{{'descr': {kind!r}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def arrays() -> dict[str, bytes]:
    """Files of samples."""

    def npz(content: bytes, name: str = "arr_0.npy", method: int = zipfile.ZIP_STORED) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            archive.writestr(name, content)
        return buffer.getvalue()

    zeros = array("(100000, 64, 64, 1)", content=bytes(409_600_000))
    made = npz(array("(1, 4, 4, 3)"))
    claims = bytearray(made)
    entry = claims.index(b"PK\x01\x02")
    struct.pack_into("<II", claims, entry + 20, 2**32 - 2, 2**32 - 2)
    large = bytearray(made)
    struct.pack_into("<I", large, entry + 24, 2**32 - 2)
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as archive:
        archive.writestr("arr_0.npy", array("(1, 4, 4, 3)"))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("arr_0.npy", array("(1, 4, 4, 3)", content=b"\x01" * 48))
    return {
        "sound": made,
        "empty": b"",
        "no zip": array("(1, 4, 4, 3)"),
        "no array": npz(b"", "arr_1.npy"),
        "nothing in it": npz(b""),
        "shape": npz(array("(1000000000000, 4, 4, 3)")),
        "overflow": npz(array("(4294967296, 4294967296, 4, 3)")),
        "negative": npz(array("(-1, 4, 4, 3)")),
        "no shape": npz(array("'a'")),
        "digits": npz(array(f"({'9' * 5000},)")),
        "brackets": npz(array("(" * 5000)),
        "objects": npz(array("(1,)", "|O")),
        "long texts": npz(array("(1,)", "<U999999999")),
        "floats": npz(array("(1, 1, 4, 3)", "<f4")),
        "bomb": npz(zeros, method=zipfile.ZIP_DEFLATED),
        "claims": bytes(claims),
        "large": bytes(large),
        "cut": made[:-30],
        "twice": twice.getvalue(),
    }


def texts() -> dict[str, bytes]:
    """JSON files."""
    return {
        "sound": b'{"status": "done"}',
        "with a mark": b'\xef\xbb\xbf{"status": "done"}',
        "empty": b"",
        "utf-16": '{"status": "done"}'.encode("utf-16"),
        "latin-1": b'{"status": "\xe9"}',
        "deep": b'{"a":' * 100_000,
        "deep lists": b"[" * 100_000,
        "digits": b'{"a": ' + b"9" * 5000 + b"}",
        "exponent": b'{"a": 1e999}',
        "NaN": b'{"a": NaN}',
        "infinite": b'{"a": -Infinity}',
        "twice": b'{"a": 1, "a": 2}',
        "a list": b"[1, 2]",
        "a number": b"3",
        "half": b'{"a"',
        "zeros": bytes(100),
        "long name": b'{"' + b"a" * 1_000_000 + b'": 1, "' + b"a" * 1_000_000 + b'": 1}',
        "forged": b'{"a\\nstudy: all is well\\u001b[2J": 1, "a\\nstudy: all is well\\u001b[2J": 2}',
    }


SPEC = {
    "dataset": {"name": "d", "source": "digits"},
    "backbone": {"family": "uvit", "options": {"depth": 2}},
    "skip_scaling": {"method": "cs", "kappa": 0.5},
    "target": {"kind": "dsm"},
    "formulation": {"kind": "edm"},
    "training": {"steps": 1, "batch": 1, "lr": 0.1},
    "seeds": {"data": 0, "init": 0, "noise": 0},
}
WRONG = (
    None,
    [],
    {},
    "text",
    -1,
    10**30,
    1e300,
    True,
    [[1]],
    {"a": 1},
    "a\nstudy: b\x1b[2J",
)


def specs() -> dict[str, bytes]:
    """A spec with one thing wrong in it; not every wrong value is wrong everywhere."""
    made: dict[str, object] = {"sound": SPEC}
    for section, content in SPEC.items():
        made[f"without {section}"] = {k: v for k, v in SPEC.items() if k != section}
        for number, wrong in enumerate(WRONG):
            made[f"{section} {number}"] = {**SPEC, section: wrong}
            for key in (*content, "unknown"):
                changed = {**SPEC, section: {**content, key: wrong}}
                made[f"{section}.{key} {number}"] = changed
    for number, wrong in enumerate(({"sha256": 5}, {"sha256": "a" * 63}, {"name": ""}, 5, [])):
        made[f"checkpoint {number}"] = {**SPEC, "checkpoint": wrong}
    return {name: json.dumps(content).encode() for name, content in made.items()}


def checkpoints() -> dict[str, bytes]:
    """Checkpoints that are pickled soundly, with something wrong in them."""
    import torch

    state = dict(network().state_dict())
    some = "norm.weight"

    def changed(**more) -> dict:
        return {**state, some: more["value"]} if "value" in more else {**state, **more["add"]}

    numbers = state[some]
    with warnings.catch_warnings(action="ignore"):  # torch will have no such tensors soon
        quantised = torch.quantize_per_tensor(numbers, 0.1, 0, torch.qint8)
    files = {
        "sound": state,
        "NaN": changed(value=numbers * torch.nan),
        "infinite": changed(value=numbers / 0),
        "overflow": changed(value=numbers.double() * 1e300),
        "whole": changed(value=numbers.long()),
        "complex": changed(value=numbers * 1j),
        "boolean": changed(value=numbers > 0),
        "sparse": changed(value=numbers.to_sparse()),
        "meta": changed(value=numbers.to("meta")),
        "quantised": changed(value=quantised),
        "number": changed(add={"in_blocks.1000000000.x": numbers}),
        "digits": changed(add={f"in_blocks.{'9' * 5000}.x": numbers}),
        "other digits": changed(add={"in_blocks.\u00b2.x": numbers}),
        "forged": changed(add={"x\nstudy: all is well\x1b[2J\u202e": numbers}),
        "long name": changed(add={"x" * 200_000: numbers}),
        "half a character": changed(add={"x\ud800": numbers}),
        "holds nothing": {},
        "a list": [state],
        "deep": {"ema": {"ema": {"ema": state}}},
        "wide": {**state, "pos_embed": torch.zeros(1, 5, 0)},
        "flat": {key: value.flatten() for key, value in state.items()},
        "scalars": dict.fromkeys(state, torch.zeros(())),
    }
    made = {name: saved(content) for name, content in files.items()}
    many = {f"in_blocks.{k}.{n}": v for k in range(4000) for n, v in list(state.items())[:3]}
    made["thousands of blocks"] = saved({**state, **many})
    view = torch.zeros(2**20)
    shared = {f"{k}": view[:] for k in range(3000)}
    made["one storage for all"] = saved({**state, **shared})
    return made


def networks() -> dict[str, bytes]:
    """Networks as EDM pickles them, with settings that are not."""
    persist = named("torch_utils.persistence", "_reconstruct_persistent_obj")

    def entry(key: str, value: bytes) -> bytes:
        return text(key) + value + b"s"

    def made(name: str, state: bytes) -> bytes:
        meta = entry("type", text("class")) + entry("class_name", text(name))
        return persist + b"}" + meta + entry("state", b"}" + state) + b"\x85R"

    weight = entry("map_layer0.weight", tensor(b"(K\x04t", b"(K\x01t"))

    def song(arguments: bytes, more: bytes = b"") -> bytes:
        inside = entry("_parameters", b"}" + weight) + entry("_init_kwargs", b"}" + arguments)
        return made("SongUNet", inside + more)

    shape = b"".join(entry(key, b"K\x08") for key in ("img_resolution", "in_channels"))
    shape += entry("out_channels", b"K\x08")
    billion = number(10**9)
    inner = {
        "plain": song(shape),
        "num_blocks": song(shape + entry("num_blocks", billion)),
        "model_channels": song(shape + entry("model_channels", billion)),
        "resolution": song(shape.replace(b"K\x08", billion)),
        "label_dim": song(shape + entry("label_dim", billion)),
        "dropout": song(shape + entry("dropout", text("much"))),
        "mult": song(shape + entry("channel_mult", b"](" + b"K\x01" * 100_000 + b"e")),
        "few levels": song(shape + entry("channel_mult", b"](" + b"K\x01" * 90 + b"e")),
        "tuples": song(shape + entry("channel_mult", NEST)),
        "a number of 10,000 digits": song(
            shape + entry("label_dim", b"\x8b" + struct.pack("<I", 5000) + b"\x01" * 5000)
        ),
        "an object": song(shape + entry("label_dim", made("A", b""))),
        "arguments": song(b"", entry("_init_kwargs2", b"N")),
        "another class": made("Song\nstudy: UNet\x1b[2J", entry("_parameters", b"}" + weight)),
        "no state": persist + b"}" + entry("type", text("class")) + b"\x85R",
    }
    outer = {
        "precond": lambda one: made(
            "EDMPrecond", entry("_modules", b"}" + entry("model", one)) + entry("sigma_data", NEST)
        ),
        "bare": lambda one: one,
    }
    files = {}
    for name, one in inner.items():
        for around, wrap in outer.items():
            files[f"{name} {around}"] = whole(b"}" + entry("ema", wrap(one)))
    # Modules that hold themselves, or each the next one twice.
    cycle = persist + b"}" + entry("type", text("class")) + text("state") + b"}q\x05s\x85R"
    files["cycle"] = whole(
        b"}" + text("ema") + cycle + b"q\x06h\x05" + text("_modules") + b"}"
        + entry("a", b"h\x06") + b"s0s"
    )  # fmt: skip
    double = b""
    for level in range(60):
        one = b"h" + bytes([level + 9])
        part = entry("a", one) + entry("b", one) if level else b""
        double += made("A", entry("_modules", b"}" + part)) + b"q" + bytes([level + 10])
        double += b"0" if level < 59 else b""
    files["double"] = whole(b"}" + text("ema") + double + b"s")
    # Storages of these lie beside the pickle.
    return {name: zipped(content) for name, content in files.items()}


def everything() -> dict[str, bytes]:
    """All files: ``kind/name`` -> content."""
    luck = random.Random(0)
    files: dict[str, bytes] = {}
    for around, contained in CONTAINERS.items():
        for name, body in BOMBS.items():
            # The largest in one form only.
            if len(body) < 10**6 or around == "zip":
                files[f"weights/{around} {name}"] = contained(whole(body))
        for name, call in CALLS.items():
            ways = WAYS if name in ("os.system", "eval") else (luck.choice(WAYS),)
            for way in ways:
                files[f"weights/{around} {name} {way}"] = contained(whole(called(*call, way)))
    for name, body in TENSORS.items():
        files[f"weights/tensor {name}"] = zipped(whole(body))
        files[f"weights/old tensor {name}"] = legacy(whole(body))
    zeros = whole(text("a" * 40_000_000))
    files["weights/deflated"] = zipped(zeros, zipfile.ZIP_DEFLATED)
    files["weights/two pickles"] = zipped(whole(b"}"), **{"b/data.pkl": whole(b"}")})
    files["weights/big end first"] = zipped(whole(b"}")).replace(b"little", b"biggie")
    files["weights/nine bytes"] = b"\x80\x02}r\x00\x00\x00\x40."
    for name, content in {
        "html": b"<!DOCTYPE html><html>Quota exceeded</html>",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n",
        "empty": b"",
        "tar": bytes(257) + b"ustar" + bytes(250),
        "gzip": b"\x1f\x8b\x08" + bytes(50),
        "json": b'{"a": 1}',
        "noise": luck.randbytes(500),
    }.items():
        files[f"weights/{name}"] = content
    for form, content in sound().items():
        ending = ".safetensors" if form == "safetensors" else ""
        files[f"weights/sound {form}{ending}"] = content
        for number in range(30):
            files[f"weights/damaged {form} {number}{ending}"] = damaged(content, luck)
    for kind, made in {
        "weights": {**checkpoints(), **networks()},
        "samples": arrays(),
        "json": texts(),
        "spec": specs(),
    }.items():
        files |= {f"{kind}/{name}": content for name, content in made.items()}
    files |= {f"weights/{n}.safetensors": c for n, c in safetensors().items()}
    files |= {f"classifier/{n}.safetensors": c for n, c in safetensors().items()}
    for number in range(20):
        files[f"samples/damaged {number}"] = damaged(files["samples/sound"], luck)
    return files


# --- reading, in a process of its own ----------------------------------------------------------


def readers():
    """Kind of file -> what reads it, and gives something to compare or nothing."""
    from study.bounded import read_npz, reading
    from study.fidelity.classifier import load_classifier
    from study.files import UserError, parse_json, read_object
    from study.importing import import_checkpoint
    from study.sampling.decoder import load_decoder
    from study.spec.run import Spec
    from study.tensors import read_safetensors
    from study.training import checkpoint

    def refused(read, *arguments) -> str:
        try:
            read(*arguments)
        except UserError as error:
            return str(error)
        raise AssertionError("none of these holds such a thing")

    def weights(path: Path):
        if path.stat().st_size < 100_000:  # the same reader as below, so not for the slow ones
            refused(load_decoder, path, 1.0)
            state = path.parent / "state"
            state.mkdir(exist_ok=True)
            (state / checkpoint.NAME).write_bytes(path.read_bytes())
            said = refused(checkpoint.load, state, {"a": 1})
            if "move it away to start anew" not in said:
                raise AssertionError(said)
        import_checkpoint(path, path.parent / "run", options=OPTIONS)
        return read_safetensors(path.parent / "run" / "train" / "weights.safetensors")

    def samples(path: Path):
        with reading(path, "a samples file"):
            return read_npz(path, "arr_0")

    return {
        "weights": weights,
        "classifier": load_classifier,
        "samples": samples,
        "json": lambda path: read_object(path, "status"),
        "spec": lambda path: Spec.read(parse_json(path.read_bytes(), "--spec")),
    }


def child(folder: Path) -> None:
    """Read every file that is named on standard input; a line of JSON for each."""
    from contextlib import redirect_stdout

    import torch

    from study.files import LINE, UserError

    torch.set_num_threads(1)
    known, wanted = readers(), network().state_dict()
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    resource.setrlimit(resource.RLIMIT_DATA, (pages * resource.getpagesize() + MEMORY,) * 2)

    def late(*_):
        raise AssertionError("takes too long")

    signal.signal(signal.SIGPROF, late)
    for line in sys.stdin:
        name = line.strip()
        path = folder / name
        said, problem, value = "", "", None
        print(json.dumps({"begun": name}), flush=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            with redirect_stdout(io.StringIO()):
                value = known[path.parent.name](path)
        except UserError as error:
            said = str(error)
            lines = said.split("\n") if path.parent.name == "spec" else [said]
            if not all(line.isprintable() and 9 < len(line) <= LINE for line in lines):
                problem = "no printable lines"
            elif any(word in said for word in (" ()", "allocate", "memory", "takes too long")):
                problem = "no reason, or too late"
            elif path.name in said and said.endswith(path.name):
                problem = "no reason"
        except BaseException as error:
            problem = f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if value is not None and path.parent.name == "weights":
            same = value.keys() == wanted.keys() and all(
                value[key].shape == wanted[key].shape and bool(value[key].isfinite().all())
                for key in wanted
            )
            if not same:
                problem = "another network"
            # Of the damaged ones only those in a ZIP file have checksums.
            if ("zip" in name or "sound" in name) and not all(
                torch.equal(value[key], wanted[key]) for key in wanted
            ):
                problem = "other weights"
        if os.path.exists(MARK):
            problem = "code in it was executed"
        print(json.dumps({"name": name, "said": said, "problem": problem}), flush=True)


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> dict[str, dict[str, str]]:
    """What was said of every file."""
    folder = tmp_path_factory.mktemp("hostile")
    files = everything()
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    command = [sys.executable, __file__, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run(
        command, input="\n".join(files), cwd=folder, env=environment, capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (told[-1:], done.stderr[-2000:])
    found = {one["name"]: one for one in told if "name" in one}
    assert len(found) == len(files), told[-1]
    print(f"{len(found)} files in {time.monotonic() - began:.0f} s")
    return found


def test_every_file_is_one_line_or_sound(read):
    assert len(read) > 600
    problems = [f"{name}: {one['problem']}" for name, one in read.items() if one["problem"]]
    assert not problems


def test_sound_files_are_read_and_hostile_ones_refused(read):
    accepted = {name for name, one in read.items() if not one["said"]}
    assert {name for name in read if "/sound" in name} - accepted == {
        "weights/sound.safetensors",  # of no network
        "classifier/sound.safetensors",
    }
    hostile = [
        name
        for name in accepted
        if not any(
            word in name for word in ("/sound", "/damaged", "spec/", "with a mark", "/floats")
        )
    ]
    assert not hostile


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("weights/nine bytes", "cut short|no network"),
        ("weights/zip sets", "more than 1,000,000 instructions"),
        ("weights/zip tuples as key", "a key of a dictionary or set"),
        ("weights/zip key twice", "stands twice"),
        ("weights/zip copies of a text", "same content many times"),
        ("weights/one storage for all", "same content many times"),
        ("weights/tensor expanded", "beyond its storage"),
        ("weights/deflated", "is compressed"),
        ("weights/two pickles", "not one of torch.save"),
        ("weights/big end first", "big end|checksum"),
        ("weights/html", "a web page"),
        ("weights/lfs", "git lfs pull"),
        ("weights/empty", "an empty file"),
        ("weights/tar", "a tar archive"),
        ("weights/gzip", "unpack it"),
        ("weights/NaN", r"norm\.weight holds 16 of 16 numbers that are not finite"),
        ("weights/infinite", r"norm\.weight holds"),
        ("weights/overflow", r"norm\.weight holds"),
        ("weights/whole", r"norm\.weight is torch\.int64"),
        ("weights/complex", r"norm\.weight is torch\.complex64"),
        ("weights/sparse", "wants torch.*sparse"),
        ("weights/number", r"in_blocks\.1000000000\.x too many"),
        ("weights/forged", r"x\\nstudy: all is well\\x1b\[2J\\u202e"),
        ("weights/long name", r"xxx \.\.\. "),
        ("weights/cycle", "holds itself"),
        ("weights/double", "same part twice"),
        ("weights/num_blocks precond", "num_blocks"),
        ("weights/twice.safetensors", "header: not valid JSON .*given twice"),
        ("classifier/classifier.safetensors", "not a classifier"),
        ("samples/empty", "an empty file"),
        ("samples/bomb", "far more than the file"),
        ("samples/shape", "only a part"),
        ("samples/objects", "Python objects"),
        ("samples/twice", "two members"),
        ("json/deep", "nested too deeply"),
        ("json/digits", "a number of too many digits"),
        ("json/latin-1", "not in UTF-8"),
        ("json/NaN", "NaN is no finite number"),
        ("json/exponent", "no finite number"),
        ("json/twice", "given twice"),
        ("json/a list", "got list"),
        ("spec/training.unknown 0", r"spec\.training\.unknown: unknown key"),
        ("spec/checkpoint 0", "sha256"),
        ("spec/seeds.init 3", r"spec\.seeds\.init"),
    ],
)
def test_what_is_said(read, name, words):
    import re

    assert re.search(words, read[name]["said"]), read[name]["said"]


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_named(read, name):
    asked = [f"weights/zip {name} {way}" for way in WAYS]
    said = [read[one]["said"] for one in asked if one in read]
    module, function, _ = CALLS[name]
    wanted = f"{module.replace('__builtin__', 'builtins')}.{function}"
    assert said and all(
        f"wants {wanted};" in line or "to change a function" in line or "NumPy" in line
        for line in said
    )


def test_arrays_are_read_as_they_were(tmp_path):
    from study.bounded import read_npz

    images = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)
    for name, save in (("a", np.savez), ("b", np.savez_compressed)):
        save(tmp_path / f"{name}.npz", images, np.zeros(2, np.int64))
        assert np.array_equal(read_npz(tmp_path / f"{name}.npz", "arr_0"), images)


if __name__ == "__main__":
    child(Path(sys.argv[1]))
