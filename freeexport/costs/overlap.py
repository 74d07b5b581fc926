"""What two lanes cost each other on this machine: shallow steps of one sequence while a deep pass of another runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from statistics import median
from time import perf_counter

import numpy as np

from freeexport.costs.model import Overlap
from runtime import Session
from runtime.decoding.decoder import Decoder

OVERLAP_ROWS, ROUNDS = 4, 7


def measured_overlap(session: Session, context: int, rounds: int = ROUNDS) -> Overlap:
    """Time a session of two slots that nothing else uses, at `context` valid positions; medians of `rounds`."""
    size = min(OVERLAP_ROWS, session.manifest.max_pending)
    context = max(1, min(context, session.capacity - 2 * size))
    prompt = np.random.default_rng(0).integers(0, session.manifest.vocab_size, context)
    steps, passes, gains = list[float](), list[float](), list[float]()
    with session.decoder() as one, session.decoder() as other, ThreadPoolExecutor(1) as thread:
        one.prefill(prompt, head=False)
        other.prefill(prompt, head=False)
        step, deep = _in_turn(other, size, rounds)
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
            gains.append((len(taken) * step + deep) / wall)
            other.trim(context)
    slower = median(steps) / step if steps else 1.0
    return Overlap(max(1.0, slower), max(1.0, median(passes) / deep), median(gains))


def _in_turn(decoder: Decoder, size: int, rounds: int) -> tuple[float, float]:
    """Seconds of a shallow step with its head, and of the deep pass over `size` rows, when nothing runs beside."""
    stats, context = decoder.stats, decoder.lengths()[1]
    steps, passes = list[float](), list[float]()
    for turn in range(rounds + 1):
        shallow, deep = stats.shallow_seconds, stats.deep_seconds
        for token in range(size):
            decoder.step(token, head=True)
        decoder.sync()
        decoder.trim(context)
        if turn:  # the first turn binds and warms up
            steps.append((stats.shallow_seconds - shallow) / size)
            passes.append(stats.deep_seconds - deep)
    return median(steps), median(passes)
