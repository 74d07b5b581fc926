"""exit.json beside the weights of a checkpoint: position and parameters of its exit."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from freeexport.checkpoints.weight_files import (
    CheckpointError,
    SafetensorsFile,
    Shape,
    TensorFile,
)
from graphs.exit_head import (
    EXIT_NORM,
    EXIT_NORM_BIAS,
    OTHER,
    OTHER_BIAS,
    VOCABULARY,
)
from graphs.families import describe
from graphs.shapes import own_shapes
from graphs.weights import Weights
from runtime.bundle.json_file import read_object
from runtime.bundle.manifest import ExitInput, ExitVocabulary
from runtime.bundle.schema import Reader
from runtime.errors import BundleError

# "deep-ce" trains a model without an exit, for comparison. tools/paper/losses.py has "weighted-ce",
# which trains an exit after every layer, "kd-unif" and "kd-last".
LossName = Literal["ce", "kd-dyn", "kd-unif", "kd-last", "weighted-ce", "logit-kd", "deep-ce"]
Tune = Literal["full", "lora", "exit"]

EXIT_FILE = "exit.json"
EXIT_WEIGHTS = "exit.safetensors"
EXIT_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ExitFile:
    """Content of exit.json.

    Attributes:
        exit_layer: Layer after which the exit is.
        base_sha256: Checkpoint.sha256 of the weights beside the exit's own parameters, or of the
            model before training if the exit has none.
        loss: Loss of the training.
        tune: Weights that were trained.
        exit_layers: Number of transformer layers that the exit has of its own.
        vocabulary: Tokens that the exit predicts, beside one class for all others. None: all
            tokens.
        exit_input: Input of the exit's own layers.
        schema_version: Version of this format.

    Raises:
        CheckpointError: If a value is not allowed.
    """

    exit_layer: int
    base_sha256: str
    loss: LossName
    tune: Tune
    exit_layers: int = 0
    vocabulary: ExitVocabulary | None = None
    exit_input: ExitInput = "state"
    schema_version: int = EXIT_SCHEMA_VERSION

    def __post_init__(self) -> None:
        right = {
            "exit_layer": self.exit_layer >= (1 if self.exit_input == "state" else 0),
            "exit_input": self.exit_input == "state" or self.exit_layers > 0,
            "exit_layers": self.exit_layers >= 0,
            "vocabulary": self.vocabulary is None or self.vocabulary.size >= 2,
            "base_sha256": len(self.base_sha256) == 64,
        }
        for name in (name for name, holds in right.items() if not holds):
            raise CheckpointError(
                f"{name} is {str(getattr(self, name))[:80]!r}, which it cannot be"
            )

    @property
    def trained(self) -> bool:
        """Return True if the exit was trained."""
        return self.loss != "deep-ce"

    @property
    def has_parameters(self) -> bool:
        return self.exit_layers > 0 or self.vocabulary is not None

    def shapes(self, hidden_size: int) -> dict[str, Shape]:
        """Return the shapes of the exit's own tensors, except its layers."""
        shapes: dict[str, Shape] = {}
        if self.exit_layers:
            shapes[EXIT_NORM] = (hidden_size,)
        if self.vocabulary is not None:
            shapes |= {
                VOCABULARY: (self.vocabulary.size,),
                OTHER: (1, hidden_size),
                OTHER_BIAS: (1,),
            }
        return shapes


def write_exit_file(directory: Path, exit_file: ExitFile) -> None:
    text = json.dumps(asdict(exit_file), indent=2, sort_keys=True) + "\n"
    (directory / EXIT_FILE).write_text(text, encoding="utf-8")


def read_exit_file(directory: Path) -> ExitFile | None:
    """Read exit.json, or return None if there is none.

    Raises:
        CheckpointError: If the file cannot be read or its content is invalid.
    """
    path = directory / EXIT_FILE
    remedy = "train again, or remove it"
    if not path.exists():
        return None
    try:
        value = read_object(path, remedy)
        if (version := value.get("schema_version")) != EXIT_SCHEMA_VERSION:
            raise CheckpointError(
                f"{path} has schema version {repr(version)[:80]}, this freeexport reads "
                f"{EXIT_SCHEMA_VERSION}; use the freeexport that wrote it, or {remedy}"
            )
        read: ExitFile = Reader(remedy).read(ExitFile, with_layers(value, str(path)), str(path))
    except BundleError as error:
        raise CheckpointError(str(error)) from None
    return read


def with_layers(content: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the content of an exit.json without the fields of a norm and an adapter.

    Older versions wrote these fields.

    Raises:
        CheckpointError: If the exit has a norm or an adapter instead of layers.
    """
    rank = content.get("adapter_rank")
    if rank or (content.get("exit_norm") and not content.get("exit_layers")):
        adapter = f"an adapter of rank {str(rank)[:80]}" if rank else "a norm"
        raise CheckpointError(
            f"{where}: the exit has {adapter} of its own, which is no longer supported; train one "
            "with --exit-head-layers 1 or more"
        )
    kept = content.keys() - {"exit_norm", "adapter_rank"}
    return {name: value for name, value in content.items() if name in kept}


def open_exit_weights(directory: Path) -> SafetensorsFile:
    """Open the exit's own tensors beside exit.json.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    path = directory / EXIT_WEIGHTS
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing, which {EXIT_FILE} needs; copy it there, or train again"
        )
    return SafetensorsFile(path)


def check_exit_weights(
    file: TensorFile, exit_file: ExitFile, config: dict[str, Any], weights: Weights
) -> None:
    """Check an exit's own tensors against a model's configuration and weights.

    Raises:
        CheckpointError: If they do not fit, or the exit has more layers than the decoder.
    """
    path = file.path
    description = describe(config, weights)
    shapes = exit_file.shapes(description.hidden_size)
    norm = description.decoder.head.norm
    if norm is None:
        shapes.pop(EXIT_NORM, None)
    elif norm.bias is not None and EXIT_NORM in shapes:
        shapes[EXIT_NORM_BIAS] = shapes[EXIT_NORM]
    if exit_file.exit_layers:
        layers = len(description.decoder.layers)
        if exit_file.exit_layers > layers:
            raise CheckpointError(
                f"{EXIT_FILE} has {exit_file.exit_layers} exit_layers, which this model of "
                f"{layers} decoder layers cannot have; train again, or remove it"
            )
        shapes |= own_shapes(description, weights, exit_file.exit_layers, exit_file.exit_input)
    for name, shape in shapes.items():
        if (found := file.shapes.get(name)) != shape:
            shown = "missing" if found is None else list(found)
            raise CheckpointError(
                f"{path}: {name} is {shown}, not {list(shape)}; train the exit again"
            )
    if others := sorted(set(file.shapes) - shapes.keys()):
        raise CheckpointError(
            f"{path} has {others[0][:80]}, which {EXIT_FILE} does not name; train the exit again"
        )
