"""What a user decides about a bundle, and what its engines take from that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from graphs.description import Description
from graphs.dialects.ort import fits_head_size
from graphs.engine_options import TARGETS, EngineOptions
from graphs.errors import GraphError
from runtime.bundle.manifest import ConfidenceMeasure, Dialect, Precision, Target
from runtime.bundle.precision import FloatType, HeadPrecision, Int8Layout, Int8Range, Kernels
from runtime.errors import OptionError
from runtime.machine.machine import machine_int8_range

# Long enough for most uses, short enough that a slot of the KV cache is no surprise.
DEFAULT_CAPACITY, DEFAULT_ENCODER_CAPACITY = 2048, 2048


@dataclass(frozen=True)
class ConvertOptions:
    """What a user decides about a bundle. None for the exit layer is that of exit.json beside the weights; None for a
    capacity is the model's limit, at most 2048; None for precision and dialect is the target's own, for a CPU "ort"
    where its attention has a kernel for the model's heads, else "standard". `int8_range` "auto" is what this machine's
    processor takes; `int8_layout` "auto" is blocks where the range is full, and by row where it is not. None for `head`
    is 8 bits where weights are quantized. `compute` is what engines for a GPU with quantized weights compute in, None
    for fp16. `exact_rows`: rounded engines for a CPU give a row the same bits in every call. `kernels`: whose operators
    multiply with weights that are quantized for a CPU. `exit_vocab` is the file of `freeexport exit-vocab` for this
    checkpoint, `calibration` that of `freeexport calibrate`. OptionError where two do not go together; GraphError for
    an encoder capacity under 1."""

    exit_layer: int | None = None
    precision: Precision | None = None
    dialect: Dialect | None = None
    target: Target = "cpu"
    confidence: ConfidenceMeasure = "softmax"
    capacity: int | None = None
    encoder_capacity: int | None = None
    max_pending: int = 16
    int8_range: Int8Range | Literal["auto"] = "auto"
    int8_layout: Int8Layout | Literal["auto"] = "auto"
    head: HeadPrecision | None = None
    compute: FloatType | None = None
    exact_rows: bool = False
    kernels: Kernels = "onnxruntime"
    exit_vocab: Path | None = None
    calibration: Path | None = None
    verify: bool = True
    measure: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.exit_vocab is not None and self.calibration is not None:
            raise OptionError("the confidences of an exit vocabulary are others; convert, then calibrate the bundle")
        if self.int8_layout != "auto" and (self.target != "cpu" or self.precision not in ("int8", "mixed")):
            raise OptionError(
                f"--int8-layout {self.int8_layout} is of decoders in 8 bits for a CPU; give --precision int8 or mixed"
            )
        if self.kernels == "freeexport" and (self.int8_layout, self.int8_range) != ("auto", "auto"):
            raise OptionError(
                "--int8-layout and --int8-range are for ONNX Runtime's kernels; leave them out, or --kernels freeexport"
            )
        if self.longest_prompt < 1:
            raise GraphError(f"encoder capacity {self.encoder_capacity} is out of range; choose 1 or more")

    @property
    def longest_prompt(self) -> int:
        """Of an encoder-decoder, in tokens."""
        return DEFAULT_ENCODER_CAPACITY if self.encoder_capacity is None else self.encoder_capacity


def natural_dialect(description: Description) -> Dialect:
    """The fused operators, where they have a kernel for the model's heads."""
    return "ort" if fits_head_size(description.attention) else "standard"


def engine_options(description: Description, options: ConvertOptions, exit_layer: int) -> EngineOptions:
    """What the engines need of `options`, with the defaults of the model and the target."""
    limit = description.decoder.max_positions or DEFAULT_CAPACITY
    dialect, precisions = TARGETS[options.target]
    int8_range = machine_int8_range() if options.int8_range == "auto" else options.int8_range
    # Without 8-bit dot products, sums of whole rows are the faster ones.
    natural: Int8Layout = "blocks" if int8_range == "full" else "rows"
    return EngineOptions(
        exit_layer=exit_layer,
        capacity=min(limit, DEFAULT_CAPACITY) if options.capacity is None else options.capacity,
        max_pending=options.max_pending,
        precision=options.precision or precisions[0],
        dialect=options.dialect or dialect or natural_dialect(description),
        target=options.target,
        confidence=options.confidence,
        head=options.head,
        compute=options.compute,
        exact_rows=options.exact_rows,
        kernels=options.kernels,
        int8_range=int8_range,
        int8_layout=natural if options.int8_layout == "auto" else options.int8_layout,
    )
