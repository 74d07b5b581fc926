"""Costs of decoding, the speedup from exits (docs/decoding.md), and how bundles record them.

A token costs a shallow step, and its share of the sync pass that ends its run of exits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

# Cores used by other processes up to which a machine counts as idle.
TOLERATED = 0.15
# Default for the most rows of a sync pass.
MAX_PENDING = 16
# Upper limit of any cost, in seconds or bytes.
MOST = 1e15


@dataclass(frozen=True)
class Host:
    """Machine that costs were measured on.

    Attributes:
        processor: Name of the processor.
        cores: Cores that the process could use.
        threads: Threads per engine call.
        onnxruntime: Version of ONNX Runtime.
    """

    processor: str
    cores: int
    threads: int
    onnxruntime: str


@dataclass(frozen=True)
class Outside:
    """Seconds spent outside engine calls.

    Attributes:
        full: Per token in mode full.
        free: Per token in mode free.
        sync: Per sync pass in mode free. Includes the slowdown of the next shallow step, whose
            weights the pass evicts from the cache.
    """

    full: float = 0.0
    free: float = 0.0
    sync: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts of decoding.

    Attributes:
        shallow: A shallow step with the head.
        shallow_without_head: A shallow step without the head.
        deep: Deep passes by number of rows, ascending from 1.
        outside: Time outside engine calls.
        measured: False for costs in another unit, such as bytes of weights.
        busy: Cores that other processes used during the measurement.
        host: Machine of the measurement. None if unknown.
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
        """True if the machine was idle enough for predictions."""
        return self.busy <= TOLERATED

    @property
    def sound(self) -> bool:
        """True if all costs are possible: positive, finite, and with a deep pass over one row."""
        seconds = (self.shallow, self.shallow_without_head, *self.deep.values())
        others = (self.outside.full, self.outside.free, self.outside.sync, self.busy)
        return (
            min(self.deep, default=0) == 1
            and max(*seconds, *others) <= MOST
            and min(seconds) > 0
            and min(others) >= 0
        )

    @property
    def head(self) -> float:
        """Shallow head of one step, at least 0."""
        return max(0.0, self.shallow - self.shallow_without_head)

    @property
    def full(self) -> float:
        """A token without exits: the shallow layers without head, and a deep pass over one row."""
        return self.shallow_without_head + self.deep[1] + self.outside.full

    def deep_pass(self, rows: int) -> float:
        """Return the cost of a deep pass over `rows`.

        Interpolates between known sizes and extrapolates from the last two.
        """
        sizes = sorted(self.deep)
        if rows <= sizes[0] or len(sizes) == 1:
            return self.deep[sizes[0]]
        low, high = next(((low, high) for low, high in pairwise(sizes) if rows <= high), sizes[-2:])
        return self.deep[low] + (self.deep[high] - self.deep[low]) * (rows - low) / (high - low)

    def speedup_of(self, sync_sizes: Mapping[int, float], tokens: float) -> float:
        """Return tokens per second relative to mode full.

        Args:
            sync_sizes: Number of sync passes by their rows.
            tokens: Number of tokens that these passes were needed for.
        """
        passes = [
            count * (self.deep_pass(rows) + self.outside.sync) for rows, count in sync_sizes.items()
        ]
        return self.full / (self.shallow + self.outside.free + sum(passes) / tokens)

    def speedup(self, exit_rate: float, max_pending: int) -> float:
        """Return the speedup if tokens exit independently with probability `exit_rate`.

        A stack of `max_pending` rows forces a sync pass.
        """
        chances = {}
        for rows in range(1, max_pending):
            chances[rows] = exit_rate ** (rows - 1) * (1 - exit_rate)
        chances[max_pending] = exit_rate ** (max_pending - 1)
        tokens = sum(rows * chance for rows, chance in chances.items())
        return self.speedup_of(chances, tokens)

    def break_even(self, max_pending: int) -> float | None:
        """Return the exit rate from which exits are faster, to 0.1 %. None if they never are."""
        for step in range(1001):
            rate = step / 1000
            if self.speedup(rate, max_pending) >= 1:
                return rate
        return None


# Proportions assumed for an unknown machine: each further deep row costs a tenth of the first, and
# the head as much as a shallow step without it, which is an overestimate.
NEUTRAL = Costs(2.0, 1.0, {1: 1.0, 2: 1.1}, measured=False)


def recordable(costs: Costs) -> Costs | None:
    """Return the costs that a bundle or calibration records. None if nothing was measured."""
    return costs if costs.measured and costs.sound else None
