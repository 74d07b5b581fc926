"""What this process holds, and how much of that somebody still uses: a leak, or memory that the allocator keeps."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Held:
    """`resident` bytes; `given` bytes that malloc gave out and has not got back, 0 where the C library is not glibc;
    `blocks`, the number of Python's pieces of memory."""

    resident: int
    given: int
    blocks: int


def held() -> Held:
    return Held(psutil.Process().memory_info().rss, _given(), sys.getallocatedblocks())


def held_trimmed() -> Held:
    """After garbage is collected and glibc has given back what is free: threads have heaps of their own, each of which
    keeps the most that it ever held."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return held()


class _MallInfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _given() -> int:
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return 0
    ask.restype = _MallInfo
    found = ask()
    return int(found.uordblks + found.hblkhd)  # in heaps, and mapped
