"""What stands in which precision: the part of the manifest that a quantised bundle has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# int8: weights by output channel, activations by row. int8-block and int4: blocks along the inputs. For TensorRT
# weights alone are rounded: int8 and fp8 by output channel, int4 in blocks.
TensorFormat = Literal["fp32", "fp16", "bf16", "int8", "int8-block", "int4", "fp8"]
FloatType = Literal["fp32", "fp16", "bf16"]
Int8Range = Literal["full", "reduced"]
# How the linear layers of decoders for CPUs stand in 8 bits: as "int8", or as "int8-block".
Int8Layout = Literal["rows", "blocks"]
# Whose operators multiply with quantized weights on a CPU.
Kernels = Literal["onnxruntime", "freeexport"]
# Of a head whose model is rounded: "int8" is in blocks.
HeadPrecision = Literal["int8", "int4"]


@dataclass(frozen=True)
class HigherTensor:
    """A weight that would lose too much at the format its engine was to have: `error` is |W - rounded W| / |W|."""

    engine: str
    tensor: str
    wanted: TensorFormat
    stored: TensorFormat
    error: float


@dataclass(frozen=True)
class EnginePrecision:
    """The linear layers of an engine: their format, that of its head (None for an engine without one), bytes of weights
    and scales, and the largest relative error of a weight."""

    engine: str
    linears: TensorFormat
    head: TensorFormat | None
    bytes: int
    largest_error: float


@dataclass(frozen=True)
class Quantization:
    """How a bundle's weights were quantized. `int8_range` "full" needs a processor with 8-bit dot products. With
    `exact_rows` a row gets the same bits in every call."""

    int8_range: Int8Range
    engines: tuple[EnginePrecision, ...] = ()
    higher: tuple[HigherTensor, ...] = ()
    exact_rows: bool = False


@dataclass(frozen=True)
class ExitVocabulary:
    """`size` tokens, chosen on `text_tokens` tokens of text, of which they are the share `covered`: the others can
    never exit."""

    size: int
    covered: float
    text_tokens: int
