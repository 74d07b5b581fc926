"""Large arrays cost the memory of what was written."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest

from runtime.machine.machine import LARGE, lazy_zeros

MB = 1 << 20


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.uint8])
@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 5), (16, 3, 700, 64)])
def test_zeros_have_the_shape_and_type_and_can_be_written(shape: tuple[int, ...], dtype: type) -> None:
    array = lazy_zeros(shape, dtype)
    assert array.shape == shape
    assert array.dtype == dtype
    assert not array.any()
    array[...] = 1
    assert array.sum(dtype=np.float64) == array.size
    assert array.flags.c_contiguous


def test_what_was_not_written_is_not_in_memory() -> None:
    size = 64 * MB
    assert size > LARGE
    before = resident()
    array = lazy_zeros((64, MB), np.uint8)
    array[:, 0] = 1
    assert resident() - before < 8 * MB
    assert array.sum() == 64


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
