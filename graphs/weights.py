"""The weights of a bundle: read one tensor at a time, written once to one file that all graphs name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from graphs.errors import GraphError

# Big tensors start on a page, so that a memory map needs no copy; small ones on a cache line.
PAGE, CACHE_LINE, BIG = 4096, 64, 1 << 20


class Weights(Protocol):
    """A checkpoint as the builders see it. Names are those of its tensors, or of views of these."""

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32. Raises where it is missing or holds NaN."""


@dataclass(frozen=True)
class View:
    """A weight that is made of a checkpoint tensor while it is read: transposed, then the rows from `start` to `stop`
    (None: to the end), times `factor`, plus `offset`. `str()` is the name that descriptions use."""

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
        """The view of this name; the tensor itself, where the name asks for nothing."""
        tensor, _, parts = name.partition("?")
        given = dict(part.partition("=")[::2] for part in parts.split("&"))
        start, _, stop = given.get("rows", "0:").partition(":")
        last = int(stop) if stop else None
        factor, offset = float(given.get("factor", 1.0)), float(given.get("offset", 0.0))
        return cls(tensor, "transposed" in given, int(start), last, factor, offset)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the view, from that of the tensor."""
        if self.transposed:
            shape = shape[::-1]
        return (len(range(*slice(self.start, self.stop).indices(shape[0]))), *shape[1:])

    def read(self, array: np.ndarray) -> np.ndarray:
        """The view, from the tensor as float32."""
        part = (array.T if self.transposed else array)[self.start : self.stop]
        if self.factor != 1.0:
            part = part * np.float32(self.factor)
        return np.ascontiguousarray(part + np.float32(self.offset) if self.offset else part)


class WeightFile:
    """Writes tensors to one external-data file; what is asked for twice is written once."""

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
        """Make what was added readable, so that a graph that names it can be loaded."""
        self._file.flush()

    def add(self, name: str, dtype: ir.DataType, produce: Callable[[], np.ndarray]) -> ir.ExternalTensor:
        """The tensor of this name and type, produced and written on first use."""
        key = (name, dtype)
        if key not in self._tensors:
            self._tensors[key] = self._write(f"{name}.{dtype.name.lower()}", dtype, produce())
        return self._tensors[key]

    def _write(self, name: str, dtype: ir.DataType, array: np.ndarray) -> ir.ExternalTensor:
        array = np.ascontiguousarray(_cast(name, array, dtype))
        # By content too: checkpoints store tied weights under several names, and operators want them in other shapes.
        raw = _raw(array, dtype)
        content = (hashlib.sha256(raw.data).digest(), raw.nbytes)
        if content not in self._places:
            align = PAGE if raw.nbytes >= BIG else CACHE_LINE
            self._file.write(b"\0" * (-self._file.tell() % align))
            self._places[content] = self._file.tell()
            self._file.write(raw.data)
            self.bytes += raw.nbytes
        shape = ir.Shape(array.shape)
        return ir.ExternalTensor(self.path.name, self._places[content], raw.nbytes, dtype, shape=shape, name=name)


def _raw(array: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    """As bytes: numpy gives no buffer of bfloat16. Of two values of 4 bits the first is in the low half of a byte."""
    raw: np.ndarray = array.reshape(-1).view(np.uint8)
    if dtype.bitwidth != 4:
        return raw
    low, high = raw[0::2] & 15, raw[1::2] & 15
    low[: len(high)] |= high << 4
    return low


def _cast(name: str, array: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(dtype.numpy(), copy=False)
    if cast is not array and dtype == ir.DataType.FLOAT16 and not np.isfinite(cast).all():
        raise GraphError(f"weight {name} reaches {np.abs(array).max():.3g}, out of range of fp16; use --precision fp32")
    return cast
