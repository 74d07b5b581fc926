"""Older bundles whose 8-bit weights this processor would compute wrongly are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from handmade_bundle import write_bundle

from runtime import Session
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import EnginePrecision, Quantization
from runtime.errors import EngineError
from runtime.machine.machine import check_saturation

BY_ROW = Quantization((EnginePrecision("deep", "int8", None, 1, 0.01),), int8_range="full")
BLOCKS = replace(BY_ROW, engines=(replace(BY_ROW.engines[0], linears="int8-block"),))
Processor = Callable[[str], None]


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Processor:
    """Sets what /proc/cpuinfo says."""

    def write(text: str) -> None:
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr("runtime.machine.machine._CPUINFO", str(tmp_path / "cpuinfo"))

    return write


def written(tmp_path: Path, quantization: Quantization, **fields: Any) -> Path:
    return write_bundle(tmp_path / "bundle", precision="int8", quantization=quantization, **fields)


def test_weights_by_row_of_the_full_range_are_refused_without_dot_products(
    processor: Processor, tmp_path: Path
) -> None:
    processor("processor : 0\nflags\t\t: fpu sse2 avx2 fma\nflags : none\n")
    with pytest.raises(EngineError, match=r"processor with 8-bit dot products .*convert the checkpoint again"):
        Session(written(tmp_path, BY_ROW))


@pytest.mark.parametrize(
    "flags", ["flags : avx2 avx512f avx512_vnni\n", "flags : avx2 avx_vnni\n", "Features : fp asimd asimddp\n", ""]
)
def test_they_run_where_sums_do_not_saturate_and_where_the_system_does_not_say(
    flags: str, processor: Processor, tmp_path: Path
) -> None:
    processor(flags)
    check_saturation(Bundle.open(written(tmp_path, BY_ROW)).manifest)


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization": replace(BY_ROW, int8_range="reduced")},
        {"quantization": BLOCKS},
        {"quantization": replace(BLOCKS, int8_range=None)},
        {"quantization": BY_ROW, "target": "tensorrt", "dialect": "standard"},
    ],
    ids=["reduced", "blocks", "today", "widened"],
)
def test_other_bundles_run_everywhere(fields: dict[str, Any], processor: Processor, tmp_path: Path) -> None:
    processor("flags : avx2\n")
    check_saturation(Bundle.open(written(tmp_path, **fields)).manifest)
