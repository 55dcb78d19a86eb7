"""Which images a step sees: pure functions of a seed and a position, not streams.

Random bits come straight from the counter-based Philox generator, whose output NumPy guarantees
for all versions (unlike that of ``Generator.permutation``), keyed by a hash of what they are for.
"""

import hashlib
from functools import lru_cache

import numpy as np

from study.files import UserError


def _generator(*key: int | str) -> np.random.Philox:
    text = " ".join(str(part) for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little"))


# Two epochs are in use at the turn of an epoch; room for a second stream beside the first.
@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, size: int) -> np.ndarray:
    keys = _generator("order", seed, epoch).random_raw(size)
    # Stable, so that equal keys (one in about 1e7 epochs of a million images) have one order too.
    permutation = np.argsort(keys, kind="stable").astype(np.int64, copy=False)
    permutation.setflags(write=False)
    return permutation


def order(seed: int, start: int, count: int, size: int) -> np.ndarray:
    """Image indices at positions ``start ... start+count-1`` of an endless shuffled stream.

    The stream is one permutation of ``range(size)`` after another, one per epoch, each a function
    of (seed, epoch, size) alone. Reading it in pieces of any length gives the same stream, so it
    depends on neither batch size nor number of processes, and resuming needs only a position.

    Returns int64 [count]. Raises ``ValueError`` for a negative start or count or an empty set.
    """
    seed, start, count, size = int(seed), int(start), int(count), int(size)
    if size < 1 or start < 0 or count < 0:
        raise ValueError(f"order: size {size}, start {start}, count {count} are not a stream")
    pieces = []
    while count > 0:
        epoch, offset = divmod(start, size)
        piece = _epoch(seed, epoch, size)[offset : offset + count]
        pieces.append(piece)
        start += len(piece)
        count -= len(piece)
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def reference_indices(
    seed: int, step: int, count: int, size: int, exclude: np.ndarray | None = None
) -> np.ndarray:
    """``count`` distinct image indices for one step: the reference images added to the batch.

    A pure function of (seed, step, size) and ``exclude``, independent of `order` with the same
    seed. ``exclude`` (the step's training indices) keeps an image from entering the reference
    batch twice, where it would carry double weight in the posterior. For a fixed ``exclude`` a
    smaller ``count`` gives the first rows of a larger one.

    Returns int64 [count]. Raises ``UserError`` where the dataset has too few images.
    """
    count, size = int(count), int(size)
    taken = np.unique(np.asarray([] if exclude is None else exclude, dtype=np.int64))
    if count > size - len(taken):
        raise UserError(
            f"a reference batch needs {count} images beside {len(taken)} training images, but the "
            f"dataset has {size}: choose a smaller reference or batch"
        )
    generator = _generator("reference", seed, step)
    found = draws = np.empty(0, np.int64)
    # First occurrences in one stream of draws with replacement, taken in chunks; the stream ends
    # with a permutation, which completes the choice of nearly all of a small dataset.
    while len(found) < count:
        wanted = min(max(64, 2 * (count - len(found))), 4 * size - len(draws))
        if wanted > 0:
            # The top 53 bits as a fraction of one: bias below 2**-30 for any dataset.
            fraction = (generator.random_raw(wanted) >> np.uint64(11)) * 2.0**-53
            more = (fraction * size).astype(np.int64)
        else:
            more = np.argsort(_generator("rest", seed, step).random_raw(size), kind="stable")
        draws = np.concatenate([draws, more])
        _, first = np.unique(draws, return_index=True)
        found = draws[np.sort(first)]
        found = found[~np.isin(found, taken)]
    return found[:count]
