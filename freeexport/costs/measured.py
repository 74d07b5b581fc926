"""Measures the costs of decoding and the memory bandwidth of this machine.

Costs are fitted to whole requests, in mode full and in mode free with scripted exits, decoded in
turn. An engine call that is timed repeatedly would be too fast: it finds its weights in the
processor's cache and its buffers bound, unlike the calls of real decoding.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from freeexport.costs.timing import interleave
from freeexport.system.child import run_child
from freeexport.system.load import other_load
from runtime.bundle.costs import Costs, Outside
from runtime.bundle.schema import Reader
from runtime.decoding.calls import Prediction
from runtime.decoding.decoder import Decoder
from runtime.decoding.feature_decoder import FeatureDecoder
from runtime.engines.runner import Runner
from runtime.machine.machine import host
from runtime.result import Stats
from runtime.session import Session
from runtime.speech.windows import SpeechPrompt

# Rows of deep passes with recorded costs.
SIZES = (1, 2, 4, 8, 16)
# Exit rates of the requests in mode free. In one further request, passes run over each of SIZES in
# turn.
RATES = (0.0, 0.5, 0.8, 0.95)
# Prompts per round, rounds, and approximate limit in seconds. A slow bundle gets fewer prompts and
# rounds, but at least MIN_ROUNDS rounds.
PROMPTS = 8
ROUNDS = 9
SECONDS = 8.0
MIN_ROUNDS = 2
# Default lengths of a prompt and its continuation, in tokens.
CONTEXT = 112
TOKENS = 33
# Replayed decisions have confidence 0 or 1. Any threshold between them works.
THRESHOLD = 0.5
_DRAWN = 4096
# Bytes that bandwidth is measured on, which exceed any cache. The fastest of PASSES counts, because
# other work disturbed it least.
BUFFER = 1 << 30
PASSES = 3


def drawn(rate: float, seed: int) -> list[bool]:
    """Draw independent exits at `rate`."""
    return list(map(bool, np.random.default_rng(seed).random(_DRAWN) < rate))


@dataclass
class Script:
    """Exits to replay, repeated cyclically. Without a trace, predictions are the model's own."""

    trace: Sequence[bool] | None = None


