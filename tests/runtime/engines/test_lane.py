"""Overlapped runners: the same tokens as without, whatever either runner takes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, PROMPTS, Bundles
from draft_plans import PlannedDrafts, draft_exits
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from recording_engine import LENGTH, WIDTH, Recorder, alone, cached, decoded, prompt_of
from thread_runner import ThreadRunner, runners_beside

from runtime import Session
from runtime.bundle.beta import NEVER_EXIT
from runtime.decoding.decoder import Decoder
from runtime.decoding.drafts import ConfidentExits, Plain
from runtime.decoding.loops import Policy
from runtime.decoding.overlapping import OverlappingDecoder
from runtime.engines.backend import Backend
from runtime.engines.kv_cache import KVCache
from runtime.engines.onnx import Call
from runtime.engines.runner import Runner
from runtime.result import Token


class Delayed:
    """A call that pauses before it runs, or raises instead."""

    def __init__(self, call: Any, engine: DelayedRecorder) -> None:
        self._call, self._engine = call, engine

    def run(self) -> None:
        time.sleep(self._engine.chance.choice(self._engine.pauses))
        if self._engine.error is not None:
            raise self._engine.error
        self._call.run()


class DelayedRecorder(Recorder):
    chance = random.Random(0)
    pauses: tuple[float, ...] = (0.0, 0.0, 0.0002, 0.0004)
    error: Exception | None = None

    def bind(self, inputs: Any, outputs: Any) -> Any:
        return Delayed(super().bind(inputs, outputs), self)


def decoder_of(
    beside: bool, trace: list[float], agrees: list[bool], nll: list[float], max_pending: int, seed: int
) -> tuple[Decoder, Recorder, Recorder]:
    runners = []
    for name, layers in (("shallow", range(2)), ("deep", range(2, 5))):
        cache = KVCache(layers, 1, 1, 200, 1, np.float32)
        engine = (DelayedRecorder if beside else Recorder)(cache, name, trace, nll, agrees)
        if isinstance(engine, DelayedRecorder):
            engine.chance = random.Random(f"{name} {seed}")
        runner = ThreadRunner if beside and name == "deep" else Runner
        runners.append(runner(engine, cache))  # type: ignore[arg-type]
    given = runners[0], runners[1], 0, WIDTH, 1, max_pending
    decoder = OverlappingDecoder(*given) if beside else Decoder(*given)
    return decoder, runners[0].engine, runners[1].engine  # type: ignore[return-value]


def steps_of(
    decoder: Decoder, mode: str, threshold: float, max_pending: int, sync_every: int, tokens: int
) -> list[Token]:
    ways: dict[str, tuple[Plain | None, Policy]] = {
        "full": (None, Policy()),
        "published": (ConfidentExits(NEVER_EXIT), Policy(threshold, sync_every=sync_every)),
        "free": (PlannedDrafts(threshold=0.3), Policy(threshold, sync_every=sync_every)),
        "rollback": (ConfidentExits(threshold), Policy(limit=2.0)),
        "lossless": (PlannedDrafts(), Policy()),
    }
    drafts, policy = ways[mode]
    policy = policy._replace(max_pending=max_pending)
    return list(alone(decoded(decoder, prompt_of(3), tokens, drafts, policy)))


@pytest.mark.parametrize("mode", ["published", "free", "rollback", "lossless", "full"])
@given(
    trace=st.lists(st.sampled_from([0.1, 0.6, 0.9, 0.9]), min_size=LENGTH, max_size=LENGTH),
    agrees=st.lists(st.sampled_from([True, True, False]), min_size=LENGTH, max_size=LENGTH),
    nll=st.lists(st.sampled_from([0.0, 1.0, 3.0]), min_size=LENGTH, max_size=LENGTH),
    max_pending=st.integers(1, 8),
    sync_every=st.integers(0, 4),
    tokens=st.integers(1, 30),
    seed=st.integers(0, 2**31),
)
@tries(25)
def test_overlap_changes_no_token(
    mode: str,
    trace: list[float],
    agrees: list[bool],
    nll: list[float],
    max_pending: int,
    sync_every: int,
    tokens: int,
    seed: int,
) -> None:
    outcomes = []
    for beside in (False, True):
        decoder, shallow, deep = decoder_of(beside, trace, agrees, nll, max_pending, seed)
        steps = steps_of(decoder, mode, 0.5, max_pending, sync_every, tokens)
        stats = decoder.stats
        outcomes.append((steps, stats.exits, stats.forced, stats.rejected))
        read = (*prompt_of(3).tolist(), *(step.id for step in steps[:-1]))
        if decoder.stacked:
            decoder.sync()
        shallow_length, deep_length = decoder.lengths()
        count = min(deep_length, len(read))
        assert cached(shallow, count) == cached(deep, count) == {read[:count]}
        assert deep_length == shallow_length
        decoder.reset()
        assert decoder.lengths() == (0, 0)
    assert outcomes[0] == outcomes[1]


def overlapped(confidence: float, agrees: bool = True) -> tuple[Decoder, Recorder, DelayedRecorder]:
    """Lanes of which the deep one is slow."""
    decoder, shallow, deep = decoder_of(True, [confidence] * 40, [agrees] * 40, [0.0] * 40, 16, seed=3)
    assert isinstance(shallow, DelayedRecorder)
    assert isinstance(deep, DelayedRecorder)
    decoder.prefill(prompt_of(2), head=True)
    # Long beside what a busy machine takes to wake a thread that waits.
    shallow.pauses, deep.pauses = (0.05,), (0.15,)
    return decoder, shallow, deep


def test_deep_pass_starts_in_the_background_once_enough_tokens_are_pending() -> None:
    decoder, _, deep = overlapped(0.9)
    for token in range(5):
        decoder.step(token, head=True)
        decoder.start_sync(3)
    assert decoder.stacked == 5
    decoder.sync()
    # Three rows without a head; the others found the runner busy, and came with the pass that answers.
    assert (deep.calls, deep.heads) == ([2, 3, 2], [1, 0, 1])
    assert decoder.lengths() == (7, 7)


def test_background_error_reaches_the_caller() -> None:
    decoder, _, deep = overlapped(0.9)
    decoder.step(5, head=True)
    deep.error = MemoryError("no room")
    decoder.start_sync(1)
    decoder.step(6, head=True)
    with pytest.raises(MemoryError, match="no room"):
        decoder.sync()
    # It does not reach the next request.
    decoder.start_sync(1)
    decoder.reset()
    deep.error = None
    assert decoder.prefill(prompt_of(3), head=True).token == 1002
    assert decoder.lengths() == (3, 3)


@pytest.fixture(scope="module")
def pairs(bundle: Bundles) -> Iterator[Callable[[str], tuple[Session, Session]]]:
    opened: dict[str, tuple[Session, Session]] = {}

    def pair(name: str) -> tuple[Session, Session]:
        if name not in opened:
            path = bundle(BY_NAME[name], 2)
            plain = Session(path, threads=1, slots=3)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Backend, "runners", runners_beside)
                opened[name] = plain, Session(path, threads=1, slots=3)
        return opened[name]

    yield pair
    for sessions in opened.values():
        for session in sessions:
            session.close()


@pytest.mark.parametrize("name", ["llama-tied", "t5-relu-tied"])
@pytest.mark.parametrize("mode", ["free", "rollback", "lossless", "full"])
def test_tokens_are_equal_with_and_without_overlap_and_across_threads(
    name: str, mode: str, pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, overlapped = pairs(name)
    assert (plain.overlap, overlapped.overlap) == (False, True)
    draft_exits(monkeypatch)
    requests: list[dict[str, Any]] = [
        {"threshold": threshold, "max_pending": max_pending, **sampling}
        for threshold, max_pending in ((0.05, 16), (0.3, 3))
        for sampling in ({}, {"temperature": 0.9, "seed": 4})
    ]
    for options in requests:
        options.update(mode=mode, rollback_threshold=3.0, max_new_tokens=20, ignore_eos=True, sync_every=2)
    expected = [plain.generate(PROMPTS[0], **options) for options in requests]
    chance, run = random.Random(name + mode), Call.run

    def delayed(call: Call) -> None:
        time.sleep(chance.choice((0.0, 0.0002, 0.001)))
        run(call)

    monkeypatch.setattr(Call, "run", delayed)
    results: list[Any] = [None] * len(requests)

    def ask(number: int) -> None:
        results[number] = overlapped.generate(PROMPTS[0], **requests[number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.exited == theirs.exited
        assert ours.confidence == pytest.approx(theirs.confidence, abs=1e-5)
        assert ours.stats.rejected == theirs.stats.rejected
        assert ours.stats.overhead_seconds >= 0
    if mode == "free":
        assert any(ours.stats.overlapped_seconds > 0 for ours in results)
        # A stream that is closed early leaves its slot sound, here every slot.
        for count in range(1, 7):
            with overlapped.stream(PROMPTS[0], **requests[0]) as stream:
                assert tuple(token.id for token in islice(stream, count)) == expected[0].token_ids[:count]
        assert overlapped.generate(PROMPTS[0], **requests[0]).token_ids == expected[0].token_ids
