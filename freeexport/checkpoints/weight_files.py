"""Files of weights, read one tensor at a time: safetensors, and what `torch.save` wrote."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from runtime.errors import FreeExportError

if TYPE_CHECKING:
    import torch

# Of real numbers, a value a byte or more: what can be read as float32.
_SAFETENSORS_TYPES = (
    *("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"),
    *("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"),
)


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


class SafetensorsFile:
    """Mapped by the format's own library, which refuses overlaps, holes, and bytes that the file does not have.

    Raises CheckpointError for these, and where the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            # Through torch, which has every type of the format; numpy lacks those of 8 bits.
            self._file: Any = safe_open(path, "pt")
            entries = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118, no mapping
            self._types = {name: str(entry.get_dtype()) for name, entry in entries.items()}
            self._shapes = {name: tuple(map(int, entry.get_shape())) for name, entry in entries.items()}
            self.nbytes = _data_bytes(path)
        except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:
            raise CheckpointError(
                f"{path} is not a complete safetensors file ({one_line(error)}); download the checkpoint again"
            ) from None

    def names(self) -> Iterable[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> np.ndarray:
        if self._types[name] not in _SAFETENSORS_TYPES:
            raise CheckpointError(
                f"{self.path}: {name} has type {self._types[name]}, which is not supported; "
                "save the checkpoint in float32, float16 or bfloat16"
            )
        return _float32(self._file.get_tensor(name))


def _data_bytes(path: Path) -> int:
    """What follows the header: the format has tensors without gaps there, to the end of the file."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def _float32(tensor: torch.Tensor) -> np.ndarray:
    import torch

    array: np.ndarray = tensor.detach().to(torch.float32, copy=True).contiguous().numpy()
    return array


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
        return _float32(self._tensors[name])


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
