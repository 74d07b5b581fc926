"""A checkpoint in memory, and the weights of a linear layer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

FLOAT = ir.DataType.FLOAT


class Source:
    """Checkpoint tensors in memory."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


WEIGHT = normal(24, 40)
BIAS = normal(24, seed=1)
