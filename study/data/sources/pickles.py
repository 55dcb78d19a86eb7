"""Unpickling without trust: arrays and plain containers, nothing that could run code."""

import io
import pickle
from typing import Any, BinaryIO

import numpy as np

# What a pickled NumPy array refers to, by every module name NumPy has used for it. The functions
# are taken from NumPy's own reductions, so no private module is imported here.
_RECONSTRUCT = np.zeros(1).__reduce__()[0]
_SCALAR = np.float64(0).__reduce__()[0]
_ARRAYS = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype} | {
    (f"numpy.{core}.multiarray", name): function
    for core in ("core", "_core")
    for name, function in (("_reconstruct", _RECONSTRUCT), ("scalar", _SCALAR))
}


class PickleError(Exception):
    """A pickle that is broken, or refers to what it has no use for; the message says which."""


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ARRAYS[module, name]
        except KeyError:
            raise PickleError(
                f"it refers to {module}.{name}, which such a file has no use for"
            ) from None


def load(file: BinaryIO | bytes) -> Any:
    """Unpickle containers, numbers, text and NumPy arrays; text of Python 2 becomes bytes.

    Raises `PickleError` that names anything else the pickle refers to, or says that it is broken.
    """
    file = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        return _ArraysOnly(file, encoding="bytes").load()
    except (PickleError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise PickleError(f"it is not a readable pickle ({error})") from None
