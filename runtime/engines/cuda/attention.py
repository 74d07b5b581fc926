"""Chooses the attention kernels of ONNX Runtime's CUDA provider by a test on the device.

Graphs attend to the whole KV cache with an additive mask and the number of valid keys. For these,
the provider has a fused, memory-efficient kernel and an unfused one. Users reported that the fused
one fails for some shapes (onnxruntime issues 28376 and 28388).
"""

from __future__ import annotations

import logging
from functools import cache
from typing import NamedTuple

import numpy as np

from runtime.bundle.manifest import FloatType
from runtime.engines.onnx import import_onnxruntime
from runtime.errors import EngineError, first_line
from runtime.machine.device import Device

logger = logging.getLogger(__name__)

# The ONNX model y = Attention(q, k, v, mask m, valid keys n), opset 24, serialized so that `onnx`
# is not needed. Inputs are cast to the type TO, and y to float32. The scale is 1.
_MODEL = (
    "080a3ab6020a180a0171120271632204436173742a090a02746f18TOa001020a180a016b12026b63220443617374"
    "2a090a02746f18TOa001020a180a0176120276632204436173742a090a02746f18TOa001020a180a016d12026d63"
    "2204436173742a090a02746f18TOa001020a370a0271630a026b630a0276630a026d630a000a000a016e12027963"
    "2209417474656e74696f6e2a0f0a057363616c65150000803fa001010a180a0279631201792204436173742a090a"
    "02746f1801a001021201675a130a0171120e0a0c080112080a000a000a000a005a130a016b120e0a0c080112080a"
    "000a000a000a005a130a0176120e0a0c080112080a000a000a000a005a130a016d120e0a0c080112080a000a000a"
    "000a005a0d0a016e12080a06080712020a0062130a0179120e0a0c080112080a000a000a000a0042040a001018"
)
_TYPES = {"fp32": 1, "fp16": 10, "bf16": 16}  # TensorProto.DataType of ONNX
# Options of the CUDA provider: bits of its AttentionBackend. MATH is the unfused kernel.
FUSED: dict[str, str] = {}
UNFUSED = {"sdpa_kernel": "16"}
MASKED = -30000.0
TOLERANCE = 0.05  # of averages of normal numbers; bf16 rounds them by 0.01


class AttentionKernels(NamedTuple):
    """Kernels to use.

    Attributes:
        options: Options of the CUDA provider.
        problem: Why the fused kernels are not used. Empty if they are.
    """

    options: dict[str, str]
    problem: str = ""


def attention_model(float_type: FloatType) -> bytes:
    """Return the test model that computes in a type."""
    return bytes.fromhex(_MODEL.replace("TO", f"{_TYPES[float_type]:02x}"))


@cache
def choose_attention(
    device: Device, float_type: FloatType, kv_heads: int, head_dim: int, rows: int
) -> AttentionKernels:
    """Return the fused kernels, or the unfused ones if the fused ones fail.

    They are tested once in a process.

    Args:
        device: A CUDA device.
        float_type: Type of activations.
        kv_heads: Heads of keys and values.
        head_dim: Size of a head.
        rows: Rows of a KV cache. Kernels are chosen by their alignment.

    Raises:
        EngineError: If neither works.
    """
    problem = attention_problem(
        device, FUSED, float_type, kv_heads=kv_heads, head_dim=head_dim, rows=rows
    )
    if not problem:
        return AttentionKernels(FUSED)
    again = attention_problem(
        device, UNFUSED, float_type, kv_heads=kv_heads, head_dim=head_dim, rows=rows
    )
    if again:
        raise EngineError(
            f"attention does not work on device {device} in {float_type} ({problem}; without "
            f"fused kernels: {again}); upgrade onnxruntime-gpu, or convert with another --precision"
        )
    logger.warning(
        "device %s: ONNX Runtime's fused attention fails in %s (%s); "
        "the unfused kernels are used, which are slower",
        device,
        float_type,
        problem,
    )
    return AttentionKernels(UNFUSED, problem)


def attention_problem(
    device: Device,
    options: dict[str, str],
    float_type: FloatType,
    kv_heads: int,
    head_dim: int,
    rows: int,
) -> str:
    """Return how attention with these provider options fails or differs from numpy, or ""."""
    ort = import_onnxruntime()
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    try:
        session = ort.InferenceSession(
            attention_model(float_type), settings, providers=device.providers(ort, options)
        )
    except Exception as error:
        return first_line(error)
    device.check_active(session, "the attention test")
    draw = np.random.default_rng(0)
    total = 64 + rows % 8
    valid = np.array([20, 33])
    # Decoding and sync passes, with one and with two query heads per key head.
    for heads, queries in ((kv_heads, 1), (kv_heads, 5), (2 * kv_heads, 1), (2 * kv_heads, 5)):
        query, key, value = (
            draw.standard_normal((2, count, length, head_dim), np.float32)
            for count, length in ((heads, queries), (kv_heads, total), (kv_heads, total))
        )
        query /= np.sqrt(head_dim)
        ends = valid[:, None] - queries + np.arange(queries)
        seen = np.arange(total) <= ends[..., None]
        mask = np.where(seen, 0.0, MASKED).astype(np.float32)[:, None]
        try:
            (found,) = session.run(
                None, {"q": query, "k": key, "v": value, "m": mask, "n": valid.astype(np.int64)}
            )
        except Exception as error:
            return first_line(error)
        key, value = (np.repeat(each, heads // kv_heads, axis=1) for each in (key, value))
        weights = np.exp(query @ key.transpose(0, 1, 3, 2) + mask)
        wanted = weights / weights.sum(-1, keepdims=True) @ value
        difference = np.abs(found - wanted).max()
        if not difference <= TOLERANCE:  # also NaN
            return f"results differ by {difference:.2g} for {heads} heads and {queries} queries"
    return ""
