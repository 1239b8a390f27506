"""Reads pickles of NumPy arrays and plain values, and can call nothing else.

An ordinary unpickler calls any function that a file names, so a pickle from elsewhere
can run any code. This one knows only what archives of arrays need.
"""

import io
import pickle
from typing import Any

import numpy as np

from dimat_jax.data._dataset import DataError
from dimat_jax.errors import reading

__all__ = ["load_pickle"]


def load_pickle(content: bytes, where: str) -> Any:
    """Reads a pickle, also one of Python 2, whose texts become bytes.

    Args:
        content: the pickle.
        where: its name in error messages.

    Raises:
        DataError: it is damaged, or it needs anything but arrays and plain values.
    """
    with reading(where, DataError):
        return _Unpickler(io.BytesIO(content), where).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, where: str):
        super().__init__(file, encoding="bytes")
        self._where = where

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Returns what a pickle names.

        Raises:
            DataError: it is not allowed.
        """
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise DataError(
                f"{self._where} is refused: its pickle calls {module_name}."
                f"{global_name}, but only NumPy arrays and plain values are read"
            ) from None


def _empty_array(kind: Any, shape: Any, dtype: Any) -> np.ndarray:
    """Makes the array that a pickle then fills; the arguments are always the same."""
    if kind is not np.ndarray:
        raise DataError("a pickled array must be a numpy.ndarray")
    return np.ndarray(0, np.int8)


def _latin1(text: str, encoding: str) -> bytes:
    """Encodes bytes that Python 3 has pickled as text for Python 2."""
    if encoding != "latin1":
        raise DataError(f"bytes are pickled as latin1, not as {encoding}")
    return text.encode("latin1")


def _from_buffer(buffer: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    return np.frombuffer(buffer, dtype).reshape(
        shape, order="F" if order == "F" else "C"
    )


# The names by which releases of NumPy and Python refer to what builds arrays.
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", _empty_array),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}
