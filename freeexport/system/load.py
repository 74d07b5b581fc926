"""The load of other processes: figures of a busy machine are marked, not refused, and threads that wait for each other
do not spin there."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from runtime.bundle.costs import TOLERATED
from runtime.machine.machine import usable_cores

# Seconds below which the counters of the system are too coarse to tell how busy others were.
_SHORTEST = 0.5
WAIT_POLICY = "OMP_WAIT_POLICY"


class OtherLoad:
    """The cores that other processes keep busy, from now on; `cores` is final once a measurement ended."""

    def __init__(self) -> None:
        self._began, self._busy = time.monotonic(), _others_seconds()
        self.cores = 0.0

    def so_far(self) -> float:
        """Cores that others kept busy until now; 0 where too little time has passed to tell."""
        elapsed = time.monotonic() - self._began
        return (
            round(max(0.0, _others_seconds() - self._busy) / elapsed, 2)
            if elapsed >= _SHORTEST
            else 0.0
        )


def load_note(cores: float) -> str:
    """A sentence that marks figures of a busy machine; empty where it was idle."""
    if cores <= TOLERATED:
        return ""
    return f"other processes kept {cores:.1f} cores busy: speeds are uncertain, by their spread or more"


def wait_quietly(threads: int) -> None:
    """Let OpenMP's threads sleep while they wait for each other, where other processes leave no core to each of
    `threads`, as observed for half a second. On an idle machine they spin: waking them costs a third of a training
    step.

    Call it before torch is imported, which reads the variable then; a value that the user set stays.
    """
    if WAIT_POLICY in os.environ:
        return
    load = OtherLoad()
    time.sleep(_SHORTEST)
    if load.so_far() > TOLERATED + usable_cores() - threads:
        os.environ[WAIT_POLICY] = "PASSIVE"


@contextmanager
def other_load() -> Iterator[OtherLoad]:
    """Watch how busy others keep the machine while the block measures."""
    load = OtherLoad()
    try:
        yield load
    finally:
        load.cores = load.so_far()


def _others_seconds() -> float:
    """Seconds for which others than this process and its children, those that have ended included, ran."""
    process, own = psutil.Process(), 0.0
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.Error):  # ended in between
            times = one.cpu_times()
            own += times.user + times.system + times.children_user + times.children_system
    return _busy_seconds() - own


def _busy_seconds() -> float:
    """Seconds for which processors of this machine were not idle. Virtual machines that run here count as `user`."""
    names = ("user", "nice", "system", "irq", "softirq", "interrupt", "dpc")
    return sum(value for name, value in psutil.cpu_times()._asdict().items() if name in names)
