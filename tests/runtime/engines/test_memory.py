"""Memory that closed sessions left to the heap is given back before another one opens."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from manifest_case import MANIFEST

from runtime.engines.memory import check_memory

STATM = Path("/proc/self/statm")


def resident() -> int:
    """Megabytes."""
    return int(STATM.read_text().split()[1]) * 4096 // 1_000_000


@pytest.mark.skipif(not STATM.exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_freed_memory_below_what_is_in_use_is_given_back() -> None:
    freed = [bytes(5000) for _ in range(20_000)]
    kept = [bytes(5000) for _ in range(100)]  # above it in the heap, which therefore cannot shrink by itself
    freed.clear()
    before = resident()
    check_memory(MANIFEST, capacity=64, slots=1)
    assert resident() < before - 50
    assert len(kept) == 100
