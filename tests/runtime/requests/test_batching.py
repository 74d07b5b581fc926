"""Requests that share engine calls: the results of each are those it has alone, and its troubles are its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
from checkpoints import PROMPTS, VOCAB_SIZE, Open
from draft_plans import draft_exits
from exit_layer_case import EXIT_CASES
from thread_runner import runners_beside

from runtime import BatchError, GenerationResult, OptionError, PromptError, QueueFullError
from runtime.decoding.calls import SlotCall
from runtime.engines.backend import Backend
from runtime.requests.batching import BatchedCall

LLAMA, T5 = "llama-tied", "t5-relu-tied"
T5_EXIT = next(case for case in EXIT_CASES if case.name == "t5-relu-tied-exit-layers")
LISTED = [list(prompt) for prompt in (*PROMPTS, (40, 41), (90,) * 7, tuple(range(50, 75)), PROMPTS[0][:4], (200, 9))]


@pytest.fixture
def open_session(open_session: Open) -> Open:
    return partial(open_session, slots=4)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences each shared call was for."""
    sizes: list[int] = []
    run = BatchedCall.run

    def watched(batch: BatchedCall, works: Sequence[SlotCall]) -> None:
        sizes.append(len(works))
        run(batch, works)

    monkeypatch.setattr(BatchedCall, "run", watched)
    return sizes


def same(ours: GenerationResult, alone: GenerationResult) -> None:
    assert (ours.token_ids, ours.exited, ours.text) == (alone.token_ids, alone.exited, alone.text)
    assert ours.finish_reason == alone.finish_reason
    for mine, theirs in zip(ours.confidence, alone.confidence, strict=True):
        assert mine == (None if theirs is None else pytest.approx(theirs, abs=1e-4))
    if alone.logprobs is not None:
        assert ours.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    counts = [
        (r.stats.tokens, r.stats.exits, r.stats.forced, r.stats.rejected, r.stats.sync_sizes) for r in (ours, alone)
    ]
    assert counts[0] == counts[1]


MODES: list[dict[str, Any]] = [
    {"mode": "full"},
    {"threshold": 0.3},
    {"threshold": 0.1, "max_pending": 3},
    {"threshold": 0.0},
    {"threshold": 0.2, "temperature": 0.8, "seed": 3, "output_logprobs": True},
    {"mode": "rollback", "threshold": 0.1, "rollback_threshold": 3.0},
    {"mode": "lossless", "threshold": 0.1, "drafts": "exit"},
    {"mode": "shallow"},
]
KINDS: list[tuple[Any, dict[str, Any]]] = [
    *((name, {}) for name in (LLAMA, T5, "qwen3", "umt5", "mistral-window", EXIT_CASES[0], T5_EXIT)),
    *((name, {"dialect": "standard"}) for name in (LLAMA, T5, T5_EXIT)),
    (T5_EXIT, {"precision": "int8", "kernels": "freeexport"}),
]


