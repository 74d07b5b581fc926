"""The model of what decoding costs and exits save (docs/decoding.md), and what bundles record of it.

A token costs a shallow step, and its share of the sync pass that its run of exits ends in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

# Cores' worth of work by others that still counts as an idle machine: the system's own housekeeping.
TOLERATED = 0.15
# Seconds, or bytes, of a call that some machine could take.
MOST = 1e15


@dataclass(frozen=True)
class Host:
    """The machine on which costs hold: the processor by name, the cores that the process could use, the threads of an
    engine call, and ONNX Runtime's version."""

    processor: str
    cores: int
    threads: int
    onnxruntime: str


@dataclass(frozen=True)
class Outside:
    """Seconds beside the engine calls: of a token in mode full, of one in free, and of a sync pass in free. A pass also
    makes the shallow step after it slower, which finds its weights no longer in the cache: that is in `sync`."""

    full: float = 0.0
    free: float = 0.0
    sync: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Seconds: a shallow step with and without the head, a deep pass over k rows at some k (1 is one of them, ascending
    keys), and what is outside. Where not `measured`, on `host`, another unit, as bytes of weights. `busy`: cores that
    others used meanwhile. `host` is None in bundles that do not say."""

    shallow: float
    shallow_without_head: float
    deep: dict[int, float]
    outside: Outside = field(default_factory=Outside)
    measured: bool = True
    busy: float = 0.0
    host: Host | None = None

    @property
    def trusted(self) -> bool:
        """True where predictions from them are worth printing: timings beside other work are not."""
        return self.busy <= TOLERATED

    @property
    def sound(self) -> bool:
        """True where such costs can be: positive, with a deep pass over one row."""
        seconds = (self.shallow, self.shallow_without_head, *self.deep.values())
        beside = (self.outside.full, self.outside.free, self.outside.sync, self.busy)
        return (
            1 in self.deep
            and min(self.deep) == 1
            and max(*seconds, *beside) <= MOST
            and min(seconds) > 0 <= min(beside)
        )

    @property
    def head(self) -> float:
        """The shallow head of one step; noise can make a small one look like nothing."""
        return max(0.0, self.shallow - self.shallow_without_head)

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
        sizes = sorted(self.deep)
        if rows <= sizes[0] or len(sizes) == 1:
            return self.deep[sizes[0]]
        low, high = next(((low, high) for low, high in pairwise(sizes) if rows <= high), sizes[-2:])
        return self.deep[low] + (self.deep[high] - self.deep[low]) * (rows - low) / (high - low)

    def sync(self, rows: int) -> float:
        """A sync pass over `rows` in mode free, with what is outside it."""
        return self.deep_pass(rows) + self.outside.sync

    def speedup_of(self, sync_sizes: Mapping[int, float], tokens: float) -> float:
        """Tokens per second of decoding as a multiple of mode full's, where `tokens` took `sync_sizes[k]` passes over k
        rows."""
        passes = sum(count * self.sync(rows) for rows, count in sync_sizes.items())
        return self.full / (self.step + passes / tokens)

    def speedup(self, exit_rate: float, max_pending: int) -> float:
        """The `speedup_of` tokens that exit with probability `exit_rate`, where a full stack forces a sync."""
        chances = {rows: exit_rate ** (rows - 1) * (1 - exit_rate) for rows in range(1, max_pending)}
        chances[max_pending] = exit_rate ** (max_pending - 1)
        return self.speedup_of(chances, sum(rows * chance for rows, chance in chances.items()))

    def break_even(self, max_pending: int) -> float | None:
        """The exit rate from which on exits make decoding faster, to 0.1 %; None if they never do."""
        return next((rate / 1000 for rate in range(1001) if self.speedup(rate / 1000, max_pending) >= 1), None)


# A session that knows nothing of its machine takes these proportions: a deep row beside the first costs a tenth of it,
# the head as much as a shallow step without it, an overestimate.
NEUTRAL = Costs(2.0, 1.0, {1: 1.0, 2: 1.1}, measured=False)


def recordable(costs: Costs) -> Costs | None:
    """Costs as a bundle or a calibration records them: None where nothing was measured."""
    return costs if costs.measured and costs.sound else None
