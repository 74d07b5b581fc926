"""Chooses formats and operators of quantized weights for a precision."""

from __future__ import annotations

from dataclasses import dataclass, replace

from graphs.description import Description
from graphs.quantization.passes import EXACT, OrtProducts, PackedProducts, Products, WidenedProducts
from graphs.quantization.rounding import IntegerScheme, Scheme, SymmetricScheme
from runtime.bundle.manifest import Activations, HeadPrecision, Kernels, Precision, Target
from runtime.bundle.quantization import TensorFormat


@dataclass(frozen=True)
class FormatPlan:
    """Formats of the linear layers of a bundle.

    Attributes:
        prompt: Encoder and prologue, which run many rows at once.
        shallow: Shallow decoder.
        deep: Deep decoder.
        head: Head of both decoders.
    """

    prompt: TensorFormat
    shallow: TensorFormat
    deep: TensorFormat
    head: TensorFormat

    def linears(self, engine: str) -> TensorFormat:
        """Return the format of an engine's linear layers."""
        formats = {"shallow": self.shallow, "exit": self.shallow, "deep": self.deep}
        return formats.get(engine, self.prompt)


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded for a target.

    Attributes:
        plans: Formats by precision. Those of floats are for operators that read weights in panels.
        scheme: Rounds weights to a format.
        products: Operators that multiply with rounded weights.
        embedding: Also round the table that tokens are looked up in.
    """

    plans: dict[Precision, FormatPlan]
    scheme: Scheme
    products: Products
    embedding: bool = False

    def plan(self, precision: Precision, head: HeadPrecision | None) -> FormatPlan | None:
        """Return the formats for a precision and a head format. None: weights are not rounded."""
        plan = self.plans.get(precision)
        if plan is None or head is None:
            return plan
        return replace(plan, head="int4" if head == "int4" else self.plans["int8"].head)


# CPU: activations are rounded as well. Weights are in blocks, because sums over whole rows saturate
# on processors without 8-bit dot products. A 4-bit head costs the most quality (docs/precision.md).
_BLOCKS: dict[Precision, FormatPlan] = {
    "int8": FormatPlan("int8-block", "int8-block", "int8-block", "int8-block"),
    "int4": FormatPlan("int8-block", "int4", "int4", "int8-block"),
}
_CPU = Rounding(
    {**_BLOCKS, "mixed": FormatPlan("int8-block", "int4", "int8-block", "int8-block")},
    IntegerScheme(),
    OrtProducts(),
    True,
)
FLOAT_PLANS: dict[Precision, FormatPlan] = {
    "fp32": FormatPlan("fp32", "fp32", "fp32", "fp32"),
    "fp16": FormatPlan("fp16", "fp16", "fp16", "fp16"),
}
_CPU_OWN = replace(_CPU, scheme=IntegerScheme(offsets=True), products=PackedProducts())
_CPU_WIDE = replace(_CPU_OWN, products=PackedProducts(activation_bits=16))
_CPU_FLOATS = replace(_CPU_OWN, plans=FLOAT_PLANS, products=PackedProducts(activation_bits=EXACT))
# MatMulNBits is the only CUDA kernel that reads quantized weights directly.
_CUDA = Rounding(_BLOCKS, IntegerScheme(blocks=()), OrtProducts(rounds_activations=False))
_TENSORRT = Rounding(
    {
        "int8": FormatPlan("int8", "int8", "int8", "int8"),
        "fp8": FormatPlan("fp8", "fp8", "fp8", "fp8"),
        "int4": FormatPlan("int8", "int4", "int4", "int8"),
    },
    SymmetricScheme(),
    WidenedProducts(),
)
ROUNDING: dict[Target, Rounding] = {"cpu": _CPU, "cuda": _CUDA, "tensorrt": _TENSORRT}


def shared_values(description: Description) -> frozenset[str]:
    """Return the value projections that several heads share.

    They hold 3 % of SmolLM2's weights and cause a quarter of the error of 4 bits.
    """
    decoder = description.decoder
    attentions = [layer.attention for layer in (*decoder.layers, *decoder.exit_layers)]
    return frozenset(each.value.weight for each in attentions if 2 * each.kv_heads <= each.heads)


def rounding_for(
    target: Target, kernels: Kernels, precision: Precision, activations: Activations
) -> Rounding:
    """Return how weights are rounded for a target, its kernels and a precision."""
    if kernels != "freeexport":
        return ROUNDING[target]
    if precision in FLOAT_PLANS:
        return _CPU_FLOATS
    return _CPU_WIDE if activations == "int16" else _CPU_OWN
