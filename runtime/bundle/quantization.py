"""How the weights of a bundle were quantized, as its manifest records it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

# int8-block, int4, and int5 and int6 of GGUF files: weights in blocks along the inputs, activations
# by row and block. For TensorRT only weights are quantized: int8 and fp8 by output channel, int4 in
# blocks. Older bundles for CPUs also have int8, with activations by row.
TensorFormat = Literal["fp32", "fp16", "bf16", "int8", "int8-block", "int6", "int5", "int4", "fp8"]


@dataclass(frozen=True)
class HigherTensor:
    """A weight stored with more bits than the engine's other weights.

    Attributes:
        engine: Name of the engine.
        tensor: Name of the weight.
        wanted: Requested format.
        stored: Format of the stored weight.
        error: Relative error in the requested format, which was too large. None if the formats for
            this precision give the weight more bits.
    """

    engine: str
    tensor: str
    wanted: TensorFormat
    stored: TensorFormat
    error: float | None


@dataclass(frozen=True)
class EnginePrecision:
    """Precision of an engine's linear layers.

    Attributes:
        engine: Name of the engine.
        linears: Format of the linear layers.
        head: Format of the head. None for an engine without one.
        bytes: Size of weights and scales.
        largest_error: Largest relative error of a weight, before it was fitted to text.
        kept: Number of tensors with the bits that they had in the checkpoint.
        kinds: Number of these by the name of their format in the checkpoint file, if known.
    """

    engine: str
    linears: TensorFormat
    head: TensorFormat | None
    bytes: int
    largest_error: float
    kept: int = 0
    kinds: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundingData:
    """Text that 4-bit weights were fitted to.

    Attributes:
        texts: Lines of the file.
        tokens: Tokens of the decoder.
        sha256: Hash of the file.
    """

    texts: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Quantization:
    """How weights were quantized.

    Attributes:
        engines: Precision of each engine.
        higher: Weights with more bits.
        int8_range: Only in older bundles with int8 for a CPU.
        rounding_data: Text that weights were fitted to. Default: none.
    """

    engines: tuple[EnginePrecision, ...] = ()
    higher: tuple[HigherTensor, ...] = ()
    int8_range: Literal["full", "reduced"] | None = None
    rounding_data: RoundingData | None = None
