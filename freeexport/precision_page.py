"""The precision of a quantised bundle, as `inspect` shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freeexport.page import human_bytes, table

if TYPE_CHECKING:
    from rich.table import Table

    from runtime.bundle.precision import Quantization


def precision_table(quantization: Quantization) -> Table:
    """A row an engine."""
    rows = [
        (item.engine, item.linears, item.head or "", human_bytes(item.bytes), f"{item.largest_error:.1%}")
        for item in quantization.engines
    ]
    columns = ("engine", "linear layers", "head", "weights#", "largest error#")
    exact = ", exact rows" if quantization.exact_rows else ""
    return table(f"Precision (8-bit range: {quantization.int8_range}{exact})", columns, rows)


def higher_table(quantization: Quantization) -> Table:
    """A row a weight that stands higher than its engine, because it would lose too much."""
    rows = [(item.engine, item.tensor, item.wanted, item.stored, f"{item.error:.1%}") for item in quantization.higher]
    return table("Kept at a higher precision", ("engine", "tensor", "wanted", "stored", "error as wanted#"), rows)
