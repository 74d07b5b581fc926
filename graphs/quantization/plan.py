"""Which format the weights of each engine get at a precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from graphs.description import Description, Encoder
from graphs.exit_head import ADAPTER_DOWN, ADAPTER_UP
from runtime.manifest import Precision
from runtime.precision import HeadPrecision, TensorFormat


@dataclass(frozen=True)
class Plan:
    """Formats of linear layers: `prompt` in encoder and prologue, which run many rows at once; the two decoders'; and
    `head`, of both."""

    prompt: TensorFormat
    shallow: TensorFormat
    deep: TensorFormat
    head: TensorFormat

    def linears(self, engine: str) -> TensorFormat:
        formats = {"shallow": self.shallow, "deep": self.deep}
        return formats.get(engine, self.prompt)

    def wanted(self, engine: str, description: Description, head: str) -> Callable[[str], TensorFormat]:
        """The format of a weight by its name, for one engine; `head` is the name of the weight of its head."""
        linears = self.linears(engine)
        # What comes out of an MLP's activation has outliers, which spoil a scale that a whole row shares.
        downs = _downs(description) if linears == "int8" else frozenset()

        def format_of(weight: str) -> TensorFormat:
            if weight in (ADAPTER_DOWN, ADAPTER_UP):
                return "fp32"
            if weight == head:
                return self.head
            return "int8-block" if weight in downs else linears

        return format_of


# 4 bits are the fastest for one row, 8 bits by row for several; a head of 4 bits costs the most quality
# (docs/precision.md).
PLANS: dict[Precision, Plan] = {
    "int8": Plan("int8", "int8", "int8", "int8-block"),
    "int4": Plan("int8", "int4", "int4", "int8-block"),
    "mixed": Plan("int8", "int4", "int8", "int8-block"),
}


def plan_for(precision: Precision, head: HeadPrecision | None) -> Plan | None:
    """None for a precision that rounds nothing."""
    plan = PLANS.get(precision)
    return replace(plan, head="int4") if plan is not None and head == "int4" else plan


def _downs(description: Description) -> frozenset[str]:
    encoder = description.encoder
    layers = description.decoder.layers + (encoder.layers if isinstance(encoder, Encoder) else ())
    return frozenset(layer.mlp.down.weight for layer in layers)
