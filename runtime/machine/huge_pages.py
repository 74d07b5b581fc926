"""Weights in pages of 2 MiB, where Linux can: a token reads all of them, and looks up far fewer addresses."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

PAGE = 2 << 20
# Less than this fits into caches, and is not worth a thread.
LEAST = 32 << 20
# Of the kernel's uapi/asm-generic/mman-common.h. The second needs Linux 6.1; before, the first leaves it to khugepaged.
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPS = Path("/proc/self/maps")

Region = tuple[int, int]


class HugePages:
    """Moves memory that was allocated while it watched, in a thread of its own, while the process works on.

    What stands in the memory stays. Nothing is promised: a piece that the kernel will not move, stays where it is, and
    a system that was told never to use such pages is left alone.
    """

    def __init__(self) -> None:
        self._before = _regions() if available() else None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Stop watching, and move what came up."""
        if self._before is None:
            return
        pages = whole_pages(added(_regions(), self._before))
        if sum(end - start for start, end in pages) >= LEAST:
            self._thread = threading.Thread(target=self._move, args=(pages,), name="huge pages", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Until all is moved."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Stop moving. Idempotent."""
        self._stop.set()
        self.wait()

    def _move(self, pages: list[Region]) -> None:
        madvise, moved = ctypes.CDLL(None).madvise, 0
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for start, end in pages:
            # Memory that was freed since makes the call fail, and another's that came there loses nothing.
            madvise(start, end - start, _MADV_HUGEPAGE)
            for page in range(start, end, PAGE):
                if self._stop.is_set():
                    return
                moved += madvise(page, PAGE, _MADV_COLLAPSE) == 0
        logger.debug("%d of %d MiB in huge pages", 2 * moved, sum(end - start for start, end in pages) >> 20)


def available() -> bool:
    """Whether this is a Linux that may use huge pages where it is asked to."""
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError):
        return "[never]" not in _ENABLED.read_text()
    return False


def anonymous(maps: str) -> list[Region]:
    """Regions of private memory without a file that can be written, in order, of the text of /proc/self/maps."""
    found = []
    for line in maps.splitlines():
        addresses, rights, *rest = line.split(maxsplit=5)
        if rights == "rw-p" and (len(rest) < 4 or rest[3] == "[heap]"):
            start, _, end = addresses.partition("-")
            found.append((int(start, 16), int(end, 16)))
    return found


def added(after: Iterable[Region], before: Iterable[Region]) -> list[Region]:
    """What of `after` is not in `before`; both in order, without overlaps."""
    known, found = list(before), []
    for start, end in after:
        for old_start, old_end in known:
            if start < old_end and old_start < end:
                if start < old_start:
                    found.append((start, old_start))
                start = max(start, old_end)
        if start < end:
            found.append((start, end))
    return found


def whole_pages(regions: Iterable[Region]) -> list[Region]:
    """The huge pages that lie in regions as a whole."""
    aligned = ((-(-start // PAGE) * PAGE, end // PAGE * PAGE) for start, end in regions)
    return [(start, end) for start, end in aligned if start < end]


def _regions() -> list[Region]:
    with contextlib.suppress(OSError, ValueError):
        return anonymous(_MAPS.read_text())
    return []