class ReplayDecoder(Decoder):
    """Decoder that replays a script.

    All engines run as usual, so timings are those of such exits.
    """

    def __init__(self, script: Script, *arguments: Any, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self._script = script
        self._decided = 0

    def on_prefill_done(self) -> None:
        self._decided = 0

    def prediction(self) -> Prediction:
        shallow = super().prediction()
        trace = self._script.trace
        if trace is None:
            return shallow
        self._decided += 1
        return shallow._replace(confidence=float(trace[(self._decided - 1) % len(trace)]))


class ReplayFeatureDecoder(ReplayDecoder, FeatureDecoder):
    """Decoder with a separate exit engine that replays a script."""


def _replaying(
    script: Script, *arguments: Any, exit: Runner | None = None, **others: Any
) -> ReplayDecoder:
    if exit is None:
        return ReplayDecoder(script, *arguments, **others)
    return ReplayFeatureDecoder(script, *arguments, exit=exit, **others)


class ReplaySession(Session):
    """Session that replays the exits of `script` in mode free, unless the stack is full.

    It has one slot, no overlap and no prefix cache. Replays work with any threshold in (0, 1).
    """

    def __init__(self, bundle: Path | str, **options: Any) -> None:
        self.script = Script()
        self._decoder_type = partial(_replaying, self.script)
        fixed = {"overlap": False, "slots": 1, "prefix_cache_mb": 0}
        super().__init__(bundle, **{**options, **fixed})

    def __enter__(self) -> ReplaySession:
        return self


@dataclass(frozen=True)
class Sample:
    """Timing of a request.

    Attributes:
        free: The request ran in mode free, else in mode full.
        steps: Shallow steps.
        shallow: Seconds of all shallow steps.
        outside: Seconds outside the engines.
        sizes: Number of deep passes by their rows.
        deep: Mean seconds of a deep pass by its rows.
    """

    free: bool
    steps: int
    shallow: float
    outside: float
    sizes: Mapping[int, int]
    deep: Mapping[int, float]

    @classmethod
    def of(cls, free: bool, stats: Stats) -> Sample:
        """Build the sample of a request from its statistics."""
        deep = {
            rows: seconds / stats.sync_sizes[rows] for rows, seconds in stats.sync_seconds.items()
        }
        return cls(
            free,
            stats.candidates,
            stats.shallow_seconds,
            outside=stats.overhead_seconds,
            sizes=dict(stats.sync_sizes),
            deep=deep,
        )

    @property
    def passes(self) -> int:
        """Number of deep passes."""
        return sum(self.sizes.values())


def measured_costs(
    session: ReplaySession,
    prompts: Sequence[np.ndarray],
    tokens: int,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
) -> Costs:
    """Measure the costs of a session, and the cores that other processes use meanwhile.

    Args:
        session: A session without other requests.
        prompts: Token ids int64 [n] each, of typical lengths.
        tokens: Tokens to generate per request.
        rounds: Most repetitions of each request.
        seconds: Approximate time limit.
    """
    sizes = [size for size in SIZES if size <= session.manifest.max_pending]
    scripts = [[exits for size in sizes for exits in [True] * (size - 1) + [False]]]
    scripts += [drawn(rate, seed) for seed, rate in enumerate(RATES)]
    options: dict[str, Any] = {"max_new_tokens": max(2, tokens), "ignore_eos": True}

    def decode(script: list[bool] | None, prompt: np.ndarray) -> Sample:
        session.script.trace = script
        if script is None:
            return Sample.of(False, session.generate(prompt, mode="full", **options).stats)
        result = session.generate(
            prompt, mode="free", drafts="exit", threshold=THRESHOLD, **options
        )
        return Sample.of(True, result.stats)

    settings = [None, *scripts]
    began = perf_counter()
    for setting in settings:  # binds buffers and faults pages
        decode(setting, prompts[0])
    turns = int(seconds / (perf_counter() - began))
    count = max(1, min(PROMPTS, len(prompts), turns // rounds))
    # Short and long prompts, or only one of median length if there is no time for more.
    by_length = sorted(prompts, key=len)
    few = [by_length[int((place + 0.5) / count * len(prompts))] for place in range(count)]
    rounds = max(min(rounds, MIN_ROUNDS), min(rounds, turns // count))
    again: dict[tuple[int, int], list[Sample]] = defaultdict(list)
    with other_load() as load:
        for turn in interleave(
            settings, few, rounds, decode, warm_up=0, title="timing the engines"
        ):
            for number, sample in enumerate(turn.runs):
                again[turn.prompt, number].append(sample)
    session.script.trace = None
    typical = []
    for samples in again.values():  # medians over the runs of a request
        deep = {rows: median(sample.deep[rows] for sample in samples) for rows in samples[0].deep}
        shallow, outside = (
            median(getattr(sample, name) for sample in samples) for name in ("shallow", "outside")
        )
        typical.append(replace(samples[0], shallow=shallow, outside=outside, deep=deep))
    return replace(fit_costs(typical), busy=load.cores, host=host(session.threads))


def measured_in_child(
    bundle: Path, threads: int | None = None, tokens: int = TOKENS, context: int = CONTEXT
) -> Costs:
    """Run `measured_costs` in a child process, which frees all memory."""
    given = {"bundle": str(bundle), "threads": threads, "tokens": tokens, "context": context}
    found = json.loads(run_child("freeexport.costs.measured", json.dumps(given)))
    costs: Costs = Reader("measure again").read(Costs, found, "costs")
    return costs


def fit_costs(samples: Sequence[Sample]) -> Costs:
    """Fit costs to samples of both modes by least squares.

    A request in mode free is modelled as the sum of its steps and passes, each of which takes time
    inside and outside the engines.
    """
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
    """Fit the seconds of a step and of a pass, both at least 0."""
    counts = np.array([[sample.steps, sample.passes] for sample in samples], np.float64)
    (step, sync), *_ = np.linalg.lstsq(counts, np.array(seconds), rcond=None)
    if step < 0 or sync < 0:
        return max(0.0, sum(seconds) / float(counts[:, 0].sum())), 0.0
    return float(step), float(sync)


def _deep(samples: Sequence[Sample]) -> dict[int, float]:
    """Fit the seconds of a deep pass by its rows.

    The result is piecewise linear and never decreases. Its knots are the observed sizes nearest to
    those of SIZES, and the largest observed one.
    """
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
    """Measure in a child process the bytes per second that `threads` threads read together."""
    # Keep numpy's BLAS from starting further threads.
    alone = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return float(
        run_child("freeexport.costs.measured", json.dumps({"read_by": threads}), variables=alone)
    )


def measure_bandwidth(threads: int, size: int = BUFFER, passes: int = PASSES) -> float:
    """Measure the bytes per second that `threads` threads read together.

    Args:
        size: Bytes to read.
        passes: Repetitions. The fastest counts.
    """
    parts = np.array_split(np.ones(size // 8, np.int64), threads)
    # Which one is fastest depends on numpy's instructions for this processor.
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
    """Print the costs of a bundle as JSON, or the bandwidth for `{"read_by": THREADS}`.

    The argument is a JSON object with the arguments of `measured_in_child`.
    """
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
        # One window is enough: all have the same length, and encoding one is slow.
        if manifest.speech is not None:
            features = random.standard_normal(
                (manifest.speech.bins, 2 * manifest.encoder_capacity), np.float32
            )
            prompts = [SpeechPrompt.plain(manifest, features)]
        print(json.dumps(asdict(measured_costs(session, prompts, given["tokens"]))))


if __name__ == "__main__":
    main(sys.argv[1:])
