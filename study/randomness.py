"""Random numbers as functions of names, not streams.

A generator is made anew from what its numbers are for, e.g. ``generator(seed, "noise", step)``;
so nothing depends on batch size, workers, order, the number of processes, or an interruption.
"""

import hashlib

import torch


def seed_of(*names: int | str) -> int:
    """A 63-bit seed that is a function of ``names``."""
    text = "/".join(str(name) for name in names).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator(*names: int | str) -> torch.Generator:
    """A CPU generator seeded by ``names``; CPU so that all devices see the same numbers."""
    return torch.Generator().manual_seed(seed_of(*names))
