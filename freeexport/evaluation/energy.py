"""Energy of the processor packages, where Linux lets it be read (RAPL, /sys/class/powercap)."""

from __future__ import annotations

import re
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_PACKAGE = re.compile(r"intel-rapl:\d+")


class Energy:
    """Joules since it was made, of all packages together; None where the machine does not tell."""

    def __init__(self, root: Path = POWERCAP) -> None:
        found = sorted(root.glob("intel-rapl:*")) if root.is_dir() else []
        self._counters = [place for place in found if _PACKAGE.fullmatch(place.name)]
        self._total = 0.0
        try:
            self._limits = [_read(place / "max_energy_range_uj") for place in self._counters]
            self._last = [_read(place / "energy_uj") for place in self._counters]
        except (OSError, ValueError):  # only root may read them on most systems
            self._counters = []

    def joules(self) -> float | None:
        """To be read more often than a counter overflows, which takes minutes at full power."""
        if not self._counters:
            return None
        now = [_read(place / "energy_uj") for place in self._counters]
        for before, after, limit in zip(self._last, now, self._limits, strict=True):
            self._total += (after - before if after >= before else after + limit - before) / 1e6
        self._last = now
        return self._total


def _read(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
