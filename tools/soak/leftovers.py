"""What a process and a session still hold when nobody asks any more."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

import psutil

from runtime import Session


def resident() -> int:
    """Bytes, after garbage is collected and glibc has given back what is free: threads have heaps of their own, each of
    which keeps the most that it ever held."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def left_over(session: Session) -> list[str]:
    """What a session holds that nobody asks any more."""
    gc.collect()  # streams that were forgotten
    session._scheduler.drain()
    scheduler = session._scheduler
    runners = scheduler._free[0].runners if scheduler._free else ()
    facts = [
        (scheduler.empty, "requests are left"),
        (sorted(decoder.slot for decoder in scheduler._free) == list(range(session.options.slots)), "slots are lost"),
        (not any(runner.cache.lengths.any() for runner in runners), "the KV cache is not empty"),
        (not scheduler._cross._placed, "prompts are left for cross-attention"),
    ]
    return [what for holds, what in facts if not holds]
