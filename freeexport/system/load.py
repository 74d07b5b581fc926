"""Load caused by other processes.

Measurements taken on a busy machine are marked, not refused. Threads on a busy machine sleep while
they wait for each other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from runtime.bundle.costs import TOLERATED
from runtime.machine.machine import usable_cores

# Shortest interval in seconds. Below it the system's counters are too coarse.
_SHORTEST = 0.5
WAIT_POLICY = "OMP_WAIT_POLICY"


class OtherLoad:
    """Measures the processor cores used by other processes, from its creation on.

    `cores` is set when `other_load` ends.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._busy = _others_seconds()
        self.cores = 0.0

    def so_far(self) -> float:
        """Return the mean number of cores used by others so far, or 0 after less than half a
        second.
        """
        elapsed = time.monotonic() - self._began
        return (
            round(max(0.0, _others_seconds() - self._busy) / elapsed, 2)
            if elapsed >= _SHORTEST
            else 0.0
        )


def load_note(cores: float) -> str:
    """Return a sentence that marks figures of a busy machine, or "" if it was idle."""
    if cores <= TOLERATED:
        return ""
    return (
        f"other processes kept {cores:.1f} cores busy: speeds are uncertain, by their spread or "
        "more"
    )


def wait_quietly(threads: int) -> None:
    """Let OpenMP's threads sleep while they wait for each other, if the machine is busy.

    The machine is busy if other processes leave fewer than `threads` cores free during half a
    second. On an idle machine the threads keep spinning, because waking them costs a third of a
    training step. Call this before importing torch, which reads the variable on import. A value set
    by the user is kept.
    """
    if WAIT_POLICY in os.environ:
        return
    load = OtherLoad()
    time.sleep(_SHORTEST)
    if load.so_far() > TOLERATED + usable_cores() - threads:
        os.environ[WAIT_POLICY] = "PASSIVE"


@contextmanager
def other_load() -> Iterator[OtherLoad]:
    """Measure the load caused by other processes while the block runs."""
    load = OtherLoad()
    try:
        yield load
    finally:
        load.cores = load.so_far()


def _others_seconds() -> float:
    """Return the processor seconds used by all processes except this one and its children.

    Children that have ended are excluded too.
    """
    process = psutil.Process()
    own = 0.0
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.Error):  # the process has ended
            times = one.cpu_times()
            own += times.user + times.system + times.children_user + times.children_system
    return _busy_seconds() - own


def _busy_seconds() -> float:
    """Return the seconds for which this machine's processors were not idle.

    Virtual machines running on it count as `user`.
    """
    names = ("user", "nice", "system", "irq", "softirq", "interrupt", "dpc")
    return sum(value for name, value in psutil.cpu_times()._asdict().items() if name in names)
