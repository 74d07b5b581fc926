"""What drafting costs on this machine: seconds of shallow steps and of deep passes, as measured while decoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

# Where a bundle records no costs: a deep row beside the first costs this much of it, the head this much of a step.
ROW_SHARE, HEAD_SHARE = 0.1, 0.2
# Measurements after which a cost that was not among them is forgotten: the machine may have changed meanwhile.
MEMORY = 512

K = TypeVar("K", str, int)


class DraftCosts:
    """Seconds of a shallow step ("asked": with the head, or "bare") and of deep passes by rows: measured, else scaled
    from those that a manifest has `recorded` (`shallow_ms`, `shallow_without_head_ms`, `deep_{k}_ms`)."""

    def __init__(self, max_pending: int, recorded: Mapping[str, float]) -> None:
        bare = recorded.get("shallow_without_head_ms", 1.0)
        asked = recorded.get("shallow_ms", bare / (1 - HEAD_SHARE))
        self._shallow = _Table({"asked": asked, "bare": bare})
        self._deep = _Table(_deep_passes(max_pending, recorded, bare))

    def __getitem__(self, what: str | int) -> float:
        return self._deep[what] if isinstance(what, int) else self._shallow[what]

    @property
    def full(self) -> float:
        return self["bare"] + self[1]

    @property
    def head(self) -> float:
        return max(0.0, self["asked"] - self["bare"])

    def observe(self, asked: int, rows: int, shallow: float, deep: float) -> None:
        """`rows` shallow steps took so long, `asked` of them with the head, and the deep pass over them."""
        self._deep.observe(rows, deep)
        if asked:
            self._shallow.observe("asked", (shallow - (rows - asked) * self["bare"]) / asked)
        else:
            self._shallow.observe("bare", shallow / rows)

    def expected(self, asked: int, rows: int) -> float:
        """Seconds of what `observe` is told of."""
        return asked * self["asked"] + (rows - asked) * self["bare"] + self[rows]


class _Table(Generic[K]):
    """Costs by key. What was not measured lately is `recorded`, scaled as the measured ones are."""

    def __init__(self, recorded: Mapping[K, float]) -> None:
        self._recorded: Mapping[K, float] = recorded
        self._measured: dict[K, tuple[float, int, int]] = {}  # the mean, of how many, and when the last was
        self._scale, self._samples = 1.0, 0

    def __getitem__(self, key: K) -> float:
        measured = self._measured.get(key)
        if measured is None or self._samples - measured[2] > MEMORY:
            return self._recorded[key] * self._scale
        return measured[0]

    def observe(self, key: K, seconds: float) -> None:
        known = self[key]
        mean, count, last = self._measured.get(key, (0.0, 0, 0))
        if self._samples - last > MEMORY:
            mean, count = 0.0, 0
        # A hiccup of the machine is one sample of many, and must not pass for a cost.
        sample = max(0.0, min(seconds, 2 * known) if self._samples else seconds)
        self._samples += 1
        self._measured[key] = mean + (sample - mean) / min(count + 1, 16), count + 1, self._samples
        self._scale += (sample / self._recorded[key] - self._scale) / min(self._samples, 16)


def _deep_passes(max_pending: int, recorded: Mapping[str, float], bare: float) -> dict[int, float]:
    """Cost of 1 to `max_pending` rows, between the recorded sizes by interpolation."""
    sizes = [size for size in range(1, max_pending + 1) if f"deep_{size}_ms" in recorded]
    if not sizes:
        return {rows: bare * (1 + ROW_SHARE * (rows - 1)) for rows in range(1, max_pending + 1)}
    table: dict[int, float] = {}
    for rows in range(1, max_pending + 1):
        below = max((size for size in sizes if size <= rows), default=sizes[0])
        above = min((size for size in sizes if size >= rows), default=sizes[-1])
        low, high = recorded[f"deep_{below}_ms"], recorded[f"deep_{above}_ms"]
        table[rows] = low + (high - low) * (rows - below) / max(1, above - below)
    return table
