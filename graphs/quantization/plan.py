"""Plans the format that each engine's weights get at a precision, and their operators."""

from __future__ import annotations

from dataclasses import dataclass, replace

from graphs.description import Description
from graphs.quantization.passes import OrtProducts, PackedProducts, Products, WidenedProducts
from graphs.quantization.rounding import IntegerScheme, Scheme, SymmetricScheme
from runtime.bundle.manifest import HeadPrecision, Kernels, Precision, Target, TensorFormat


@dataclass(frozen=True)
class Plan:
    """Formats of linear layers: `prompt` in encoder and prologue, which run many rows at once; the two decoders'; and
    `head`, of both."""

    prompt: TensorFormat
    shallow: TensorFormat
    deep: TensorFormat
    head: TensorFormat

    def linears(self, engine: str) -> TensorFormat:
        formats = {"shallow": self.shallow, "exit": self.shallow, "deep": self.deep}
        return formats.get(engine, self.prompt)


@dataclass(frozen=True)
class Rounding:
    """How a target has weights rounded: plans by precision, the scheme, and the products that read them. `embedding`:
    the table that tokens are looked up in is rounded too."""

    plans: dict[Precision, Plan]
    scheme: Scheme
    products: Products
    embedding: bool = False

    def plan(self, precision: Precision, head: HeadPrecision | None) -> Plan | None:
        """None for a precision that rounds nothing."""
        plan = self.plans.get(precision)
        if plan is None or head is None:
            return plan
        return replace(plan, head="int4" if head == "int4" else self.plans["int8"].head)


# On a CPU activations are rounded as well. Blocks, as sums of whole rows saturate on processors without 8-bit dot
# products; a head of 4 bits costs the most quality (docs/precision.md).
_BLOCKS: dict[Precision, Plan] = {
    "int8": Plan("int8-block", "int8-block", "int8-block", "int8-block"),
    "int4": Plan("int8-block", "int4", "int4", "int8-block"),
}
_CPU = Rounding(
    {**_BLOCKS, "mixed": Plan("int8-block", "int4", "int8-block", "int8-block")}, IntegerScheme(), OrtProducts(), True
)
_CPU_OWN = replace(_CPU, scheme=IntegerScheme(offsets=True), products=PackedProducts())
# Of quantized weights MatMulNBits alone has a kernel there that reads them as they are.
_CUDA = Rounding(_BLOCKS, IntegerScheme(blocks=()), OrtProducts(rounds_activations=False))
_TENSORRT = Rounding(
    {
        "int8": Plan("int8", "int8", "int8", "int8"),
        "fp8": Plan("fp8", "fp8", "fp8", "fp8"),
        "int4": Plan("int8", "int4", "int4", "int8"),
    },
    SymmetricScheme(),
    WidenedProducts(),
)
ROUNDING: dict[Target, Rounding] = {"cpu": _CPU, "cuda": _CUDA, "tensorrt": _TENSORRT}


def shared_values(description: Description) -> frozenset[str]:
    """Value projections that several heads share: 3 % of the weights of SmolLM2, and a quarter of what 4 bits lose."""
    decoder = description.decoder
    attentions = [layer.attention for layer in (*decoder.layers, *decoder.exit_layers)]
    return frozenset(each.value.weight for each in attentions if 2 * each.kv_heads <= each.heads)


def rounding(target: Target, kernels: Kernels) -> Rounding:
    """How weights are quantized for these operators."""
    return _CPU_OWN if kernels == "freeexport" else ROUNDING[target]
