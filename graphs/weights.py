"""Weights of a bundle: read one tensor at a time, written once to a file that graphs share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from graphs.errors import GraphError

# Alignment: large tensors start on a page, so that memory maps need no copy.
PAGE = 4096
CACHE_LINE = 64
BIG = 1 << 20


class Weights(Protocol):
    """A checkpoint's tensors by name.

    A name may also denote a view of a tensor (see `View`).
    """

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""

    def read(self, name: str) -> np.ndarray:
        """Read a tensor as float32. Raises an error if it is missing or holds NaN."""


@dataclass(frozen=True)
class View:
    """A weight computed from a checkpoint tensor when it is read. `str()` is its name in
    descriptions.

    The steps apply in the order of the attributes.

    Attributes:
        tensor: Name of the tensor.
        transposed: Transpose it.
        start: First row.
        stop: End of the rows. Default: the last row.
        factor: Multiplies the values.
        offset: Added to the values.
    """

    tensor: str
    transposed: bool = False
    start: int = 0
    stop: int | None = None
    factor: float = 1.0
    offset: float = 0.0

    def __str__(self) -> str:
        parts = ["transposed"] if self.transposed else []
        if self.start or self.stop is not None:
            parts.append(f"rows={self.start}:{'' if self.stop is None else self.stop}")
        parts += [f"factor={self.factor!r}"] if self.factor != 1.0 else []
        parts += [f"offset={self.offset!r}"] if self.offset else []
        return f"{self.tensor}?{'&'.join(parts)}" if parts else self.tensor

    @classmethod
    def of(cls, name: str) -> View:
        """Parse a name. A name without options is the tensor itself."""
        tensor, _, parts = name.partition("?")
        given = dict(part.partition("=")[::2] for part in parts.split("&"))
        start, _, stop = given.get("rows", "0:").partition(":")
        last = int(stop) if stop else None
        factor = float(given.get("factor", 1.0))
        offset = float(given.get("offset", 0.0))
        return cls(tensor, "transposed" in given, int(start), last, factor, offset)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the view of a tensor with this shape."""
        if self.transposed:
            shape = shape[::-1]
        return (len(range(*slice(self.start, self.stop).indices(shape[0]))), *shape[1:])

    def read(self, array: np.ndarray) -> np.ndarray:
        """Compute the view of a float32 tensor."""
        part = (array.T if self.transposed else array)[self.start : self.stop]
        if self.factor != 1.0:
            part = part * np.float32(self.factor)
        return np.ascontiguousarray(part + np.float32(self.offset) if self.offset else part)


class WeightFile:
    """Writes tensors to one external-data file. Equal tensors are stored once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0  # of tensors, without padding
        self._file = path.open("wb")
        self._tensors: dict[tuple[str, ir.DataType], ir.ExternalTensor] = {}
        self._places: dict[tuple[bytes, int], int] = {}

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def flush(self) -> None:
        """Flush the file, so that graphs that refer to it can be loaded."""
        self._file.flush()

    def add(
        self, name: str, dtype: ir.DataType, produce: Callable[[], np.ndarray]
    ) -> ir.ExternalTensor:
        """Return the tensor of this name and type. It is computed and written on first use."""
        key = (name, dtype)
        if key not in self._tensors:
            self._tensors[key] = self._write(f"{name}.{dtype.name.lower()}", dtype, produce())
        return self._tensors[key]

    def _write(self, name: str, dtype: ir.DataType, array: np.ndarray) -> ir.ExternalTensor:
        array = np.ascontiguousarray(_cast(name, array, dtype))
        # Share by content: tied weights have several names, and are read in other shapes.
        raw = _raw(array, dtype)
        content = (hashlib.sha256(raw.data).digest(), raw.nbytes)
        if content not in self._places:
            align = PAGE if raw.nbytes >= BIG else CACHE_LINE
            self._file.write(b"\0" * (-self._file.tell() % align))
            self._places[content] = self._file.tell()
            self._file.write(raw.data)
            self.bytes += raw.nbytes
        shape = ir.Shape(array.shape)
        return ir.ExternalTensor(
            self.path.name, self._places[content], raw.nbytes, dtype, shape=shape, name=name
        )


def _raw(array: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    """Return the values as bytes. numpy has no buffer for bfloat16.

    Two 4-bit values share a byte, the first in the low half.
    """
    raw: np.ndarray = array.reshape(-1).view(np.uint8)
    if dtype.bitwidth != 4:
        return raw
    low = raw[0::2] & 15
    high = raw[1::2] & 15
    low[: len(high)] |= high << 4
    return low


def _cast(name: str, array: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(dtype.numpy(), copy=False)
    if cast is not array and dtype == ir.DataType.FLOAT16 and not np.isfinite(cast).all():
        raise GraphError(
            f"weight {name} reaches {np.abs(array).max():.3g}, out of range of fp16; "
            "use --precision fp32"
        )
    return cast
