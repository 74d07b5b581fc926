"""A LoRA adapter of peft, merged into its base one tensor at a time: W + scale * B A."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from freeexport.checkpoints.weight_files import CheckpointError, WeightFile, open_weights
from runtime.json_file import read_object

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# Settings that change what is added to a weight, or the weight itself, and are not merged here.
_UNSUPPORTED = (
    "use_dora",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "lora_bias",
    "megatron_config",
)
_MAX_ALPHA = 1e6
_MAX_PATH = 4096
# Initialisations that leave the base's weights as they were.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


class Base(Protocol):
    """The checkpoint that an adapter belongs to."""

    name: str

    def __contains__(self, name: object) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> np.ndarray: ...


class LoraAdapter:
    """The adapter in a directory. `base` is the path or hub name of its base.

    Raises CheckpointError when it is damaged, or is anything but plain LoRA.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        config = _read_config(directory / ADAPTER_CONFIG)
        self.base = _base(directory, config)
        self.weights = _open_weights(directory)
        self._alpha, self._rank_scaled = _alpha(directory, config), bool(config.get("use_rslora"))
        self._transposed = bool(config.get("fan_in_fan_out"))

    def merged(self, base: Base) -> MergedWeights:
        """The adapted tensors of the base, as if they stood in a file."""
        stored = set(self.weights.names())
        pairs = {}
        for name in sorted(stored):
            module = name.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B)
            if not name.startswith(_PREFIX) or not name.endswith((_A, _B)):
                raise CheckpointError(
                    f"{self.weights.path} holds {name}, which is no LoRA of a linear layer; merge the adapter with peft"
                )
            if not {_PREFIX + module + _A, _PREFIX + module + _B} <= stored:
                raise CheckpointError(f"{self.weights.path} has only half of {module}; train the adapter again")
            pairs[f"{module}.weight"] = self._pair(base, module)
        return MergedWeights(self.weights, base, pairs, self._transposed)

    def _pair(self, base: Base, module: str) -> _Pair:
        a, b = _PREFIX + module + _A, _PREFIX + module + _B
        weight = f"{module}.weight"
        if weight not in base:
            raise CheckpointError(f"{self.directory} adapts {weight}, which {base.name} has not; check its base")
        rank, inputs, outputs = self._sizes(a, b)
        shape = (inputs, outputs) if self._transposed else (outputs, inputs)
        if base.shape(weight) != shape:
            raise CheckpointError(
                f"{self.directory} adapts {weight} as {list(shape)}, {base.name} has {list(base.shape(weight))}; "
                "check its base"
            )
        return _Pair(a, b, self._alpha / (math.sqrt(rank) if self._rank_scaled else rank))

    def _sizes(self, a: str, b: str) -> tuple[int, int, int]:
        """Rank, inputs and outputs."""
        down, up = self.weights.shape(a), self.weights.shape(b)
        if len(down) != 2 or len(up) != 2 or down[0] != up[1] or down[0] < 1:
            raise CheckpointError(
                f"{self.weights.path}: {a} is {list(down)} and {b} is {list(up)}, which are no [rank, inputs] and "
                "[outputs, rank] of one rank from 1; train the adapter again"
            )
        return down[0], down[1], up[0]


@dataclass(frozen=True)
class _Pair:
    """Tensor names of A [rank, inputs] and B [outputs, rank], and what multiplies their product."""

    a: str
    b: str
    scale: float


class MergedWeights:
    """The tensors that an adapter changes, each merged when it is read."""

    def __init__(self, weights: WeightFile, base: Base, pairs: dict[str, _Pair], transposed: bool) -> None:
        self.path = weights.path
        self.nbytes = weights.nbytes
        self._weights, self._base, self._pairs, self._transposed = weights, base, pairs, transposed

    def names(self) -> Iterable[str]:
        return self._pairs.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def read(self, name: str) -> np.ndarray:
        pair = self._pairs[name]
        delta = self._weights.read(pair.b) @ self._weights.read(pair.a)
        delta *= np.float32(pair.scale)
        merged = self._base.read(name)
        merged += delta.T if self._transposed else delta
        return merged


def _read_config(path: Path) -> dict[str, Any]:
    config = read_object(path, "train the adapter again", CheckpointError, nan=True)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: adapters of type {kind} are not supported, LORA is; merge it with peft")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise CheckpointError(f"{path}: {name} is not supported; merge the adapter with peft (merge_and_unload)")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: trained biases are not supported; merge the adapter with peft")
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{path}: init_lora_weights {config['init_lora_weights']!r} changes the base; merge the adapter with peft"
        )
    return config


def _alpha(directory: Path, config: dict[str, Any]) -> float:
    """`lora_alpha`, the numerator of the scale. `r`, its denominator, is the rank that the tensors have."""
    alpha, rank = config.get("lora_alpha", 8), config.get("r", 8)
    path = directory / ADAPTER_CONFIG
    if type(alpha) not in (int, float) or not 0 < alpha <= _MAX_ALPHA:
        raise CheckpointError(
            f"{path}: lora_alpha is {str(alpha)[:40]!r}; it must be a number above 0, at most {_MAX_ALPHA:g}"
        )
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"{path}: r is {str(rank)[:40]!r}; a rank must be a whole number from 1")
    return float(alpha)


def _base(directory: Path, config: dict[str, Any]) -> str:
    name = config.get("base_model_name_or_path")
    if not name or not isinstance(name, str) or len(name) > _MAX_PATH:
        raise CheckpointError(f"{directory / ADAPTER_CONFIG} names no base_model_name_or_path; add the base's path")
    beside = directory / name
    base = beside if beside.exists() else Path(name)
    if base.exists() and base.resolve() == directory.resolve():
        raise CheckpointError(f"{directory / ADAPTER_CONFIG} names itself as its base; give the base's path")
    if (base / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{directory} has the base {base}, an adapter too; merge that into its own base with peft"
        )
    return str(base) if base.exists() else name


def _open_weights(directory: Path) -> WeightFile:
    path = next((directory / name for name in _WEIGHTS if (directory / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{directory} has no weights: none of {', '.join(_WEIGHTS)} is there; copy it again")
    return open_weights(path)
