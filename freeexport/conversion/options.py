"""Options of a conversion, and options of the engines derived from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from graphs.description import Description, EncoderStack
from graphs.dialects.ort import fits_head_size, has_attention_kernel
from graphs.engine_options import TARGETS, EngineOptions
from graphs.errors import GraphError
from graphs.quantization.plan import ROUNDING
from runtime.bundle.costs import MAX_PENDING
from runtime.bundle.manifest import (
    ConfidenceMeasure,
    Dialect,
    FloatType,
    HeadPrecision,
    Kernels,
    Precision,
    Target,
)
from runtime.errors import OptionError
from runtime.kernels import missing

# Long enough for most uses, while keeping a slot of the KV cache small.
DEFAULT_CAPACITY = 2048
DEFAULT_ENCODER_CAPACITY = 2048

# Extent of the checks that compare a new bundle with its checkpoint.
Verify = Literal["quick", "full", "none"]


@dataclass(frozen=True)
class ConvertOptions:
    """Options of a conversion.

    Attributes:
        exit_layer: Number of layers before the exit. Default: taken from exit.json next to the
            weights, or a third of the layers.
        exit: Name or file of a ready-made exit. Default: the checkpoint's own exit, if any.
        precision: Precision of the weights. Default: the target's first.
        dialect: Operators of the graphs. Default: the target's. On a CPU it is "ort" if its
            attention has a kernel for the model's heads, otherwise "standard".
        target: Target of the engines.
        confidence: Measure of the exit's confidence.
        capacity: Positions of the KV cache. Default: the model's limit, at most 2048.
        encoder_capacity: Longest prompt of an encoder-decoder. Default: the model's limit, at most
            2048.
        max_pending: Maximum number of rows in a sync pass.
        head: Precision of the head. Default: 8 bits if weights are quantized.
        compute: Type in which GPU engines with quantized weights compute. Default: fp16.
        kernels: Kernels for weights quantized for a CPU. Default: ours if their library is
            available.
        calibration: File of `freeexport calibrate` for this checkpoint. Default: the one beside the
            checkpoint, if any.
        rounding_data: Text that 4-bit weights are rounded for.
        verify: Extent of the verification.
        measure: Measure the costs of the engines.
        overwrite: Replace an existing bundle.

    Raises:
        OptionError: If a file is missing.
        GraphError: If the encoder capacity is below 1.
    """

    exit_layer: int | None = None
    exit: str | None = None
    precision: Precision | None = None
    dialect: Dialect | None = None
    target: Target = "cpu"
    confidence: ConfidenceMeasure = "softmax"
    capacity: int | None = None
    encoder_capacity: int | None = None
    max_pending: int = MAX_PENDING
    head: HeadPrecision | None = None
    compute: FloatType | None = None
    kernels: Kernels | None = None
    calibration: Path | None = None
    rounding_data: Path | None = None
    verify: Verify = "quick"
    measure: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        for option, path in (("--calibration", self.calibration), ("--data", self.rounding_data)):
            if path is not None and not path.is_file():
                raise OptionError(f"{option} {path}: there is no such file; name another")

        if self.encoder_capacity is not None and self.encoder_capacity < 1:
            raise GraphError(
                f"encoder capacity {self.encoder_capacity} is out of range; choose 1 or more"
            )

    def longest_prompt(self, description: Description) -> int:
        """Return the longest prompt of an encoder-decoder, in tokens. 0 for a decoder-only model.

        Raises:
            GraphError: If the capacity does not fit the encoder's positions.
        """
        encoder = description.encoder
        if encoder is None:
            return 0
        most = None
        if isinstance(encoder, EncoderStack):
            positions = encoder.embedding.positions
            most = encoder.max_positions if positions is None else positions.count
        given = self.encoder_capacity
        if description.spectrogram is not None and given not in (None, most):
            raise GraphError(
                f"encoder capacity {given} is not the {most} positions of a window of speech; "
                "leave it out"
            )
        if given is not None and most is not None and given > most:
            raise GraphError(f"encoder capacity {given} is out of range; choose 1 to {most}")
        return given or min(DEFAULT_ENCODER_CAPACITY, most or DEFAULT_ENCODER_CAPACITY)


def engine_options(
    description: Description, options: ConvertOptions, exit_layer: int
) -> EngineOptions:
    """Return the options of the engines, with the defaults of the model and the target.

    Raises:
        GraphError: If an option is out of range.
        OptionError: If text for rounding is given but no weight gets 4 bits on a CPU.
    """
    limit = description.decoder.max_positions or DEFAULT_CAPACITY
    attention = description.attention
    dialect, precisions = TARGETS[options.target]
    precision = options.precision or precisions[0]
    # Use our kernels for weights quantized for a CPU, if their library is available here.
    quantized = options.target == "cpu" and precision in ROUNDING["cpu"].plans
    kernels = options.kernels or (
        "freeexport" if quantized and missing() is None else "onnxruntime"
    )
    # Use fused operators if they or our kernels support the model's heads.
    fits = fits_head_size(attention) or (
        kernels == "freeexport" and has_attention_kernel(attention)
    )
    engines = EngineOptions(
        exit_layer=exit_layer,
        capacity=min(limit, DEFAULT_CAPACITY) if options.capacity is None else options.capacity,
        max_pending=options.max_pending,
        precision=precision,
        dialect=options.dialect or dialect or ("ort" if fits else "standard"),
        target=options.target,
        confidence=options.confidence,
        head=options.head,
        compute=options.compute,
        kernels=kernels,
    )
    engines.check(description)
    plan = engines.plan
    in_4_bits = plan is not None and "int4" in (plan.shallow, plan.deep, plan.head)
    if options.rounding_data is not None and (engines.target != "cpu" or not in_4_bits):
        raise OptionError(
            "--data is for weights in 4 bits on a CPU (--precision int4 or mixed, or --head int4), "
            f"not for precision {engines.precision} of target {engines.target}; leave it out"
        )
    return engines
