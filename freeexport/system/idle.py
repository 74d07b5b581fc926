"""Is the machine idle? Two busy threads on two cores are slower than one: timings beside other work mean nothing."""

from __future__ import annotations

import time

import psutil

from runtime.bundle.costs import TOLERATED
from runtime.errors import FreeExportError

WINDOW = 1.0


class BusyMachineError(FreeExportError):
    """Something else is computing."""


def cores_in_use(seconds: float = WINDOW) -> float:
    """How many cores everything on this machine keeps busy while this process sleeps for `seconds`."""
    before = psutil.cpu_times()
    time.sleep(seconds)
    after = psutil.cpu_times()
    idle = sum(getattr(after, name, 0.0) - getattr(before, name, 0.0) for name in ("idle", "iowait"))
    return max(0.0, (psutil.cpu_count() or 1) - idle / seconds)


def is_idle() -> bool:
    """Whether nothing else computes, while this process sleeps."""
    return cores_in_use() <= TOLERATED


def require_idle(force: bool) -> bool:
    """Whether the machine is idle. Raises BusyMachineError where it is not, unless `force`."""
    busy = cores_in_use()
    if busy <= TOLERATED:
        return True
    if not force:
        raise BusyMachineError(
            f"other processes keep {busy:.1f} cores busy, so the ratios would be wrong; stop them, or use --force"
        )
    return False
