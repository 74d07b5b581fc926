"""The weights of a bundle: read one tensor at a time, written once to one file that all graphs name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from graphs.errors import GraphError

# Big tensors start on a page, so that a memory map needs no copy; small ones on a cache line.
PAGE, CACHE_LINE, BIG = 4096, 64, 1 << 20


class Weights(Protocol):
    """A checkpoint as the builders see it."""

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32. Raises where it is missing or holds NaN."""


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
