"""Pages of memory: large ones for weights that are read where a file is mapped, small ones for caches.

Linux keeps a file in pages of the size that it was read or written with. Written, and read a piece at a time, these are
small and scattered, which prefetching by the processor does not cross: ours decode up to a third faster from large ones
(docs/precision.md).
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

# Of the kernel's uapi/asm-generic/mman-common.h, since Linux 5.14.
_MADV_POPULATE_READ = 22
# numpy asks for pages of 2 MB for arrays of this size and larger.
LARGE = 1 << 22


def read_in_large_pages(path: Path) -> None:
    """Read what of a file is not in memory, in pages of 2 MiB where the file system has them (ext4 since Linux 6.16,
    XFS, btrfs). What is in memory stays as it is. A system that cannot is left alone."""
    if not sys.platform.startswith("linux"):
        return
    # Where the file cannot be read, who needs it says so.
    with (
        contextlib.suppress(OSError, ValueError),
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):
        mapped.madvise(mmap.MADV_HUGEPAGE)
        mapped.madvise(_MADV_POPULATE_READ)


def write_back(path: Path) -> None:
    """Write a file to its disk and take it from memory, so that it is read anew. Pages that a process has mapped
    stay."""
    if not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError), path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def lazy_zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros, as numpy's. In pages of 2 MB a row written to a KV cache would bring in its slot as a whole, which takes
    as long as hundreds of tokens, and memory that a short sequence never needs."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < LARGE or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel that has no huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8).view(dtype).reshape(shape)
