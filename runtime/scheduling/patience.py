"""How long a caller that sleeps waits for the thread that drives."""

from __future__ import annotations

import math
from time import monotonic

# Seconds after its deadline.
GRACE = 0.05


def patience(until: float) -> float | None:
    """Seconds that a caller with a deadline, by the monotonic clock, sleeps; None is without limit."""
    return None if until == math.inf else max(0.0, until + GRACE - monotonic())
