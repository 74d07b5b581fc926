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
    Activations,
    ChosenCache,
    ConfidenceMeasure,
    Dialect,
    FloatType,
    HeadPrecision,
    Kernels,
    Precision,
    Target,
)
from runtime.engines.kernels import instructions, missing
from runtime.errors import OptionError

# Long enough for most uses, while keeping a slot of the KV cache small.
DEFAULT_CAPACITY = 2048
DEFAULT_ENCODER_CAPACITY = 2048

NO_PHRASES = "none"  # in place of a file

# Extent of the checks that compare a new bundle with its checkpoint.
Verify = Literal["quick", "full", "none"]


@dataclass(frozen=True)
class ConvertOptions:
    """Options of `freeexport convert`, which freeexport/commands/convert.py describes.

    Two more are set by callers only: `max_pending`, the maximum number of rows in a sync pass, and
    `measure`, to measure the costs of the engines.

    Raises:
        OptionError: If a file is missing.
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
    kv_cache: ChosenCache | None = None
    activations: Activations = "int8"
    calibration: Path | None = None
    rounding_data: Path | None = None
    phrases: str | None = None
    verify: Verify = "quick"
    measure: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        files = {
            "--calibration": self.calibration,
            "--quantization-data": self.rounding_data,
            "--phrases": None if self.phrases == NO_PHRASES else self.phrases,
        }
        for option, path in files.items():
            if path is not None and not Path(path).is_file():
                raise OptionError(f"{option} {path}: there is no such file; name another")
        if self.encoder_capacity is not None and self.encoder_capacity < 1:
            raise GraphError(
                f"encoder capacity {self.encoder_capacity} is out of range; choose 1 or more"
            )

    def max_prompt_tokens(self, description: Description) -> int:
        """Return the longest prompt of an encoder-decoder, in tokens. 0 if it is decoder-only."""
        encoder = description.encoder
        if encoder is None:
            return 0
        limit = None
        if isinstance(encoder, EncoderStack):
            positions = encoder.embedding.positions
            limit = encoder.max_positions if positions is None else positions.count
        given = self.encoder_capacity
        if description.spectrogram is not None and given not in (None, limit):
            raise GraphError(
                f"encoder capacity {given} is not the {limit} positions of a window of speech; "
                "leave it out"
            )
        if given is not None and limit is not None and given > limit:
            raise GraphError(f"encoder capacity {given} is out of range; choose 1 to {limit}")
        return given or min(DEFAULT_ENCODER_CAPACITY, limit or DEFAULT_ENCODER_CAPACITY)


def _fits_own_floats(description: Description, options: ConvertOptions) -> bool:
    """Return True if our kernels are available and fast, and read this model's floats."""
    precision = options.precision or "fp32"
    engines = EngineOptions(exit_layer=1, capacity=1, precision=precision, kernels="freeexport")
    return (
        options.target == "cpu"
        and engines.in_floats
        and options.dialect != "standard"
        and missing() is None
        and not instructions().startswith("scalar")
        and engines.own_attention(description)
    )


def engine_options(
    description: Description, options: ConvertOptions, exit_layer: int
) -> EngineOptions:
    """Return the options of the engines, with the defaults of the model and the target.

    Raises:
        GraphError: If an option is out of range.
        OptionError: If text for rounding is given but no weight gets 4 bits on a CPU, or if the
            type of the KV cache or of activations needs kernels that are not available.
    """
    limit = description.decoder.max_positions or DEFAULT_CAPACITY
    attention = description.attention
    dialect, precisions = TARGETS[options.target]
    precision = options.precision or precisions[0]
    # Use our kernels on a CPU, if their library is available here.
    quantized = options.target == "cpu" and precision in ROUNDING["cpu"].plans
    problem = missing() if quantized and options.kernels is None else None
    if problem is not None and options.kv_cache is not None:
        raise OptionError(f"--kv-cache {options.kv_cache}: {problem}; or leave it out")
    if problem is not None and options.activations != "int8":
        raise OptionError(f"--activations {options.activations}: {problem}; or leave it out")
    kernels = options.kernels or ("freeexport" if quantized and problem is None else "onnxruntime")
    if options.kernels is None and not quantized and _fits_own_floats(description, options):
        kernels = "freeexport"
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
        kv_cache=options.kv_cache,
        activations=options.activations,
    )
    engines.check(description)
    plan = engines.plan
    in_4_bits = plan is not None and "int4" in (plan.shallow, plan.deep, plan.head)
    if options.rounding_data is not None and (engines.target != "cpu" or not in_4_bits):
        raise OptionError(
            "--quantization-data is for weights in 4 bits on a CPU (--precision int4 or mixed, or "
            f"--head int4), not for precision {engines.precision} of target {engines.target}; "
            "leave it out"
        )
    return engines
