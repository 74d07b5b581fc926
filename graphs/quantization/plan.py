"""Which format the weights of each engine get at a precision, and how they are rounded and multiplied with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir

from graphs.description import Description, Encoder
from graphs.exit_head import ADAPTER_DOWN, ADAPTER_UP
from graphs.quantization.fusion import FuseProducts
from graphs.quantization.linears import Products
from graphs.quantization.ort_products import OrtProducts
from graphs.quantization.packed_products import PackedProducts, packed
from graphs.quantization.quantizer import Layout, as_rounded
from graphs.quantization.scheme import IntegerScheme, Scheme, SymmetricScheme
from graphs.quantization.widened_products import WidenedProducts
from runtime.bundle.manifest import Precision, Target
from runtime.bundle.precision import HeadPrecision, Int8Layout, Int8Range, Kernels, TensorFormat


@dataclass(frozen=True)
class Plan:
    """Formats of linear layers: `prompt` in encoder and prologue, which run many rows at once; the two decoders'; and
    `head`, of both. `downs`: of what reads an MLP's activation, where others are "int8" and it is not."""

    prompt: TensorFormat
    shallow: TensorFormat
    deep: TensorFormat
    head: TensorFormat
    downs: TensorFormat | None = None

    def linears(self, engine: str) -> TensorFormat:
        formats = {"shallow": self.shallow, "deep": self.deep}
        return formats.get(engine, self.prompt)

    def wanted(self, engine: str, description: Description, head: str) -> Callable[[str], TensorFormat]:
        """The format of a weight by its name, for one engine; `head` is the name of the weight of its head."""
        linears = self.linears(engine)
        downs = _downs(description) if linears == "int8" and self.downs else frozenset()

        def format_of(weight: str) -> TensorFormat:
            if weight in (ADAPTER_DOWN, ADAPTER_UP):
                return "fp32"
            if weight == head:
                return self.head
            return self.downs if self.downs and weight in downs else linears

        return format_of


@dataclass(frozen=True)
class Rounding:
    """How a target has weights rounded: plans by precision; what 8 bits of a head are; the scheme for a range of 8-bit
    weights and for exact rows or not; the products that read them, and the layout and scales that these want.
    `embedding`: the table that tokens are looked up in is rounded too. `layouts`: the decoders' 8 bits can stand in
    blocks as well as by row. `fusions`: passes over the graphs with these products."""

    plans: dict[Precision, Plan]
    head: TensorFormat
    scheme: Callable[[Int8Range, bool], Scheme]
    products: Callable[[ir.Graph], Products]
    embedding: bool = False
    layouts: bool = False
    layout: Layout = as_rounded
    scales: np.dtype | None = None
    fusions: tuple[type[ir.passes.InPlacePass], ...] = ()

    def plan(self, precision: Precision, head: HeadPrecision | None, layout: Int8Layout) -> Plan | None:
        """None for a precision that rounds nothing."""
        plan = self.plans.get(precision)
        if plan is None:
            return None
        if self.layouts and layout == "blocks":
            plan = replace(plan, shallow=_in_blocks(plan.shallow), deep=_in_blocks(plan.deep))
        return plan if head is None else replace(plan, head="int4" if head == "int4" else self.head)


# Activations are rounded as well. What comes out of an MLP's activation has outliers, which spoil a scale that a whole
# row shares. 4 bits are the fastest for one row, 8 bits in blocks follow, 8 bits by row are for many; a head of 4 bits
# costs the most quality (docs/precision.md).
_CPU = Rounding(
    {
        "int8": Plan("int8", "int8", "int8", "int8-block", "int8-block"),
        "int4": Plan("int8", "int4", "int4", "int8-block", "int8-block"),
        "mixed": Plan("int8", "int4", "int8", "int8-block", "int8-block"),
    },
    head="int8-block",
    scheme=lambda range_, exact: IntegerScheme(range_, exact_rows=exact),
    products=OrtProducts,
    embedding=True,
    layouts=True,
)
# Blocks of 8 bits are as fast for many rows, and every row gets the same bits in every call.
_CPU_OWN = Rounding(
    {
        "int8": Plan("int8-block", "int8-block", "int8-block", "int8-block"),
        "int4": Plan("int8-block", "int4", "int4", "int8-block"),
        "mixed": Plan("int8-block", "int4", "int8-block", "int8-block"),
    },
    head="int8-block",
    scheme=lambda range_, exact: IntegerScheme(by_row=False),
    products=PackedProducts,
    embedding=True,
    layout=packed,
    scales=np.dtype(np.float16),
    fusions=(FuseProducts,),
)
# Of quantized weights MatMulNBits alone has a kernel there that reads them as they are.
_CUDA = Rounding(
    {
        "int8": Plan("int8-block", "int8-block", "int8-block", "int8-block"),
        "int4": Plan("int8-block", "int4", "int4", "int8-block"),
    },
    head="int8-block",
    scheme=lambda range_, exact: IntegerScheme(by_row=False, blocks=()),
    products=partial(OrtProducts, rounds_activations=False),
)
_TENSORRT = Rounding(
    {
        "int8": Plan("int8", "int8", "int8", "int8"),
        "fp8": Plan("fp8", "fp8", "fp8", "fp8"),
        "int4": Plan("int8", "int4", "int4", "int8"),
    },
    head="int8",
    scheme=lambda range_, exact: SymmetricScheme(),
    products=WidenedProducts,
)
ROUNDING: dict[Target, Rounding] = {"cpu": _CPU, "cuda": _CUDA, "tensorrt": _TENSORRT}


def rounding(target: Target, kernels: Kernels) -> Rounding:
    """How weights are quantized for these operators."""
    return _CPU_OWN if kernels == "freeexport" else ROUNDING[target]


def _in_blocks(format_: TensorFormat) -> TensorFormat:
    return "int8-block" if format_ == "int8" else format_


def _downs(description: Description) -> frozenset[str]:
    encoder = description.encoder
    layers = description.decoder.layers + (encoder.layers if isinstance(encoder, Encoder) else ())
    return frozenset(layer.mlp.down.weight for layer in layers)
