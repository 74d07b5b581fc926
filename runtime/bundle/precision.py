"""Precisions of a bundle's tensors: the part of the manifest that a quantised bundle has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# int8-block and int4: blocks along the inputs, activations by row and block. For TensorRT weights alone are rounded:
# int8 and fp8 by output channel, int4 in blocks. Older bundles for CPUs have int8 too, with activations by row.
TensorFormat = Literal["fp32", "fp16", "bf16", "int8", "int8-block", "int4", "fp8"]
FloatType = Literal["fp32", "fp16", "bf16"]
# Whose operators multiply with quantized weights on a CPU.
Kernels = Literal["onnxruntime", "freeexport"]
# Of a head whose model is rounded: "int8" is in blocks.
HeadPrecision = Literal["int8", "int4"]


@dataclass(frozen=True)
class HigherTensor:
    """A weight with a higher format than its engine: it would lose too much as `wanted`, and `error` is
    |W - rounded W| / |W|, or the plan gives it more bits, and `error` is None."""

    engine: str
    tensor: str
    wanted: TensorFormat
    stored: TensorFormat
    error: float | None


@dataclass(frozen=True)
class EnginePrecision:
    """The linear layers of an engine: their format, that of its head (None for an engine without one), bytes of weights
    and scales, and the largest relative error of a weight, before it was fitted to text. `kept`: tensors in 4 bits that
    the checkpoint had in 4 bits already."""

    engine: str
    linears: TensorFormat
    head: TensorFormat | None
    bytes: int
    largest_error: float
    kept: int = 0


@dataclass(frozen=True)
class RoundingData:
    """The text that weights in 4 bits were rounded for: how many lines of a file, how many tokens of the decoder, and
    the sha256 of the file."""

    texts: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Quantization:
    """How a bundle's weights were quantized. `int8_range` is of older bundles: of weights that are int8 for a CPU.
    `rounding_data` is None where no text was used."""

    engines: tuple[EnginePrecision, ...] = ()
    higher: tuple[HigherTensor, ...] = ()
    int8_range: Literal["full", "reduced"] | None = None
    rounding_data: RoundingData | None = None


@dataclass(frozen=True)
class ExitVocabulary:
    """`size` tokens, chosen on `text_tokens` tokens of text, of which they are the share `covered`: the others can
    never exit."""

    size: int
    covered: float
    text_tokens: int
