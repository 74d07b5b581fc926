"""What kernels of ONNX Runtime's CUDA provider are registered for, and refuse when they are made or run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What the kernel of `operator` refuses when it is made or run: `refused` gives what of a node's attributes and
    inputs it is, or nothing. `source` says where ONNX Runtime says so."""

    operator: str
    refused: Callable[[Mapping[str, Any], list[str]], str]
    source: str


def _bits(attributes: Mapping[str, Any], inputs: list[str]) -> str:
    bits, block = attributes.get("bits", 4), attributes.get("block_size")
    if bits not in (2, 4, 8):
        return f"bits = {bits}"
    if len(inputs) > 4 and inputs[4]:
        return "g_idx, whose check cannot be captured in a CUDA graph"
    return "" if block in (16, 32, 64, 128, 256) else f"block_size = {block}"


def _softmax_precision(attributes: Mapping[str, Any], inputs: list[str]) -> str:
    precision = attributes.get("softmax_precision", 0)
    return "" if precision in (0, 1, 10, 16) else f"softmax_precision = {precision}"


def _grouped_query(attributes: Mapping[str, Any], inputs: list[str]) -> str:
    if len(inputs) > 10 and inputs[10] and (attributes.get("smooth_softmax") or (len(inputs) > 11 and inputs[11])):
        return "attention_bias with smooth softmax or head_sink"
    return ""


def _mode(attributes: Mapping[str, Any], inputs: list[str]) -> str:
    mode = attributes.get("mode", b"linear")
    return "" if mode in (b"linear", b"circular") else f"mode {mode!r}"


RULES = (
    Rule("com.microsoft|MatMulNBits", _bits, "contrib_ops/cuda/quantization/matmul_nbits.cc, its messages in 1.31.1"),
    Rule("|Attention", _softmax_precision, "providers/cuda/llm/attention.cc, its messages in 1.31.1"),
    Rule(
        "com.microsoft|GroupQueryAttention",
        _grouped_query,
        "contrib_ops/cuda/bert/group_query_attention.cc, its messages in 1.31.1 and pull request 29525",
    ),
    Rule("|TensorScatter", _mode, "providers/cuda/llm/tensorscatter.cc, its messages in 1.31.1"),
)
