"""Files of weights, read one tensor at a time: safetensors and files of `torch.save`."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphs.quantization.panels import InFile
from runtime.bundle.json_file import read_object
from runtime.errors import FreeExportError, one_line, shown

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

# In the order in which transformers searches them.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Types that can be read as float32: real numbers of at least one byte.
_SAFETENSORS_TYPES = (
    *("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"),
    *("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"),
)


class CheckpointError(FreeExportError):
    """A checkpoint is missing, incomplete, damaged, or of an unsupported kind."""


class TensorFile:
    """A file of named tensors. `nbytes` counts each stored tensor once, in its stored type."""

    path: Path
    nbytes: int
    shapes: Mapping[str, Shape]

    def read(self, name: str) -> np.ndarray:
        """Return a copy of a tensor in float32."""
        raise NotImplementedError

    def in_file(self, name: str, exact: bool = False) -> InFile | None:
        """Return the stored form of a matrix, if our own operators read it directly, or None.

        Args:
            name: Name of the matrix.
            exact: The form replaces floats, so no other format is an alternative.
        """
        return None


class SafetensorsFile(TensorFile):
    """A memory-mapped safetensors file.

    The format's own library refuses overlaps, gaps, and tensors beyond the end of the file.

    Raises:
        CheckpointError: If the file is invalid or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            # Read with torch, which supports every type of the format. numpy has no 8-bit floats.
            self._file: Any = safe_open(path, "pt")
            self.metadata: dict[str, str] = self._file.metadata() or {}
            entries = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118, no mapping
            self._types = {name: str(entry.get_dtype()) for name, entry in entries.items()}
            self.shapes = {
                name: tuple(map(int, entry.get_shape())) for name, entry in entries.items()
            }
            with path.open("rb") as file:
                # Tensors follow the header without gaps, to the end of the file.
                self.nbytes = path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
        except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:
            raise CheckpointError(
                f"{path} is not a complete safetensors file ({one_line(error)}); download the "
                "checkpoint again"
            ) from None

    def read(self, name: str) -> np.ndarray:
        if self._types[name] not in _SAFETENSORS_TYPES:
            raise CheckpointError(
                f"{self.path}: {name} has type {self._types[name]}, which is not supported; save "
                "the checkpoint in float32, float16 or bfloat16"
            )
        return _float32(self._file.get_tensor(name))

    def read_stored(self, name: str) -> np.ndarray:
        """Return a copy of a tensor in its own type, which numpy must have."""
        array: np.ndarray = self._file.get_tensor(name).numpy().copy()
        return array


class TorchFile(TensorFile):
    """A state dict in a .bin file. It is memory-mapped, except for files older than PyTorch 1.6.

    Raises:
        CheckpointError: If the file cannot be loaded, or contains anything but plain data.
    """

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path
        try:
            state = torch.load(
                path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True
            )
        except Exception as error:  # a damaged pickle can raise anything
            raise CheckpointError(
                f"{path} cannot be read as PyTorch weights ({one_line(error)}); download the "
                "checkpoint again"
            ) from None
        if not isinstance(state, dict):
            kind = type(state).__name__
            raise CheckpointError(
                f"{path} holds {kind}, not named tensors; save model.state_dict() there"
            )
        self._tensors = {
            name: value for name, value in state.items() if isinstance(value, torch.Tensor)
        }
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        # Tied weights share one storage under several names.
        self.nbytes = sum(
            {tensor.data_ptr(): tensor.nbytes for tensor in self._tensors.values()}.values()
        )

    def read(self, name: str) -> np.ndarray:
        return _float32(self._tensors[name])


def _float32(tensor: torch.Tensor) -> np.ndarray:
    import torch

    array: np.ndarray = tensor.detach().to(torch.float32, copy=True).contiguous().numpy()
    return array


def open_weights(path: Path) -> TensorFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def weight_files(path: Path) -> tuple[list[TensorFile], dict[str, TensorFile]]:
    """Return the weight files in a directory, and the file of each tensor.

    Raises:
        CheckpointError: If files are missing, damaged or inconsistent.
    """
    found = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{path} has no weights: none of {', '.join(_WEIGHTS)} is there; download it again"
        )
    if found.suffix != ".json":
        file = open_weights(found)
        return [file], dict.fromkeys(file.shapes, file)
    shards = read_json(found).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{found} has no weight_map; download the checkpoint again")
    files: dict[str, TensorFile] = {}
    for name in sorted(set(map(str, shards.values()))):
        if Path(name).name != name:
            raise CheckpointError(
                f"{found} names the shard {shown(name)}, outside its directory; do not use this "
                "checkpoint"
            )
        if not (path / name).is_file():
            raise CheckpointError(
                f"{found} names the shard {name}, which is missing; download the checkpoint again"
            )
        files[name] = open_weights(path / name)
    for tensor, shard in shards.items():
        if tensor not in files[str(shard)].shapes:
            raise CheckpointError(
                f"{found} places {tensor} in {shard}, which lacks it; download the checkpoint again"
            )
    return list(files.values()), {tensor: files[str(shard)] for tensor, shard in shards.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file beside the weights."""
    # Configurations contain infinite limits, which Python writes as Infinity.
    return read_object(path, "download the checkpoint again", CheckpointError, nan=True)
