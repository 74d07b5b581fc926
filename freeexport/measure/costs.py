"""Costs of decoding on this machine: fitted to decoding, in mode full and in mode free with exits as scripts say; and
by the bytes that it reads, against memory bandwidth.

Calls that are timed one by one, again and again, find their weights in the processor's cache and their buffers bound;
decoding does not, and pays more. So costs are fitted to whole requests, all kinds of them in turn.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from freeexport.measure.timing import interleave
from freeexport.measure.traces import THRESHOLD, ReplaySession, drawn
from freeexport.system.child import run_child
from freeexport.system.load import other_load
from runtime.bundle.costs import Costs, Outside
from runtime.bundle.schema import Reader
from runtime.machine.machine import host
from runtime.result import Stats
from runtime.speech import SpeechPrompt

# Rows of deep passes whose costs are kept.
SIZES = (1, 2, 4, 8, 16)
# Exit rates of the requests in mode free. In one request more, passes run over each of SIZES in turn.
RATES = (0.0, 0.5, 0.8, 0.95)
# Prompts a round, and rounds, as far as they fit into so many seconds; at least the fewest rounds.
PROMPTS, ROUNDS, SECONDS, FEWEST = 8, 9, 8.0, 2
# A prompt and its continuation where none are given.
CONTEXT, TOKENS = 112, 33


# Of the memory that bandwidth is measured on: more than any cache holds. The best of several passes counts, as the
# machine was then disturbed least.
BUFFER, PASSES = 1 << 30, 3


@dataclass(frozen=True)
class Sample:
    """A request: `steps` shallow steps and the seconds they took, the seconds outside the engines, and how many deep
    passes ran over how many rows, and the mean seconds of each."""

    free: bool
    steps: int
    shallow: float
    outside: float
    sizes: Mapping[int, int]
    deep: Mapping[int, float]

    @classmethod
    def of(cls, free: bool, stats: Stats) -> Sample:
        deep = {
            rows: seconds / stats.sync_sizes[rows] for rows, seconds in stats.sync_seconds.items()
        }
        return cls(
            free,
            stats.candidates,
            stats.shallow_seconds,
            stats.overhead_seconds,
            dict(stats.sync_sizes),
            deep,
        )

    @property
    def passes(self) -> int:
        return sum(self.sizes.values())


def measured_costs(
    session: ReplaySession,
    prompts: Sequence[np.ndarray],
    tokens: int,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
) -> Costs:
    """Time a session that nothing else uses: `tokens` tokens after prompts like these, int64 [n] each; with the cores
    that other processes kept busy meanwhile."""
    sizes = [size for size in SIZES if size <= session.manifest.max_pending]
    scripts = [[exits for size in sizes for exits in [True] * (size - 1) + [False]]]
    scripts += [drawn(rate, seed) for seed, rate in enumerate(RATES)]
    asked: dict[str, Any] = {"max_new_tokens": max(2, tokens), "ignore_eos": True}

    def decode(script: list[bool] | None, prompt: np.ndarray) -> Sample:
        if script is None:
            return Sample.of(False, session.generate(prompt, mode="full", **asked).stats)
        with session.replaying(script):
            return Sample.of(
                True, session.generate(prompt, mode="free", threshold=THRESHOLD, **asked).stats
            )

    settings = [None, *scripts]
    began = perf_counter()
    for setting in settings:  # binds buffers and faults pages
        decode(setting, prompts[0])
    turns = int(seconds / (perf_counter() - began))
    count = max(1, min(PROMPTS, len(prompts), turns // rounds))
    # Short and long ones; where there is time for one only, of the median length.
    by_length = sorted(prompts, key=len)
    few = [by_length[int((place + 0.5) / count * len(prompts))] for place in range(count)]
    rounds = max(min(rounds, FEWEST), min(rounds, turns // count))
    again: dict[tuple[int, int], list[Sample]] = defaultdict(list)
    with other_load() as load:
        for turn in interleave(
            settings, few, rounds, decode, warm_up=0, title="timing the engines"
        ):
            for number, sample in enumerate(turn.runs):
                again[turn.prompt, number].append(sample)
    typical = []
    for samples in again.values():  # the medians of several runs of one request
        deep = {rows: median(sample.deep[rows] for sample in samples) for rows in samples[0].deep}
        shallow, outside = (
            median(getattr(sample, name) for sample in samples) for name in ("shallow", "outside")
        )
        typical.append(replace(samples[0], shallow=shallow, outside=outside, deep=deep))
    return replace(fit(typical), busy=load.cores, host=host(session.threads))


def measured_in_child(
    bundle: Path, threads: int | None = None, tokens: int = TOKENS, context: int = CONTEXT
) -> Costs:
    """Measure in a process of its own, so its memory is freed, after prompts of `context` random tokens."""
    given = {"bundle": str(bundle), "threads": threads, "tokens": tokens, "context": context}
    found = json.loads(run_child("freeexport.measure.costs", json.dumps(given)))
    costs: Costs = Reader("measure again").read(Costs, found, "costs")
    return costs


def fit(samples: Sequence[Sample]) -> Costs:
    """Costs that explain samples of both modes best, by least squares: a free request costs its steps and its passes,
    each of them in the engines and outside."""
    full = [sample for sample in samples if not sample.free]
    free = [sample for sample in samples if sample.free]
    steps = sum(sample.steps for sample in full)
    shallow, colder = _line(free, [sample.shallow for sample in free])
    outside, sync = _line(free, [sample.outside for sample in free])
    return Costs(
        shallow,
        sum(sample.shallow for sample in full) / steps,
        _deep(samples),
        Outside(max(0.0, sum(sample.outside for sample in full) / steps), outside, colder + sync),
    )


def _line(samples: Sequence[Sample], seconds: Sequence[float]) -> tuple[float, float]:
    """Seconds of a step and of a pass, neither below 0."""
    counts = np.array([[sample.steps, sample.passes] for sample in samples], np.float64)
    (step, sync), *_ = np.linalg.lstsq(counts, np.array(seconds), rcond=None)
    if step < 0 or sync < 0:
        return max(0.0, sum(seconds) / float(counts[:, 0].sum())), 0.0
    return float(step), float(sync)


def _deep(samples: Sequence[Sample]) -> dict[int, float]:
    """Seconds of a pass at the sizes of SIZES that were seen, or at those nearest to them: straight between them, never
    falling, and fitted to all the passes."""
    count: dict[int, int] = defaultdict(int)
    total: dict[int, float] = defaultdict(float)
    for sample in samples:
        for size, seconds in sample.deep.items():
            count[size] += sample.sizes[size]
            total[size] += sample.sizes[size] * seconds
    seen = sorted(count)
    knots = sorted({min(seen, key=lambda rows: abs(rows - size)) for size in (*SIZES, seen[-1])})
    shares = np.stack([np.interp(seen, knots, unit) for unit in np.eye(len(knots))], axis=1)
    weights = np.sqrt([count[rows] for rows in seen])
    means = np.array([total[rows] / count[rows] for rows in seen])
    fitted, *_ = np.linalg.lstsq(shares * weights[:, None], means * weights, rcond=None)
    return dict(zip(knots, np.maximum.accumulate(fitted).tolist(), strict=True))


def bandwidth_of(threads: int) -> float:
    """Bytes a second that `threads` threads read together, measured in a process of its own."""
    # numpy's matrix library must not add threads of its own.
    alone = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return float(
        run_child("freeexport.measure.costs", json.dumps({"read_by": threads}), variables=alone)
    )


def measure_bandwidth(threads: int, size: int = BUFFER, passes: int = PASSES) -> float:
    """Bytes a second that `threads` threads read together from `size` bytes; the best of `passes`."""
    parts = np.array_split(np.ones(size // 8, np.int64), threads)
    # Either may be faster, by the instructions that numpy has for it here.
    readers = (np.sum, np.max, lambda part: np.dot(part.view(np.float64), part.view(np.float64)))
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            for reader in readers:
                began = perf_counter()
                list(pool.map(reader, parts))
                best = max(best, sum(part.nbytes for part in parts) / (perf_counter() - began))
    return best


def main(arguments: Sequence[str]) -> None:
    """Print, as JSON, the costs of a bundle with the settings of `measured_in_child`, or for `{"read_by": THREADS}` the
    bandwidth."""
    given = json.loads(arguments[0])
    if "read_by" in given:
        print(measure_bandwidth(given["read_by"]))
        return
    with ReplaySession(Path(given["bundle"]), threads=given["threads"]) as session:
        manifest = session.manifest
        room = manifest.encoder_capacity if manifest.encoder_decoder else session.capacity // 2
        random = np.random.default_rng(0)
        prompts: list[Any] = [
            random.integers(0, manifest.vocab_size, max(1, min(given["context"], room)))
            for _ in range(PROMPTS)
        ]
        if (
            manifest.speech is not None
        ):  # one window, as they are all of one length, and reading it takes long
            features = random.standard_normal(
                (manifest.speech.bins, 2 * manifest.encoder_capacity), np.float32
            )
            prompts = [SpeechPrompt.plain(manifest, features)]
        print(json.dumps(asdict(measured_costs(session, prompts, given["tokens"]))))


if __name__ == "__main__":
    main(sys.argv[1:])
