"""Costs of decoding, what exits save (docs/decoding.md), and how bundles record them.

A token costs a shallow step, and its share of the sync pass that its run of exits ends in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

# Cores' worth of work by others that still counts as an idle machine: the system's own housekeeping.
TOLERATED = 0.15
# The most rows of a sync pass in bundles that do not say otherwise.
MAX_PENDING = 16
# Seconds, or bytes, beyond any call.
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
    """Seconds beside the engine calls: of a token in mode full, of one in free, and of a sync pass in free. `sync` also
    holds what a pass adds to the next shallow step, whose weights it evicts from the cache."""

    full: float = 0.0
    free: float = 0.0
    sync: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Seconds of a shallow step with and without the head, of a deep pass over k rows for some k (ascending, 1 is one
    of them), and `outside`.

    Where not `measured`, on `host`, another unit, as bytes of weights. `busy`: cores that others used meanwhile. `host`
    is None in bundles that do not say.
    """

    shallow: float
    shallow_without_head: float
    deep: dict[int, float]
    outside: Outside = field(default_factory=Outside)
    measured: bool = True
    busy: float = 0.0
    host: Host | None = None

    @property
    def trusted(self) -> bool:
        """Whether predictions are worth printing: timings beside other work are not."""
        return self.busy <= TOLERATED

    @property
    def sound(self) -> bool:
        """Whether such costs are possible: positive, with a deep pass over one row."""
        seconds = (self.shallow, self.shallow_without_head, *self.deep.values())
        beside = (self.outside.full, self.outside.free, self.outside.sync, self.busy)
        return min(self.deep, default=0) == 1 and max(*seconds, *beside) <= MOST and min(seconds) > 0 <= min(beside)

    @property
    def head(self) -> float:
        """The shallow head of one step, at least 0 whatever the noise."""
        return max(0.0, self.shallow - self.shallow_without_head)

    @property
    def full(self) -> float:
        """A token without exits: the shallow layers without their head, and a deep pass over one row."""
        return self.shallow_without_head + self.deep[1] + self.outside.full

    def deep_pass(self, rows: int) -> float:
        """A deep pass over `rows`: interpolated between known sizes, and extrapolated from the last two."""
        sizes = sorted(self.deep)
        if rows <= sizes[0] or len(sizes) == 1:
            return self.deep[sizes[0]]
        low, high = next(((low, high) for low, high in pairwise(sizes) if rows <= high), sizes[-2:])
        return self.deep[low] + (self.deep[high] - self.deep[low]) * (rows - low) / (high - low)

    def speedup_of(self, sync_sizes: Mapping[int, float], tokens: float) -> float:
        """Tokens per second as a multiple of mode full's, where `tokens` took `sync_sizes[k]` passes over k rows."""
        passes = sum(count * (self.deep_pass(rows) + self.outside.sync) for rows, count in sync_sizes.items())
        return self.full / (self.shallow + self.outside.free + passes / tokens)

    def speedup(self, exit_rate: float, max_pending: int) -> float:
        """The `speedup_of` tokens that exit with probability `exit_rate`, where a full stack forces a sync."""
        chances = {rows: exit_rate ** (rows - 1) * (1 - exit_rate) for rows in range(1, max_pending)}
        chances[max_pending] = exit_rate ** (max_pending - 1)
        return self.speedup_of(chances, sum(rows * chance for rows, chance in chances.items()))

    def break_even(self, max_pending: int) -> float | None:
        """The exit rate from which on exits make decoding faster, to 0.1 %; None if they never do."""
        return next((rate / 1000 for rate in range(1001) if self.speedup(rate / 1000, max_pending) >= 1), None)


# The proportions assumed where nothing is known of the machine: another deep row costs a tenth of the first, the head
# as much as a shallow step without it, an overestimate.
NEUTRAL = Costs(2.0, 1.0, {1: 1.0, 2: 1.1}, measured=False)


def recordable(costs: Costs) -> Costs | None:
    """Costs as a bundle or a calibration records them: None where nothing was measured."""
    return costs if costs.measured and costs.sound else None
