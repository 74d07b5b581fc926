"""Files of weights, read one tensor at a time: safetensors, and what `torch.save` wrote."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from runtime.errors import FreeExportError

if TYPE_CHECKING:
    import torch

# bfloat16 has no numpy type: it is read as its 16 bits, the upper half of a float32.
_SAFETENSORS_TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U8": "<u1",
    "BOOL": "?",
}


class CheckpointError(FreeExportError):
    """A checkpoint is missing, incomplete, damaged, or of a kind that cannot be read."""


class WeightFile(Protocol):
    """One file of named tensors. `nbytes` counts every stored tensor once, at its stored type."""

    path: Path
    nbytes: int

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> np.ndarray:
        """The tensor as a float32 array of its own memory."""
        ...


@dataclass(frozen=True)
class _Entry:
    """Where a tensor stands: `start` and `stop` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """Raises CheckpointError when the header does not parse or names bytes the file does not have."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries = _safetensors_entries(path)
        self.nbytes = sum(entry.stop - entry.start for entry in self._entries.values())

    def names(self) -> Iterable[str]:
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def read(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        if entry.dtype not in _SAFETENSORS_TYPES:
            raise CheckpointError(
                f"{self.path}: {name} has type {entry.dtype}, which is not supported; "
                "save the checkpoint in float32, float16 or bfloat16"
            )
        count = math.prod(entry.shape)
        with self.path.open("rb") as file:
            file.seek(entry.start)
            raw = np.fromfile(file, _SAFETENSORS_TYPES[entry.dtype], count)
        if raw.size != count:
            raise CheckpointError(f"{self.path} ends within {name}; download the checkpoint again")
        return _float32(raw, entry.dtype == "BF16").reshape(entry.shape)


def _float32(raw: np.ndarray, bfloat16: bool) -> np.ndarray:
    if not bfloat16:
        return raw.astype(np.float32, copy=False)
    bits = raw.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def _safetensors_entries(path: Path) -> dict[str, _Entry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{path} is truncated: its header should take {length} bytes, the file has {size}; "
                "download the checkpoint again"
            )
        header = file.read(length)
    try:
        raw = json.loads(header)
        raw.pop("__metadata__", None)
        entries = {name: _entry(value, 8 + length) for name, value in raw.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} has no safetensors header ({one_line(error)}); download the checkpoint again"
        ) from None
    for name, entry in entries.items():
        _check_entry(path, name, entry, size)
    return entries


def _entry(raw: dict[str, Any], data: int) -> _Entry:
    start, stop = raw["data_offsets"]
    return _Entry(str(raw["dtype"]), tuple(int(size) for size in raw["shape"]), data + int(start), data + int(stop))


def _check_entry(path: Path, name: str, entry: _Entry, size: int) -> None:
    if entry.stop > size:
        raise CheckpointError(
            f"{path} is truncated: {name} ends at byte {entry.stop}, the file has {size}; download the checkpoint again"
        )
    stored = entry.stop - entry.start
    width = np.dtype(_SAFETENSORS_TYPES[entry.dtype]).itemsize if entry.dtype in _SAFETENSORS_TYPES else None
    if stored < 0 or min(entry.shape, default=0) < 0 or (width and stored != width * math.prod(entry.shape)):
        raise CheckpointError(
            f"{path}: {name} takes {stored} bytes, which {entry.dtype} {list(entry.shape)} does not; "
            "download the checkpoint again"
        )


class TorchFile:
    """A state dict in a .bin file, mapped rather than loaded (files older than PyTorch 1.6 cannot be mapped).

    Raises CheckpointError when it does not load, or holds anything that is not plain data.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = _torch_tensors(path)
        # Tied weights are one storage under several names.
        self.nbytes = sum({tensor.data_ptr(): tensor.nbytes for tensor in self._tensors.values()}.values())

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> np.ndarray:
        import torch

        return self._tensors[name].detach().to(torch.float32, copy=True).contiguous().numpy()


def _torch_tensors(path: Path) -> dict[str, torch.Tensor]:
    import torch

    try:
        state = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path} cannot be read as PyTorch weights ({one_line(error)}); download the checkpoint again"
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds {type(state).__name__}, not named tensors; save model.state_dict() there")
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def one_line(error: BaseException) -> str:
    """An error's text for the inside of a message: one line, at most 160 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
