"""exit.json beside a checkpoint's weights: where its exit stands, and what the exit has of its own."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from freeexport.checkpoints.schema_file import read_schema_file
from freeexport.checkpoints.weight_files import CheckpointError
from graphs.exit_head import ADAPTER_DOWN, ADAPTER_NORM, ADAPTER_UP, EXIT_NORM
from runtime.errors import BundleError

LossName = Literal["ce", "kd-dyn", "kd-last", "kd-unif", "weighted-ce", "logit-kd", "kd-dyn-raw"]
Tune = Literal["full", "lora", "exit"]

EXIT_FILE, EXIT_WEIGHTS = "exit.json", "exit.safetensors"
EXIT_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ExitFile:
    """`exit_norm`, `adapter_rank` and `exit_layers` (transformer layers) say which parameters the exit has of its own:
    none (False, 0, 0) where the checkpoint itself was trained. `base_sha256` is Checkpoint.sha256 of what was trained;
    where that and layers of the exit's own were trained together, of the weights beside them."""

    exit_layer: int
    exit_norm: bool
    adapter_rank: int
    base_sha256: str
    loss: LossName
    tune: Tune
    exit_layers: int = 0
    schema_version: int = EXIT_SCHEMA_VERSION

    def __post_init__(self) -> None:
        right = {
            "exit_layer": self.exit_layer >= 1,
            "adapter_rank": self.adapter_rank >= 0,
            "exit_layers": self.exit_layers >= 0,
            "base_sha256": len(self.base_sha256) == 64,
        }
        for name in (name for name, holds in right.items() if not holds):
            raise CheckpointError(f"{name} is {str(getattr(self, name))[:80]!r}, which it cannot be")

    @property
    def has_parameters(self) -> bool:
        return self.exit_norm or self.adapter_rank > 0 or self.exit_layers > 0

    def shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """The tensors of EXIT_WEIGHTS."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self.exit_norm:
            shapes[EXIT_NORM] = (hidden_size,)
        if self.adapter_rank:
            shapes[ADAPTER_NORM] = (hidden_size,)
            shapes[ADAPTER_DOWN] = (self.adapter_rank, hidden_size)
            shapes[ADAPTER_UP] = (hidden_size, self.adapter_rank)
        return shapes


def write_exit_file(directory: Path, exit_file: ExitFile) -> None:
    text = json.dumps(asdict(exit_file), indent=2, sort_keys=True) + "\n"
    (directory / EXIT_FILE).write_text(text, encoding="utf-8")


def read_exit_file(directory: Path) -> ExitFile | None:
    """None where there is none. Raises CheckpointError where it cannot be read, or does not hold what it must."""
    path = directory / EXIT_FILE
    if not path.exists():
        return None
    try:
        read: ExitFile = read_schema_file(path, ExitFile, EXIT_SCHEMA_VERSION, "train again, or remove it")
    except BundleError as error:
        raise CheckpointError(str(error)) from None
    return read
