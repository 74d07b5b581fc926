"""Header of a GGUF file: its fields, and names, types and places of its tensors.

It is parsed here, because the gguf package trusts every count and length, and creates two arrays
for each item of an array. That takes a minute for a vocabulary of 256,000 tokens.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, Literal, NamedTuple

from freeexport.checkpoints.weight_files import CheckpointError, Shape
from graphs.errors import UnsupportedModelError

ARCHITECTURES = (
    "gemma2",
    "gemma3",
    "gpt2",
    "llama",
    "phi3",
    "qwen2",
    "qwen3",
    "t5",
)  # Mistral models are stored as "llama"
# Limits, several times the values of published models.
MAX_TENSORS = 1 << 16
MAX_FIELDS = 1 << 12
MAX_DIMENSIONS = 4
MAX_TEXT = 1 << 24  # bytes
# Maximum number of items in an array, by name. transformers reads them one at a time, in some ten
# microseconds each.
MAX_ITEMS = {
    **dict.fromkeys(
        (f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges")), 1 << 19
    ),
    "tokenizer.ggml.precompiled_charsmap": 1 << 20,
}
MAX_OTHER_ITEMS = 1 << 12
TEXT = 8
ARRAY = 9
# struct formats by type number.
_FORMATS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_LEAST_FIELD = 8 + 4 + 1
_LEAST_TENSOR = 8 + 4 + 4 + 8


class Array(NamedTuple):
    """An array of `length` items of type `kind` at offset `at` in the file."""

    kind: int
    length: int
    at: int


class StoredTensor(NamedTuple):
    """A tensor.

    `shape` is in numpy's order. `at` is the offset from the start of the file's data.
    """

    name: str
    shape: Shape
    kind: int
    at: int
    nbytes: int = 0


class Header:
    """Fields and tensors of a GGUF file. The items of arrays are skipped.

    Raises:
        CheckpointError: If a count or a length exceeds the file, or one of the limits above.
        UnsupportedModelError: If the architecture is not supported. Raised as soon as it is read.
    """

    def __init__(self, path: Path) -> None:
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self.order: Literal["<", ">"] = "<"
        self._at = 24
        try:
            with (
                path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
            ):
                self._content = content
                self._read(path)
        except (struct.error, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{path} is not a complete GGUF file ({error}); download it again"
            ) from None
        finally:
            vars(self).pop("_content", None)

    def _read(self, path: Path) -> None:
        if self._content[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        # The lower half of a version written in the other byte order is zero.
        self.order = "<" if self._number("I", at=4) & 0xFFFF else ">"
        if (version := self._number("I", at=4)) not in (2, 3):
            raise ValueError(f"it is of version {version}, 2 and 3 are known")
        tensors = self._number("Q", at=8)
        fields = self._number("Q", at=16)
        self._limit("fields", fields, MAX_FIELDS, _LEAST_FIELD)
        self._limit("tensors", tensors, MAX_TENSORS, _LEAST_TENSOR)
        for _ in range(fields):
            name = self._text("the name of a field")
            if not name or name in self.fields:
                raise ValueError(
                    f"a field has the name {name[:80]!r} {'twice' if name else ', which is none'}"
                )
            self.fields[name] = self._value(name, self._take("I"))
            if name == "general.architecture" and self.fields[name] not in ARCHITECTURES:
                raise UnsupportedModelError(
                    f"{path}: architecture {str(self.fields[name])[:80]!r} is not supported; "
                    f"supported GGUF architectures are {', '.join(ARCHITECTURES)}"
                )
        alignment = self.fields.get("general.alignment", 32)
        if (
            type(alignment) is not int
            or alignment < 1
            or alignment & (alignment - 1)
            or alignment > 1 << 20
        ):
            raise ValueError(
                f"general.alignment is {str(alignment)[:40]!r}, which is no power of two up to a "
                "MiB"
            )
        found = []
        for _ in range(tensors):
            name = self._text("the name of a tensor")
            dimensions = self._take("I")
            self._limit("dimensions of a tensor", dimensions, MAX_DIMENSIONS, 8)
            shape = tuple(self._take("Q") for _ in range(dimensions))[::-1]
            found.append(StoredTensor(name, shape, self._take("I"), self._take("Q")))
        self.data = -(-self._at // alignment) * alignment
        for tensor in found:
            if tensor.name in self.tensors:
                raise ValueError(f"tensor {tensor.name[:80]!r} is there twice")
            self.tensors[tensor.name] = tensor._replace(nbytes=self._nbytes(tensor, alignment))

    def _value(self, name: str, kind: int) -> Any:
        if kind == TEXT:
            return self._text("a text")
        if kind != ARRAY:
            return self._take(self._format(kind))
        kind = self._take("I")
        count = self._take("Q")
        # Arrays of arrays are not supported, as no published model has any.
        width = 8 if kind == TEXT else struct.calcsize(self._format(kind))
        self._limit(f"items in {name[:80]}", count, MAX_ITEMS.get(name, MAX_OTHER_ITEMS), width)
        array = Array(kind, count, self._at)
        self._at += width * count
        if kind == TEXT:
            unpack = struct.Struct(self.order + "Q").unpack_from
            at = array.at
            end = len(self._content)
            for _ in range(count):
                (length,) = unpack(self._content, at)
                at += 8 + length
                if at > end:
                    raise ValueError(
                        f"a text of {name[:80]} has {length} bytes, and the file ends before"
                    )
            if at - array.at < 8 * count + count // 2:
                raise ValueError(f"most of the {count} texts of {name[:80]} are empty")
            self._at = at
        return array

    def _nbytes(self, tensor: StoredTensor, alignment: int) -> int:
        from gguf.constants import GGML_QUANT_SIZES

        name, shape, kind, at, _ = tensor
        sizes = {int(known): size for known, size in GGML_QUANT_SIZES.items()}
        if not shape or not all(shape):
            raise ValueError(f"tensor {name[:80]!r} has the shape {list(shape)}")
        if kind not in sizes:
            raise ValueError(
                f"tensor {name[:80]!r} has the type {kind}, which the gguf package does not know"
            )
        block, size = sizes[kind]
        if shape[-1] % block:
            raise ValueError(
                f"tensor {name[:80]!r} has rows of {shape[-1]}, which is no multiple of {block}"
            )
        nbytes = math.prod(shape) // block * size
        if at % alignment or self.data + at + nbytes > len(self._content):
            raise ValueError(
                f"tensor {name[:80]!r} has {nbytes} bytes at {at}, which the file has not"
            )
        return nbytes

    def _text(self, what: str) -> str:
        length = self._take("Q")
        left = len(self._content) - self._at
        if length > min(left, MAX_TEXT):
            raise ValueError(f"{what} has {length} bytes, and {left} are left")
        self._at += length
        return self._content[self._at - length : self._at].decode("utf-8", "replace")

    def _format(self, kind: int) -> str:
        if kind not in _FORMATS:
            raise ValueError(f"a field has the type {kind}, which is not known")
        return _FORMATS[kind]

    def _limit(self, what: str, count: int, maximum: int, width: int) -> None:
        left = len(self._content) - self._at
        if count > maximum:
            raise ValueError(f"it has {count} {what}; at most {maximum} are read")
        if count * width > left:
            raise ValueError(f"it has {count} {what}, and {left} bytes of them")

    def _take(self, kind: str) -> Any:
        value = self._number(kind, self._at)
        self._at += struct.calcsize(kind)
        return value

    def _number(self, kind: str, at: int) -> Any:
        return struct.unpack_from(self.order + kind, self._content, at)[0]
