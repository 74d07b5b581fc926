"""A GGUF file's header, checked before the gguf package reads it: that package believes every count and length."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from freeexport.checkpoints.weight_files import CheckpointError

# Several times what published models have. The gguf package makes an object of every item.
MAX_TENSORS = 1 << 16
MAX_FIELDS = 1 << 16
MAX_ITEMS = 1 << 22
MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
# By the number of the type: uint8, int8, uint16, int16, uint32, int32, float32, bool, uint64, int64, float64.
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_LEAST_FIELD, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8


def check_gguf_header(path: Path) -> None:
    """Raises CheckpointError where a count or a length does not fit the file, or one of the limits above."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _Header(content).check()
    except (struct.error, ValueError) as error:
        raise CheckpointError(f"{path} is not a complete GGUF file ({error}); download it again") from None


class _Header:
    """Walks through the header once; ValueError names what is wrong."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._at = 0
        self._items = 0
        self._order = "<"

    def check(self) -> None:
        if self._content[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        # The low half of a version that was written in the other byte order is empty.
        self._order = "<" if self._number("I", at=4) & 0xFFFF else ">"
        tensors, fields = self._number("Q", at=8), self._number("Q", at=16)
        self._at = 24
        self._limit("fields", fields, MAX_FIELDS, _LEAST_FIELD)
        self._limit("tensors", tensors, MAX_TENSORS, _LEAST_TENSOR)
        for _ in range(fields):
            self._skip(self._take("Q"), "the name of a field")
            self._field(self._take("I"))
        for _ in range(tensors):
            self._tensor()

    def _field(self, kind: int) -> None:
        if kind == _STRING:
            self._skip(self._take("Q"), "a text")
        elif kind == _ARRAY:
            self._array(self._take("I"), self._take("Q"))
        else:
            self._skip(self._width(kind), "a field")

    def _array(self, kind: int, count: int) -> None:
        """Arrays of arrays, which the gguf package would follow to any depth, no published model has."""
        width = 8 if kind == _STRING else self._width(kind)
        self._items += count
        self._limit("items in arrays", self._items, MAX_ITEMS, 0)
        self._limit("items in an array", count, MAX_ITEMS, width)
        if kind != _STRING:
            self._skip(width * count, "an array")
            return
        for _ in range(count):
            self._skip(self._take("Q"), "a text of an array")

    def _tensor(self) -> None:
        self._skip(self._take("Q"), "the name of a tensor")
        dimensions = self._take("I")
        self._limit("dimensions of a tensor", dimensions, MAX_DIMENSIONS, 8)
        self._skip(8 * dimensions + 4 + 8, "a tensor's shape")

    def _width(self, kind: int) -> int:
        if kind not in _WIDTHS:
            raise ValueError(f"a field has the type {kind}, which is not known")
        return _WIDTHS[kind]

    def _limit(self, what: str, count: int, most: int, width: int) -> None:
        left = len(self._content) - self._at
        if count > most:
            raise ValueError(f"it says that it has {count} {what}; at most {most} are read")
        if count * width > left:
            raise ValueError(f"it says that it has {count} {what}, and {left} bytes of them")

    def _skip(self, length: int, what: str) -> None:
        left = len(self._content) - self._at
        if length > left:
            raise ValueError(f"{what} has {length} bytes, and {left} are left")
        self._at += length

    def _take(self, kind: str) -> int:
        value = self._number(kind, self._at)
        self._at += struct.calcsize(kind)
        return value

    def _number(self, kind: str, at: int) -> int:
        (value,) = struct.unpack_from(self._order + kind, self._content, at)
        return int(value)
