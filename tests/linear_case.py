"""A linear layer and its weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

FLOAT = ir.DataType.FLOAT


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


WEIGHT, BIAS = normal(24, 40), normal(24, seed=1)
