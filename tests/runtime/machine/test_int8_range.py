"""Bundles whose 8-bit weights this processor would compute wrongly are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import CASES
from conftest import Bundles

from runtime import Session
from runtime.bundle.bundle import Bundle
from runtime.bundle.precision import Int8Range
from runtime.errors import EngineError
from runtime.machine.machine import check_int8_range, machine_int8_range

LLAMA = next(case for case in CASES if case.name == "llama-tied")
Processor = Callable[[str], None]


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Processor:
    """Sets what /proc/cpuinfo says."""

    def write(text: str) -> None:
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr("runtime.machine.machine._CPUINFO", str(tmp_path / "cpuinfo"))

    return write


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu sse2 avx2 fma\nflags : none\n", "reduced"),
        ("flags : avx2 avx512f avx512_vnni\n", "full"),
        ("flags : avx2 avx_vnni\n", "full"),
        ("Features : fp asimd asimddp\n", "full"),
        ("", "full"),
    ],
)
def test_the_range_follows_the_processor(text: str, expected: Int8Range, processor: Processor) -> None:
    processor(text)
    assert machine_int8_range() == expected


def test_a_system_that_does_not_say_has_the_full_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.machine.machine._CPUINFO", "/nowhere/cpuinfo")
    assert machine_int8_range() == "full"


def test_a_bundle_of_the_full_range_is_refused_without_dot_products(bundle: Bundles, processor: Processor) -> None:
    path = bundle(LLAMA, 1, precision="int8", int8_range="full")
    processor("flags : avx2\n")
    with pytest.raises(EngineError, match=r"processor with 8-bit dot products .*--int8-range reduced"):
        Session(path)
    processor("flags : avx2 avx512_vnni\n")
    Session(path).close()


@pytest.mark.parametrize("options", [{"precision": "int8", "int8_range": "reduced"}, {}])
def test_other_bundles_run_everywhere(options: dict[str, str], bundle: Bundles, processor: Processor) -> None:
    processor("flags : avx2\n")
    manifest = Bundle.open(bundle(LLAMA, 1, **options)).manifest
    check_int8_range(manifest)
    check_int8_range(replace(manifest, quantization=None))


def test_auto_is_the_range_of_the_machine_that_converts(bundle: Bundles, processor: Processor) -> None:
    processor("flags : avx2\n")
    quantization = Bundle.open(bundle(LLAMA, 2, precision="int4", int8_range="auto")).manifest.quantization
    assert quantization is not None
    assert quantization.int8_range == "reduced"
