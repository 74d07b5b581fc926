"""glibc's allocator, told not to hand large blocks back: a training step asks for the same ones again."""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_LARGEST = 2**31 - 1
_GROWTH = 64 << 20  # bytes


def keep_freed_memory() -> bool:
    """Keep what this process frees, for it to use again without the system's zeroed pages: a fifth of a step on a CPU.

    False, and nothing changes, without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(*pair) for pair in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _LARGEST), (_TOP_PAD, _GROWTH)))
