"""What a threshold would have done on traces: which tokens exit, how long sync passes are, and what it costs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from freeexport.traces.trace import Trace, Traces
from runtime.bundle.costs import Costs


@dataclass
class SimulatedRun:
    """`agreeing` of the `exits` have the deep decoder's token. `sync_sizes[k]` passes ran over k rows; what is on the
    stack at the end of a sequence runs in none."""

    tokens: int = 0
    exits: int = 0
    agreeing: int = 0
    sync_sizes: Counter[int] = field(default_factory=Counter)

    @property
    def exit_rate(self) -> float:
        return self.exits / max(1, self.tokens)

    @property
    def agreement(self) -> float | None:
        """Share of the exits; None where nothing exits."""
        return self.agreeing / self.exits if self.exits else None

    def speedup(self, costs: Costs) -> float:
        """Tokens per second of decoding as a multiple of mode full's: docs/method.md, with the passes of the replay in
        place of an expectation. 1 without tokens."""
        return costs.speedup_of(self.sync_sizes, self.tokens) if self.tokens else 1.0


def replay(traces: Traces, threshold: float, max_pending: int) -> SimulatedRun:
    """Decode the traces in mode `free`, as far as that follows the full model's output."""
    total = SimulatedRun()
    for trace in traces.sequences:
        _replay_one(trace, threshold, max_pending, total)
    return total


def _replay_one(trace: Trace, threshold: float, max_pending: int, total: SimulatedRun) -> None:
    stacked = 0
    for exits, agrees in zip(trace.sure(threshold).tolist(), trace.agrees.tolist(), strict=True):
        stacked += 1
        if exits and stacked < max_pending:
            total.exits += 1
            total.agreeing += agrees
            continue
        total.sync_sizes[stacked] += 1
        stacked = 0
    total.tokens += len(trace)
