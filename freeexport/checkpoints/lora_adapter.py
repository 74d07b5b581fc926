"""LoRA adapters of peft, merged into their base one tensor at a time: W + scale * B A."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from freeexport.checkpoints.weight_files import CheckpointError, Shape, TensorFile, open_weights
from graphs.weights import Weights
from runtime.bundle.json_file import read_object
from runtime.errors import shown

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_A = ".lora_A.weight"
_B = ".lora_B.weight"
# Unsupported settings, which change the update of a weight, or the weight itself.
_UNSUPPORTED = (
    *("use_dora", "alpha_pattern", "modules_to_save", "layer_replication"),
    *("trainable_token_indices", "target_parameters", "lora_bias", "megatron_config"),
)
_MAX_ALPHA = 1e6
_MAX_PATH = 4096
# Initializations that do not change the base's weights.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_adapter(directory: Path) -> tuple[dict[str, Any], str]:
    """Return the configuration of an adapter, and the path or hub name of its base.

    Raises:
        CheckpointError: If the adapter is damaged, is not plain LoRA, or its base is an adapter.
    """
    path = directory / ADAPTER_CONFIG
    config = read_object(path, "train the adapter again", CheckpointError, nan=True)
    check_adapter(config, path)
    model = config.get("base_model_name_or_path")
    if not model or not isinstance(model, str) or len(model) > _MAX_PATH:
        raise CheckpointError(f"{path} names no base_model_name_or_path; add the base's path")
    base = directory / model if (directory / model).exists() else Path(model)
    if base.exists() and base.resolve() == directory.resolve():
        raise CheckpointError(f"{path} names itself as its base; give the base's path")
    if (base / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{directory} has the base {base}, an adapter too; merge that into its own base with "
            "peft"
        )
    return config, str(base) if base.exists() else model


def check_adapter(config: dict[str, Any], path: Path) -> None:
    """Check that the configuration of an adapter is one of plain LoRA.

    Args:
        config: The configuration.
        path: Its file, for error messages.

    Raises:
        CheckpointError: If a setting is not supported or out of range.
    """
    if (kind := config.get("peft_type")) != "LORA":
        raise CheckpointError(
            f"{path}: adapters of type {kind} are not supported, LORA is; merge it with peft"
        )
    for name in _UNSUPPORTED:
        if config.get(name):
            raise CheckpointError(
                f"{path}: {name} is not supported; merge the adapter with peft (merge_and_unload)"
            )
    if config.get("bias", "none") != "none":
        raise CheckpointError(
            f"{path}: trained biases are not supported; merge the adapter with peft"
        )
    if (start := config.get("init_lora_weights")) not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{path}: init_lora_weights {shown(start)} changes the base; merge the adapter "
            "with peft"
        )
    alpha = config.get("lora_alpha", 8)
    rank = config.get("r", 8)
    if type(alpha) not in (int, float) or not 0 < alpha <= _MAX_ALPHA:
        raise CheckpointError(
            f"{path}: lora_alpha is {str(alpha)[:40]!r}; it must be a number above 0, at most "
            f"{_MAX_ALPHA:g}"
        )
    if type(rank) is not int or rank < 1:
        raise CheckpointError(
            f"{path}: r is {str(rank)[:40]!r}; a rank must be a whole number from 1"
        )


def adapter_weights(directory: Path) -> TensorFile:
    """Open the weights of an adapter.

    Raises:
        CheckpointError: If they are missing or damaged.
    """
    for name in ADAPTER_WEIGHTS:
        if (directory / name).is_file():
            return open_weights(directory / name)
    raise CheckpointError(
        f"{directory} has no weights: none of {', '.join(ADAPTER_WEIGHTS)} is there; copy it again"
    )


class MergedWeights(TensorFile):
    """Tensors of `base` that an adapter changes, each merged when it is read.

    Args:
        file: The adapter's tensors, under peft's names.
        config: The adapter's configuration.
        base: Weights of the base.

    Raises:
        CheckpointError: If the adapter's tensors do not fit the base.
    """

    def __init__(self, file: TensorFile, config: dict[str, Any], base: Weights) -> None:
        self.file = file
        self.path = path = file.path
        self.nbytes = file.nbytes
        self._base = base
        self._transposed = bool(config.get("fan_in_fan_out"))
        # Factor of B A for each tensor. A layer's rank may differ from the one in the
        # configuration.
        self._scales: dict[str, float] = {}
        self.shapes = shapes = dict[str, Shape]()
        for name in self.file.shapes:
            module = name.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B)
            if not name.startswith(_PREFIX) or not name.endswith((_A, _B)):
                raise CheckpointError(
                    f"{path} holds {name}, which is no LoRA of a linear layer; merge it with peft"
                )
            weight = f"{module}.weight"
            rank, shape = self._sizes(module)
            if weight not in base:
                raise CheckpointError(
                    f"{path} adapts {weight}, which the base has not; check its base"
                )
            if base.shape(weight) != shape:
                raise CheckpointError(
                    f"{path} adapts {weight} as {list(shape)}, the base has "
                    f"{list(base.shape(weight))}; check its base"
                )
            self._scales[weight] = config.get("lora_alpha", 8) / (
                math.sqrt(rank) if config.get("use_rslora") else rank
            )
            shapes[weight] = shape

    def _sizes(self, module: str) -> tuple[int, tuple[int, int]]:
        """Return the rank of A [rank, inputs] and B [outputs, rank], and the weight's shape."""
        a, b = (self.file.shapes.get(_PREFIX + module + part) for part in (_A, _B))
        if a is None or b is None:
            raise CheckpointError(f"{self.path} has only half of {module}; train the adapter again")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] < 1:
            raise CheckpointError(
                f"{self.path}: A of {module} is {list(a)} and B is {list(b)}, which are no [rank, "
                "inputs] and [outputs, rank] of one rank from 1; train the adapter again"
            )
        return a[0], (a[1], b[0]) if self._transposed else (b[0], a[1])

    def read(self, name: str) -> np.ndarray:
        merged = self._base.read(name)
        merged += self.delta(name)
        return merged

    def delta(self, name: str) -> np.ndarray:
        """Return the update of a weight, scale * B A, float32 in the weight's shape."""
        a, b = (self.file.read(_PREFIX + name.removesuffix(".weight") + part) for part in (_A, _B))
        delta = b @ a
        delta *= np.float32(self._scales[name])
        return delta.T if self._transposed else delta
