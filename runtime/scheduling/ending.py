"""What may end a request before its own end: its caller, its deadline, the session that closes."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from time import monotonic

from runtime.result import FinishReason

# Seconds after its deadline at which a caller that sleeps stops waiting for the thread that drives.
GRACE = 0.05


class Ending:
    """`until`: the deadline by the monotonic clock, infinite where there is none; `closing` says whether the session
    ends what runs."""

    def __init__(self, cancel: threading.Event | None, until: float, closing: Callable[[], bool]) -> None:
        self.until = until
        self._cancel, self._closing = cancel, closing

    @property
    def late(self) -> bool:
        return self.until != math.inf and monotonic() >= self.until

    @property
    def reason(self) -> FinishReason | None:
        """Why it is to end now; None where it may go on."""
        if self._closing() or (self._cancel is not None and self._cancel.is_set()):
            return "cancelled"
        return "deadline" if self.late else None

    def due(self) -> bool:
        return self.reason is not None


def patience(until: float) -> float | None:
    """Seconds that a caller with this deadline sleeps; None is without limit."""
    return None if until == math.inf else max(0.0, until + GRACE - monotonic())
