"""Arrays whose memory is there once it is written to, a small page at a time."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress
from typing import Any

import numpy as np

# numpy asks for pages of 2 MB for arrays of this size and larger.
LARGE = 1 << 22


def lazy_zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """As numpy's zeros. In pages of 2 MB a row written to a KV cache would bring in its slot as a whole, which takes as
    long as hundreds of tokens, and memory that a short sequence never needs."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < LARGE or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel that has no huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8).view(dtype).reshape(shape)