@pytest.mark.parametrize(("name", "convert"), KINDS, ids=lambda value: getattr(value, "name", str(value)))
def test_concurrent_requests_give_the_results_of_single_requests(
    name: Any, convert: dict[str, Any], open_session: Open, shared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In lists of one mode, and of all modes in threads, half of which stream, and in coroutines."""
    # How long lossless drafts are, and whose, is otherwise a matter of timing.
    draft_exits(monkeypatch)
    prompts = LISTED[:5]
    requests = [(prompt, {"max_new_tokens": 14, **options}) for options in MODES for prompt in prompts]
    single, session = open_session(name, convert=convert, slots=1), open_session(name, convert=convert)
    alone = [single.generate(prompt, **options) for prompt, options in requests]
    assert not shared
    assert any(any(result.exited) for result in alone)
    lists = [session.generate(prompts, max_new_tokens=14, **options) for options in MODES]

    def ask(number: int) -> GenerationResult:
        prompt, options = requests[number]
        if number % 2:
            return session.generate(prompt, **options)
        with session.stream(prompt, **options) as stream:
            assert tuple(token.id for token in stream) == stream.result.token_ids
        return stream.result

    async def together() -> list[GenerationResult]:
        return await asyncio.gather(*(session.agenerate(prompt, **options) for prompt, options in requests[::3]))

    with ThreadPoolExecutor(8) as pool:
        threads = list(pool.map(ask, range(len(requests))))
    for ways, wanted in (
        ([one for results in lists for one in results], alone),
        (threads, alone),
        (asyncio.run(asyncio.wait_for(together(), 60)), alone[::3]),
    ):
        for ours, theirs in zip(ways, wanted, strict=True):
            same(ours, theirs)
    assert max(shared) > 1


def test_encoder_decoder_requests_of_all_prompt_lengths_give_single_results(open_session: Open) -> None:
    session = open_session(T5, slots=3)
    prompts = [[7 + number % 100] * length for number, length in enumerate((1, 100, 3, 40, 33, 2, 64, 65, 5, 1))]
    alone = [session.generate(prompt, max_new_tokens=6, threshold=0.2) for prompt in prompts]
    for ours, theirs in zip(session.generate(prompts, max_new_tokens=6, threshold=0.2), alone, strict=True):
        same(ours, theirs)


# A list and its errors


def test_list_of_numbers_is_one_prompt_and_a_list_of_lists_is_several(open_session: Open) -> None:
    session = open_session()
    one = session.generate([5, 6], max_new_tokens=2)
    assert isinstance(one, GenerationResult)
    for prompts in ([[5, 6]], ([5, 6],), [np.array([5, 6])], [(5, 6)]):
        (only,) = session.generate(prompts, max_new_tokens=2)
        same(only, one)
    text, chat = session.generate(["Hi", [{"role": "user", "content": "Hi"}]], max_new_tokens=2)
    same(text, session.generate("Hi", max_new_tokens=2))
    same(chat, session.generate([{"role": "user", "content": "Hi"}], max_new_tokens=2))


def test_invalid_prompt_of_a_list_fails_and_the_others_finish(open_session: Open) -> None:
    session = open_session(draft_memory_mb=0)
    good = [session.generate(prompt, max_new_tokens=5) for prompt in LISTED[:2]]
    with pytest.raises(BatchError, match=r"2 of 4 prompts failed, first prompt 1: .*PromptLengthError.*129") as failed:
        session.generate([LISTED[0], [5] * 129, LISTED[1], [VOCAB_SIZE]], max_new_tokens=5)
    results = failed.value.results
    same(results[0], good[0])
    same(results[2], good[1])
    assert isinstance(results[1], PromptError)
    assert isinstance(results[3], PromptError)
    assert "\n" not in str(failed.value)


# Waiting, leaving, closing


def test_full_queue_refuses_a_request_and_a_list_may_exceed_the_queue(open_session: Open) -> None:
    session = open_session(slots=1, queue=0)
    assert len(session.generate(LISTED, max_new_tokens=2)) == len(LISTED)

    def slowly(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        threading.Event().wait(0.05)
        return scores

    with session.stream(LISTED[0], max_new_tokens=50, ignore_eos=True, logits_processor=slowly) as holder:
        next(holder)
        for ask in (lambda: session.generate(LISTED[1]), lambda: session.generate(LISTED)):
            with pytest.raises(QueueFullError, match="0 requests wait"):
                ask()
    assert session.generate(LISTED[1], max_new_tokens=2).stats.tokens == 2


def test_close_with_drain_finishes_all_requests(open_session: Open) -> None:
    session = open_session(slots=2)
    alone = [session.generate(prompt, max_new_tokens=20, mode="full") for prompt in LISTED[:4]]
    streams = [session.stream(prompt, max_new_tokens=20, mode="full") for prompt in LISTED[:4]]
    # The fourth has its place, and is not read before.
    for stream in streams[:3]:
        next(stream)
    assert not session.closed
    session.close(drain=True)
    assert session.closed
    for stream, theirs in zip(streams, alone, strict=True):
        list(stream)
        same(stream.result, theirs)
    for ask, prompt in ((session.stream, LISTED[3]), (session.generate, LISTED), (session.generate, LISTED[0])):
        with pytest.raises(OptionError, match="closed"):
            ask(prompt)


def test_close_without_drain_cancels_running_and_waiting_requests(open_session: Open) -> None:
    session = open_session(slots=1)
    began, results = threading.Event(), list[Any]()

    def watched(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        began.set()
        threading.Event().wait(0.05)
        return scores

    def ask() -> None:
        results.extend(session.generate(LISTED[:3], max_new_tokens=80, ignore_eos=True, logits_processor=watched))

    thread = threading.Thread(target=ask)
    thread.start()
    assert began.wait(20)
    session.close()
    thread.join(20)
    assert [result.finish_reason for result in results] == ["cancelled"] * 3
    assert len(results[0].token_ids) < 80


def test_overlapping_sessions_batch_their_shallow_steps(
    open_session: Open, shared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backend, "runners", runners_beside)
    session = open_session()
    options: dict[str, Any] = {"threshold": 0.1, "max_new_tokens": 12, "sync_every": 2}
    alone = [session.generate(prompt, **options) for prompt in LISTED]
    for ours, theirs in zip(session.generate(LISTED, **options), alone, strict=True):
        assert (ours.token_ids, ours.exited) == (theirs.token_ids, theirs.exited)
    assert shared


# asyncio


def test_cancelled_coroutine_releases_its_slot_and_errors_propagate(open_session: Open) -> None:
    session, began = open_session(slots=1), threading.Event()
    endless: dict[str, Any] = {"max_new_tokens": 100, "ignore_eos": True}

    def slow(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        began.set()
        threading.Event().wait(0.05)
        return scores

    def broken(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        raise ValueError("broken")

    async def main() -> None:
        task = asyncio.create_task(session.agenerate(LISTED[0], logits_processor=slow, **endless))
        while not began.is_set():
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async for _ in session.astream(LISTED[1], **endless):
            break
        assert (await session.agenerate(LISTED[0], max_new_tokens=3)).stats.tokens == 3
        with pytest.raises(ValueError, match="broken"):
            await session.agenerate(LISTED[0], logits_processor=broken)
        with pytest.raises(BatchError, match="2 of 2"):
            await session.agenerate(LISTED[:2], logits_processor=broken)
        with pytest.raises(PromptError):
            await session.agenerate([VOCAB_SIZE])

    asyncio.run(asyncio.wait_for(main(), 60))
