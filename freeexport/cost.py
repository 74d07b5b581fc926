"""What engine calls cost on this machine, and from which exit rate on exits pay.

The model of docs/method.md: a token costs a shallow step, and its share of the sync pass that its run of exits ends in.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from runtime import Session
from runtime.decoder import Decoder
from runtime.manifest import OVERLAP_GAIN

SIZES = (1, 2, 4, 8, 16)
CONTEXT, ROUNDS = 128, 7
OVERLAP_ROWS = 4


@dataclass(frozen=True)
class Overlap:
    """What lanes cost each other: how many times as long a shallow step, and a deep pass, takes while the other runs;
    and `gain`, what both do in a time as a multiple of what they do in turn, handing over included: 2 where they do not
    feel each other, 1 where they share all that they need."""

    slower_shallow: float
    slower_deep: float
    gain: float


@dataclass(frozen=True)
class Costs:
    """Seconds: a shallow step with and without the head, and a deep pass over k rows at each measured k."""

    shallow: float
    shallow_without_head: float
    deep: dict[int, float]
    overlap: Overlap | None = None

    @property
    def full(self) -> float:
        """A token without exits: the shallow layers without their head, and a deep pass over one row."""
        return self.shallow_without_head + self.deep[1]

    def deep_pass(self, rows: int) -> float:
        """A deep pass over `rows`, between measured sizes by interpolation."""
        return float(np.interp(rows, list(self.deep), list(self.deep.values())))

    def free(self, exit_rate: float, max_pending: int) -> float:
        """A token where each exits with probability `exit_rate`, independently, and a full stack forces a sync."""
        rows = np.arange(1, max_pending + 1)
        chance = exit_rate ** (rows - 1) * (1 - exit_rate)
        chance[-1] = exit_rate ** (max_pending - 1)
        passes = np.array([self.deep_pass(int(k)) for k in rows])
        return self.shallow + float(chance @ passes) / float(chance @ rows)

    def speedup(self, exit_rate: float, max_pending: int) -> float:
        return self.full / self.free(exit_rate, max_pending)

    def break_even(self, max_pending: int) -> float | None:
        """The exit rate from which on exits make decoding faster, to 0.1 %; None if they never do."""
        rates = np.linspace(0, 1, 1001)
        paying = [rate for rate in rates if self.speedup(float(rate), max_pending) >= 1]
        return float(paying[0]) if paying else None

    def as_manifest(self, max_pending: int) -> dict[str, float]:
        """What a bundle records: milliseconds, and the predictions; no break_even where exits never pay."""
        rate = self.break_even(max_pending)
        return {
            "shallow_ms": 1e3 * self.shallow,
            "shallow_without_head_ms": 1e3 * self.shallow_without_head,
            **{f"deep_{k}_ms": 1e3 * seconds for k, seconds in self.deep.items()},
            **{f"speedup_at_{percent}": self.speedup(percent / 100, max_pending) for percent in (50, 80, 90)},
            **({} if rate is None else {"exit_rate": rate}),
            **({} if self.overlap is None else {OVERLAP_GAIN: self.overlap.gain}),
        }


def measure(session: Session, context: int = CONTEXT, rounds: int = ROUNDS, prompt: np.ndarray | None = None) -> Costs:
    """Time the calls of a session that nothing else uses, at `context` valid positions; medians of `rounds`.

    `prompt` int64 [n] is what an encoder-decoder's decoder attends to, by default one token. What lanes cost each other
    is measured where the session has two slots.
    """
    manifest = session.manifest
    sizes = [size for size in SIZES if size <= manifest.max_pending]
    context = max(1, min(context, session.capacity - max(sizes) * 2))
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    with session.decoder(prompt) as decoder:
        decoder.prefill(_tokens(context, manifest.vocab_size), head=False)
        for turn in range(rounds + 1):
            for size in sizes:
                for head in (True, False):
                    shallow, deep = _timed(decoder, size, head)
                    decoder.trim(context)
                    if turn:  # the first turn binds and warms up
                        times["head" if head else "bare", 1].append(shallow)
                        times["deep", size].append(deep)
    passes = {size: median(times["deep", size]) for size in sizes}
    costs = Costs(median(times["head", 1]), median(times["bare", 1]), passes)
    return replace(costs, overlap=_overlap(session, costs, context, rounds)) if session.options.slots > 1 else costs


def _overlap(session: Session, costs: Costs, context: int, rounds: int) -> Overlap:
    """Shallow steps of one sequence while a deep pass of another runs."""
    size = min(OVERLAP_ROWS, session.manifest.max_pending)
    prompt = _tokens(context, session.manifest.vocab_size)
    steps, passes, gains = list[float](), list[float](), list[float]()
    with session.decoder() as one, session.decoder() as other, ThreadPoolExecutor(1) as thread:
        one.prefill(prompt, head=False)
        other.prefill(prompt, head=False)
        for _ in range(rounds):
            for token in range(size):
                other.step(token, head=False)
            before, taken, began = other.stats.deep_seconds, list[float](), perf_counter()
            running = thread.submit(other.sync)
            while not running.done():
                seconds = one.stats.shallow_seconds
                one.step(0, head=True)
                one.trim(context)
                taken.append(one.stats.shallow_seconds - seconds)
            wall = perf_counter() - began
            steps += taken[:-1]  # the last one outlived the pass
            passes.append(other.stats.deep_seconds - before)
            gains.append((len(taken) * costs.shallow + costs.deep_pass(size)) / wall)
            other.trim(context)
    slower = median(steps) / costs.shallow if steps else 1.0
    return Overlap(max(1.0, slower), max(1.0, median(passes) / costs.deep_pass(size)), median(gains))


def _timed(decoder: Decoder, size: int, head: bool) -> tuple[float, float]:
    """Seconds of a shallow step, the mean of `size`, and of the deep pass over them."""
    stats = decoder.stats
    shallow, deep = stats.shallow_seconds, stats.deep_seconds
    for token in range(size):
        decoder.step(token, head)
    decoder.sync()
    return (stats.shallow_seconds - shallow) / size, stats.deep_seconds - deep


def _tokens(count: int, vocabulary: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocabulary, count)


def main(arguments: Sequence[str]) -> None:
    """Print the costs of the bundle named first as JSON."""
    with Session(Path(arguments[0]), slots=2, overlap=False) as session:
        print(json.dumps(measure(session).as_manifest(session.manifest.max_pending)))


if __name__ == "__main__":
    main(sys.argv[1:])
