"""What decoding costs, and from which exit rate on exits pay: the model of docs/method.md.

A token costs a shallow step, and its share of the sync pass that its run of exits ends in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from freeexport.system.idle import TOLERATED
from runtime.bundle.manifest import OVERLAP_GAIN

# Rows of deep passes whose costs are kept.
SIZES = (1, 2, 4, 8, 16)
# Of what a bundle records: cores that others kept busy while the rest was measured; absent on an idle machine.
BUSY_CORES = "busy_cores"


@dataclass(frozen=True)
class Overlap:
    """What lanes cost each other: how many times as long a shallow step, and a deep pass, takes while the other runs;
    and `gain`, what both do in a time as a multiple of what they do in turn, handing over included: 2 where they do not
    feel each other, 1 where they share all that they need."""

    slower_shallow: float
    slower_deep: float
    gain: float


@dataclass(frozen=True)
class Outside:
    """Seconds beside the engine calls: of a token in mode full, of one in free, and of a sync pass in free. A pass also
    makes the shallow step after it slower, which finds its weights no longer in the cache: that is in `sync`."""

    full: float = 0.0
    free: float = 0.0
    sync: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Seconds: a shallow step with and without the head, a deep pass over k rows at some k, and what is outside. Where
    not `measured`, on this machine, another unit, as bytes of weights. `busy`: cores that others used meanwhile."""

    shallow: float
    shallow_without_head: float
    deep: dict[int, float]
    outside: Outside = field(default_factory=Outside)
    overlap: Overlap | None = None
    measured: bool = True
    busy: float = 0.0

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Costs:
        """From what `asdict` gave, as JSON keeps it."""
        deep = {int(rows): seconds for rows, seconds in found["deep"].items()}
        overlap = None if found["overlap"] is None else Overlap(**found["overlap"])
        return cls(**{**found, "deep": deep, "outside": Outside(**found["outside"]), "overlap": overlap})

    @classmethod
    def recorded(cls, times: Mapping[str, float]) -> Costs | None:
        """From what `as_manifest` gave; None where nothing was measured."""
        if not {"shallow_ms", "shallow_without_head_ms", "deep_1_ms"} <= times.keys():
            return None
        found = (re.fullmatch(r"deep_(\d+)_ms", name) for name in times)
        deep = {rows: 1e-3 * times[f"deep_{rows}_ms"] for rows in sorted(int(match[1]) for match in found if match)}
        outside = Outside(*(1e-3 * times.get(f"outside_{part}_ms", 0.0) for part in ("full", "free", "sync")))
        shallow, bare = 1e-3 * times["shallow_ms"], 1e-3 * times["shallow_without_head_ms"]
        return cls(shallow, bare, deep, outside, busy=times.get(BUSY_CORES, 0.0))

    @property
    def trusted(self) -> bool:
        """Whether predictions from them are worth printing: timings beside other work are not."""
        return self.busy <= TOLERATED

    @property
    def full(self) -> float:
        """A token without exits: the shallow layers without their head, and a deep pass over one row."""
        return self.shallow_without_head + self.deep[1] + self.outside.full

    @property
    def step(self) -> float:
        """A token in mode free, less its share of a pass."""
        return self.shallow + self.outside.free

    def deep_pass(self, rows: int) -> float:
        """A deep pass over `rows`, between known sizes by interpolation; beyond the last it goes on as between the last
        two."""
        sizes, seconds = list(self.deep), list(self.deep.values())
        if rows <= sizes[-1] or len(sizes) == 1:
            return float(np.interp(rows, sizes, seconds))
        slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
        return seconds[-1] + slope * (rows - sizes[-1])

    def sync(self, rows: int) -> float:
        """A sync pass over `rows` in mode free, with what is outside it."""
        return self.deep_pass(rows) + self.outside.sync

    def free(self, exit_rate: float, max_pending: int) -> float:
        """A token where each exits with probability `exit_rate`, independently, and a full stack forces a sync."""
        rows = np.arange(1, max_pending + 1)
        chance = exit_rate ** (rows - 1) * (1 - exit_rate)
        chance[-1] = exit_rate ** (max_pending - 1)
        passes = np.array([self.sync(int(k)) for k in rows])
        return self.step + float(chance @ passes) / float(chance @ rows)

    def speedup(self, exit_rate: float, max_pending: int) -> float:
        return self.full / self.free(exit_rate, max_pending)

    def break_even(self, max_pending: int) -> float | None:
        """The exit rate from which on exits make decoding faster, to 0.1 %; None if they never do."""
        rates = np.linspace(0, 1, 1001)
        paying = [rate for rate in rates if self.speedup(float(rate), max_pending) >= 1]
        return float(paying[0]) if paying else None

    def as_manifest(self, max_pending: int) -> dict[str, float]:
        """What a bundle records: milliseconds, and the predictions; no break_even where exits never pay. Empty where
        not measured."""
        if not self.measured:
            return {}
        rate = self.break_even(max_pending)
        return {
            "shallow_ms": 1e3 * self.shallow,
            "shallow_without_head_ms": 1e3 * self.shallow_without_head,
            **{f"deep_{k}_ms": 1e3 * seconds for k, seconds in self.deep.items()},
            "outside_full_ms": 1e3 * self.outside.full,
            "outside_free_ms": 1e3 * self.outside.free,
            "outside_sync_ms": 1e3 * self.outside.sync,
            **{f"speedup_at_{percent}": self.speedup(percent / 100, max_pending) for percent in (50, 80, 90)},
            **({} if rate is None else {"exit_rate": rate}),
            **({} if self.overlap is None else {OVERLAP_GAIN: self.overlap.gain}),
            **({} if self.trusted else {BUSY_CORES: self.busy}),
        }
