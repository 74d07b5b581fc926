"""Options of engines and their valid combinations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from graphs.description import Description
from graphs.dialects.ort import (
    fits_fused_attention,
    fits_head_size,
    has_attention_kernel,
    misfit,
)
from graphs.errors import GraphError
from graphs.exit_head import EXIT_MAP
from graphs.quantization.plan import (
    FLOAT_PLANS,
    ROUNDING,
    FormatPlan,
    Rounding,
    rounding_for,
    shared_values,
)
from runtime.bundle.costs import MAX_PENDING
from runtime.bundle.manifest import (
    ACTIVATION_KERNELS,
    FLOAT_KERNELS,
    PROMPT_KERNELS,
    Activations,
    CacheType,
    ChosenCache,
    ConfidenceMeasure,
    FloatType,
    HeadPrecision,
    Kernels,
    Precision,
    Target,
)
from runtime.bundle.manifest import Dialect as DialectName
from runtime.bundle.quantization import TensorFormat

# Required dialect (None: any) and precisions of each target, the default first. ONNX Runtime's CUDA
# provider has no query lengths in GroupQueryAttention. TensorRT has no attention in fp32.
TARGETS: dict[Target, tuple[DialectName | None, tuple[Precision, ...]]] = {
    "cpu": (None, ("fp32", "int8", "int4", "mixed", "fp16")),
    "cuda": ("standard", ("fp16", "bf16", "fp32", "int8", "int4")),
    "tensorrt": ("standard", ("fp16", "bf16", "int8", "fp8", "int4")),
}
FLOAT_TYPES = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}
CACHE_TYPES = {**FLOAT_TYPES, "int8": ir.DataType.INT8}


@dataclass(frozen=True)
class EngineOptions:
    """Options for the engines of a bundle.

    Attributes:
        exit_layer: Number of decoder layers before the exit.
        capacity: Most valid positions of a KV cache.
        max_pending: Most rows of a sync pass, 1 to 256.
        precision: Format of the weights.
        dialect: ONNX operators of the graphs.
        confidence: Confidence measure of the shallow prediction.
        head: Format of the LM head if weights are quantized. Default: chosen by `precision`.
        target: Device that the graphs are built for.
        compute: Type of activations if weights are quantized for a GPU. Default: fp16.
        kernels: Operators that multiply with quantized weights on a CPU: those of ONNX Runtime or
            of this project.
        kv_cache: Type of the KV cache. Default: that of the attention operators.
        activations: Type that activations are quantized to in products with quantized weights.
    """

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
    kv_cache: ChosenCache | None = None
    activations: Activations = "int8"

    def check(self, description: Description) -> None:
        """Check the options for a model.

        Raises:
            GraphError: If a value is out of range, or two options do not go together.
        """
        layers = len(description.decoder.layers)
        first = 0 if description.exit_engine else 1
        if not first <= self.exit_layer < layers:
            raise GraphError(
                f"exit layer {self.exit_layer} is out of range; "
                f"this model has {layers} decoder layers, choose {first} to {layers - 1}"
            )
        limit = description.decoder.max_positions
        if self.capacity < 1 or (limit is not None and self.capacity > limit):
            raise GraphError(
                f"capacity {self.capacity} is out of range; choose 1 to {limit or 'any length'}"
            )
        if not 1 <= self.max_pending <= 256:
            raise GraphError(f"max_pending {self.max_pending} is out of range; choose 1 to 256")
        if self.head is not None and self.precision in FLOAT_TYPES:
            quantized = " or ".join(ROUNDING[self.target].plans)
            raise GraphError(
                f"precision {self.precision} does not quantize weights, so --head {self.head} has "
                f"no effect; choose --precision {quantized}, or leave --head out"
            )
        if self.dialect != "ort" and self.target == "cpu" and self.plan is not None:
            needs = f"precision {self.precision} needs operators of ONNX Runtime"
            if fits_head_size(description.attention):
                raise GraphError(f"{needs}; choose --dialect ort, or fp32 or fp16")
            supported = has_attention_kernel(description.attention)
            instead = "--kernels freeexport or " if supported else ""
            reason = misfit(description.attention)
            raise GraphError(f"{needs}, but {reason}; choose {instead}--precision fp32")
        if self.kernels == "freeexport" and (self.plan is None or self.target != "cpu"):
            raise GraphError(
                "--kernels freeexport is for precisions of a CPU, "
                f"not for precision {self.precision} of target {self.target}; leave it out"
            )
        self._check_target(description)
        fits = self.own_attention(description) or fits_head_size(description.attention)
        if self.dialect == "ort" and not fits:
            raise GraphError(f"{misfit(description.attention)}; choose --dialect standard")
        if self.in_floats:
            self._check_floats(description)
        if self.activations != "int8":
            self._check_quantized(f"--activations {self.activations}")
        if self.kv_cache is not None:
            self._check_cache(description)

    def _check_floats(self, description: Description) -> None:
        if not self.own_attention(description):
            raise GraphError(
                f"--kernels freeexport does not support the attention of {description.family} with "
                f"precision {self.precision}; leave it out"
            )

    def _check_quantized(self, option: str) -> None:
        if self.kernels != "freeexport" or self.in_floats:
            raise GraphError(
                f"{option} needs freeexport's own kernels and quantized weights (--precision int8, "
                f"int4 or mixed on a CPU), not precision {self.precision} of target {self.target} "
                f"with kernels of {self.kernels}; leave it out"
            )

    def _check_cache(self, description: Description) -> None:
        option = f"--kv-cache {self.kv_cache}"
        self._check_quantized(option)
        if not has_attention_kernel(description.attention):
            raise GraphError(
                f"{option} needs attention heads whose size is a multiple of 8, from 16 on, not "
                f"{description.attention.head_dim}; leave it out"
            )
        if not self.own_attention(description):
            raise GraphError(
                f"{option} does not support the attention of {description.family}; leave it out"
            )

    def _check_target(self, description: Description) -> None:
        dialect, precisions = TARGETS[self.target]
        if self.target == "tensorrt" and description.attention.softcap is not None:
            raise GraphError(
                "target tensorrt does not support attn_logit_softcapping; choose --target cuda"
            )
        if self.target != "cpu" and description.exit_input == "eagle3":
            raise GraphError(
                f"target {self.target} does not support EAGLE-3 heads; choose --target cpu"
            )
        if dialect is not None and self.dialect != dialect:
            raise GraphError(
                f"target {self.target} needs dialect {dialect}, "
                f"not {self.dialect}; leave --dialect out"
            )
        if self.precision not in precisions:
            choices = " or ".join(precisions)
            raise GraphError(
                f"target {self.target} has no precision {self.precision}; "
                f"choose --precision {choices}"
            )
        types = [name for name in precisions if name in FLOAT_TYPES]
        if self.compute is not None and (self.plan is None or self.target == "cpu"):
            raise GraphError(
                f"--compute {self.compute} is for weights that are quantized for a GPU, "
                f"not for precision {self.precision} of target {self.target}; leave it out"
            )
        if self.compute not in (None, *types):
            choices = " or ".join(types)
            raise GraphError(
                f"target {self.target} does not compute in {self.compute}; choose {choices}"
            )

    def own_attention(self, description: Description) -> bool:
        """Return True if decoders use this project's attention kernels."""
        layers = description.decoder.layers
        if any(layer.joined for layer in layers):
            return False
        # No operator caps scores and reads a prompt's keys in fp32.
        capped = any(layer.cross is not None and layer.cross.softcap for layer in layers)
        if capped and self.precision == "fp32":
            return False
        return self.kernels == "freeexport" and has_attention_kernel(description.attention)

    def shares_prompts(self, description: Description) -> bool:
        """Return True if neighboring sequences can share the keys and values of one prompt."""
        if self.own_attention(description):
            return True
        return self.dialect == "ort" and all(
            layer.cross is None or (not layer.joined and fits_fused_attention(layer.cross))
            for layer in description.decoder.layers
        )

    def cache_type(self, description: Description) -> CacheType:
        """Return the type of keys and values. Our kernels read fp16, int8, or in fp32 fp32."""
        halves = self.own_attention(description) and self.precision != "fp32"
        return self.kv_cache or ("fp16" if halves else self.float_type)

    def kernels_version(self, description: Description) -> int | None:
        """Return the version of our operators that the graphs need. None: only ONNX Runtime's."""
        if self.kernels != "freeexport":
            return None
        prompts = description.encoder is not None and self.own_attention(description)
        if prompts and self.cache_type(description) != "fp32":
            return PROMPT_KERNELS
        if self.in_floats:
            return FLOAT_KERNELS
        return ACTIVATION_KERNELS[self.activations]

    @property
    def in_floats(self) -> bool:
        """True if this project's operators read weights that are not quantized."""
        return self.kernels == "freeexport" and self.precision in FLOAT_PLANS

    @property
    def packed(self) -> bool:
        """True if the deep engine computes rows without padding."""
        return self.dialect == "ort"

    @property
    def plan(self) -> FormatPlan | None:
        """Formats of weights that are quantized or in panels. None if weights are neither."""
        return self.rounding.plan(self.precision, self.head)

    @property
    def rounding(self) -> Rounding:
        """How weights are rounded."""
        return rounding_for(self.target, self.kernels, self.precision, self.activations)

    def wanted(
        self,
        description: Description,
        engine: str,
        head: str,
    ) -> Callable[[str], TensorFormat]:
        """Return a function from the name of a weight to the format it is quantized to.

        Args:
            engine: Name of the engine that reads the weights.
            head: Name of that engine's head weight.
        """
        plan = self.plan
        assert plan is not None
        # The exit map carries the whole residual stream, and shared values serve several heads.
        fusion = description.decoder.exit_fusion
        higher = {EXIT_MAP if fusion is None else fusion.linear.weight}
        higher |= {*(shared_values(description) if self.kernels == "freeexport" else ())}

        def format_of(weight: str) -> TensorFormat:
            if weight in higher:
                return plan.prompt
            return plan.head if weight == head else plan.linears(engine)

        return format_of

    def keeps_file_bits(self, of_head: bool = False) -> bool:
        """Return True if weights that a checkpoint file stores in 4 to 8 bits keep their bits.

        They do at int4, fp32 and fp16 with this project's kernels, except for a head whose format
        was set.
        """
        if of_head and self.head is not None:
            return False
        return self.in_floats or (self.kernels == "freeexport" and self.precision == "int4")

    @property
    def float_type(self) -> FloatType:
        """Type of activations and of weights that are not quantized."""
        if self.precision in ("fp32", "fp16", "bf16") and not self.in_floats:
            return self.precision
        return "fp32" if self.target == "cpu" else self.compute or "fp16"
