"""exit.json beside a checkpoint's weights: where its exit stands, and what the exit has of its own."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from freeexport.training_options import LossName, Tune
from freeexport.weight_files import CheckpointError, one_line
from graphs.exit_head import ADAPTER_DOWN, ADAPTER_NORM, ADAPTER_UP, EXIT_NORM

EXIT_FILE, EXIT_WEIGHTS = "exit.json", "exit.safetensors"
EXIT_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ExitFile:
    """`exit_norm` and `adapter_rank` say which parameters the exit has of its own: neither (False, 0) where the
    checkpoint itself was trained. `base_sha256` is Checkpoint.sha256 of what was trained."""

    exit_layer: int
    exit_norm: bool
    adapter_rank: int
    base_sha256: str
    loss: LossName
    tune: Tune
    schema_version: int = EXIT_SCHEMA_VERSION

    @property
    def has_parameters(self) -> bool:
        return self.exit_norm or self.adapter_rank > 0

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
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({one_line(error)}); train again, or remove it") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {type(values).__name__}, not an object; train again, or remove it")
    version = values.get("schema_version")
    if version != EXIT_SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema version {version!r}, this freeexport reads {EXIT_SCHEMA_VERSION}; "
            "use the freeexport that wrote it, or train again"
        )
    problem = next(filter(None, (_problem(field.name, values) for field in fields(ExitFile))), None)
    if problem:
        raise CheckpointError(f"{path}: {problem}; train again, or remove it")
    return ExitFile(**{field.name: values[field.name] for field in fields(ExitFile)})


def _problem(name: str, values: dict[str, Any]) -> str | None:
    if name not in values:
        return f"{name!r} is missing"
    value = values[name]
    right = {
        "exit_layer": type(value) is int and value >= 1,
        "exit_norm": type(value) is bool,
        "adapter_rank": type(value) is int and value >= 0,
        "base_sha256": isinstance(value, str) and len(value) == 64,
        "loss": value in get_args(LossName),
        "tune": value in get_args(Tune),
        "schema_version": True,
    }[name]
    return None if right else f"{name!r} is {str(value)[:80]!r}, which it cannot be"
