"""Numbers of MATLAB's .mat files of version 5, in which the first place recognition data came."""

import itertools
import struct
import zlib
from collections.abc import Iterable, Iterator

import numpy as np

MAGIC = b"MATLAB 5.0 MAT-file"
# By the number of an element's type; those without a name are no numbers.
_DTYPES = ("", "i1", "u1", "i2", "u2", "i4", "u4", "f4", "", "f8", "", "", "i8", "u8")
_MATRIX, _COMPRESSED = 14, 15  # types of an element
_STRUCT, _NUMBERS = 2, range(6, 16)  # classes of a matrix


def read_mat(data: bytes) -> dict[str, np.ndarray]:
    """The numeric arrays of a .mat file by name, those in structs by the name of their field.

    Source: MathWorks, "MAT-File Format", chapter 1. Raises ValueError, LookupError, TypeError,
    struct.error or zlib.error for a damaged file.
    """
    order = "<" if data[126:128] == b"IM" else ">"
    return dict(_arrays(_elements(data[128:], order), itertools.repeat(""), order))


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Type and content of the elements in `data`, one after another."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(order + "II", data, at)
        at += 8
        if kind >> 16:  # a small element: its size and type share four bytes, its content has four
            yield kind & 0xFFFF, data[at - 4 : at - 4 + (kind >> 16)]
        else:
            yield kind, data[at : at + size]
            at += size + (-size % 8 if kind != _COMPRESSED else 0)


def _arrays(
    elements: Iterable[tuple[int, bytes]], names: Iterator[str], order: str
) -> Iterator[tuple[str, np.ndarray]]:
    """The numeric arrays among `elements`, called as they say themselves, or by `names`."""
    for (kind, content), name in zip(elements, names):
        if kind == _COMPRESSED:
            yield from _arrays(_elements(zlib.decompress(content), order), names, order)
        if kind != _MATRIX or not content:
            continue
        (_, flags), (_, shape), (_, own_name), *parts = _elements(content, order)
        matrix_class = struct.unpack_from(order + "I", flags)[0] & 0xFF
        if matrix_class == _STRUCT:
            (_, width), (_, fields), *parts = parts
            width = struct.unpack(order + "i", width)[0]
            fields = [fields[i : i + width] for i in range(0, len(fields), width)]
            fields = [field.split(b"\0")[0].decode() for field in fields]
            yield from _arrays(parts, itertools.cycle(fields), order)
        elif matrix_class in _NUMBERS:
            (kind, values), *_ = parts
            values = np.frombuffer(values, order + _DTYPES[kind])
            shape = np.frombuffer(shape, order + "i4")
            yield own_name.decode() or name, values.reshape(shape, order="F")
