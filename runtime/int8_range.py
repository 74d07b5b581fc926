"""Whether this processor computes right with the range of a bundle's 8-bit weights."""

from __future__ import annotations

from runtime.errors import EngineError
from runtime.machine import machine_int8_range
from runtime.manifest import Manifest


def check_int8_range(manifest: Manifest) -> None:
    """EngineError where the bundle's 8-bit weights use the full range and sums of their products saturate here."""
    # Those for a GPU are widened before they are multiplied, wherever that is. Our own kernels do not saturate.
    quantization = manifest.quantization if manifest.target == "cpu" and manifest.kernels is None else None
    if quantization is not None and quantization.int8_range == "full" and machine_int8_range() == "reduced":
        raise EngineError(
            "this bundle's 8-bit weights need a processor with 8-bit dot products (VNNI), which this one lacks; "
            "convert with --int8-range reduced"
        )
