"""Options of engines, and which go together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from graphs.description import Description, ForeignEncoder
from graphs.dialects.ort import fits_head_size, has_attention_kernel, misfit
from graphs.errors import GraphError
from graphs.exit_head import ADAPTER_DOWN, ADAPTER_UP, EXIT_MAP
from graphs.quantization.plan import ROUNDING, Plan, rounding, shared_values
from runtime.bundle.costs import MAX_PENDING
from runtime.bundle.manifest import (
    ConfidenceMeasure,
    FloatType,
    HeadPrecision,
    Kernels,
    Precision,
    Target,
    TensorFormat,
)
from runtime.bundle.manifest import Dialect as DialectName

# The dialect that a target needs, None for either, and its precisions, the first its default. ONNX Runtime's CUDA
# provider has no lengths of queries in GroupQueryAttention; TensorRT has no kernel for fp32 attention.
TARGETS: dict[Target, tuple[DialectName | None, tuple[Precision, ...]]] = {
    "cpu": (None, ("fp32", "int8", "int4", "mixed", "fp16")),
    "cuda": ("standard", ("fp16", "bf16", "fp32", "int8", "int4")),
    "tensorrt": ("standard", ("fp16", "bf16", "int8", "fp8", "int4")),
}
FLOAT_TYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class EngineOptions:
    """Options of engines. GraphError where a value is out of range. `compute` is the type of activations where weights
    are quantized for a GPU, None for its first. `kernels`: whose operators multiply with quantized weights on a CPU."""

    exit_layer: int
    capacity: int
    max_pending: int = MAX_PENDING
    precision: Precision = "fp32"
    dialect: DialectName = "ort"
    confidence: ConfidenceMeasure = "softmax"
    head: HeadPrecision | None = None
    target: Target = "cpu"
    compute: FloatType | None = None
    kernels: Kernels = "onnxruntime"

    def check(self, description: Description) -> None:
        layers = len(description.decoder.layers)
        first = 0 if description.exit_engine else 1
        if not first <= self.exit_layer < layers:
            raise GraphError(
                f"exit layer {self.exit_layer} is out of range; this model has {layers} decoder layers, "
                f"choose {first} to {layers - 1}"
            )
        limit = description.decoder.max_positions
        if self.capacity < 1 or (limit is not None and self.capacity > limit):
            raise GraphError(f"capacity {self.capacity} is out of range; choose 1 to {limit or 'any length'}")
        if not 1 <= self.max_pending <= 256:
            raise GraphError(f"max_pending {self.max_pending} is out of range; choose 1 to 256")
        if self.head is not None and self.plan is None:
            rounding = ", ".join(ROUNDING[self.target].plans)
            raise GraphError(f"precision {self.precision} rounds nothing; --head {self.head} goes with {rounding}")
        if self.dialect != "ort" and self.target == "cpu" and self.plan is not None:
            needs = f"precision {self.precision} needs operators of ONNX Runtime"
            if fits_head_size(description.attention):
                raise GraphError(f"{needs}; choose --dialect ort, or fp32 or fp16")
            instead = "--kernels freeexport or " if has_attention_kernel(description.attention) else ""
            raise GraphError(f"{needs}, but {misfit(description.attention)}; choose {instead}--precision fp32")
        if self.kernels == "freeexport" and (self.plan is None or self.target != "cpu"):
            raise GraphError(
                f"--kernels freeexport is for weights that are quantized for a CPU, not for precision {self.precision} "
                f"of target {self.target}; leave it out"
            )
        if description.exit_engine and not self.packed:
            raise GraphError(
                f"an exit that reads a feature needs dialect ort and target cpu, not {self.dialect} and {self.target}; "
                "train one with --exit-input state, or convert it for a CPU"
            )
        self._check_target(description)
        if self.dialect == "ort" and not self.own_attention(description) and not fits_head_size(description.attention):
            raise GraphError(f"{misfit(description.attention)}; choose --dialect standard")

    def _check_target(self, description: Description) -> None:
        dialect, precisions = TARGETS[self.target]
        if self.target != "cpu" and isinstance(description.encoder, ForeignEncoder):
            raise GraphError(
                f"target {self.target} is not for {description.family}, whose encoder is exported from its own code; "
                "choose --target cpu"
            )
        if self.target == "tensorrt" and description.attention.softcap is not None:
            raise GraphError("target tensorrt has no attention with attn_logit_softcapping; choose --target cuda")
        if dialect is not None and self.dialect != dialect:
            raise GraphError(f"target {self.target} needs dialect {dialect}, not {self.dialect}; leave --dialect out")
        if self.precision not in precisions:
            raise GraphError(
                f"target {self.target} has no precision {self.precision}; choose --precision {' or '.join(precisions)}"
            )
        types = [name for name in TARGETS[self.target][1] if name in FLOAT_TYPES]
        if self.compute is not None and (self.plan is None or self.target == "cpu"):
            raise GraphError(
                f"--compute {self.compute} is for weights that are quantized for a GPU, not for precision "
                f"{self.precision} of target {self.target}; leave it out"
            )
        if self.compute not in (None, *types):
            raise GraphError(f"target {self.target} does not compute in {self.compute}; choose {' or '.join(types)}")

    def own_attention(self, description: Description) -> bool:
        """Whether decoders have our own attention, which gives a row the same bits in every call."""
        return self.kernels == "freeexport" and has_attention_kernel(description.attention)

    def cache_type(self, description: Description) -> FloatType:
        """The type of keys and values, which our own attention reads in half the bytes."""
        return "fp16" if self.own_attention(description) else self.float_type

    @property
    def packed(self) -> bool:
        """Whether the deep engine computes the rows of a call that count only."""
        return self.dialect == "ort"

    @property
    def plan(self) -> Plan | None:
        """How weights are quantized; None where they are not."""
        return rounding(self.target, self.kernels).plan(self.precision, self.head)

    def wanted(self, description: Description, engine: str, head: str) -> Callable[[str], TensorFormat]:
        """The format of a quantized weight by its name, for one engine; `head` is the name of its head's weight."""
        plan, own = self.plan, rounding(self.target, self.kernels).products.own
        assert plan is not None
        # The whole residual stream goes through the one, and errors of the others are those of several heads.
        higher = {EXIT_MAP, *(shared_values(description) if own else ())}

        def format_of(weight: str) -> TensorFormat:
            if weight in (ADAPTER_DOWN, ADAPTER_UP):
                return "fp32"
            if weight in higher:
                return plan.prompt
            return plan.head if weight == head else plan.linears(engine)

        return format_of

    def keeps_file_bits(self, of_head: bool = False) -> bool:
        """Whether a weight that a file has in 4 to 8 bits stays in them: at int4 with our own operators; a head whose
        format was asked for is given that."""
        return self.kernels == "freeexport" and self.precision == "int4" and not (of_head and self.head is not None)

    @property
    def float_type(self) -> FloatType:
        """The type of activations, and of weights that are not quantized."""
        if self.precision in ("fp32", "fp16", "bf16"):
            return self.precision
        return "fp32" if self.target == "cpu" else self.compute or "fp16"
