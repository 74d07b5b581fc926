"""Streams of threads and of asyncio programs: when they are taken, what they give, and how they end."""

from __future__ import annotations

import asyncio
import threading
from time import monotonic
from typing import Any

import numpy as np
import pytest
from checkpoints import PROMPTS, Open

from runtime import AsyncStream, GenerationResult, QueueFullError

PROMPT = list(PROMPTS[0])
ENDLESS: dict[str, Any] = {"max_new_tokens": 100, "ignore_eos": True}


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


def slowly(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    threading.Event().wait(0.01)
    return scores


# Admission


def test_full_queue_is_reported_when_the_stream_is_created(open_session: Open) -> None:
    session, refused = open_session(queue=1), threading.Event()

    def held(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        assert refused.wait(60)
        return scores

    waits: dict[str, Any] = {"max_new_tokens": 9, "ignore_eos": True, "logits_processor": held}
    taken = [session.stream(PROMPT, **waits), session.astream(PROMPT, **waits)]
    for ask in (session.stream, session.astream, session.generate):
        with pytest.raises(QueueFullError, match="1 request waits for a slot already"):
            ask(PROMPT)

    async def main() -> None:
        for ask in (session.agenerate(PROMPT), session.agenerate([PROMPT, PROMPT])):
            with pytest.raises(QueueFullError):
                await ask
        refused.set()
        assert [token.id async for token in taken[1]] == list(taken[1].result.token_ids)

    run(main())
    assert [token.id for token in taken[0]] == list(taken[0].result.token_ids)
    assert session.generate(PROMPT, max_new_tokens=2).stats.tokens == 2


@pytest.mark.parametrize("way", ["close", "aclose", "forget"])
def test_abandoned_unread_streams_free_queue_places(way: str, open_session: Open) -> None:
    session = open_session(queue=0)
    alone = session.generate(PROMPT, max_new_tokens=3)
    for _ in range(3):
        stream: Any = session.astream(PROMPT) if way == "aclose" else session.stream(PROMPT)
        if way == "close":
            stream.close()
        elif way == "aclose":
            run(stream.aclose())
        del stream
    assert session.generate(PROMPT, max_new_tokens=3).token_ids == alone.token_ids


# What they give


def test_async_stream_has_a_result(open_session: Open) -> None:
    session = open_session()
    alone = session.generate(PROMPT, max_new_tokens=12)

    async def main() -> None:
        stream = session.astream(PROMPT, max_new_tokens=12)
        assert isinstance(stream, AsyncStream)
        assert stream.result.token_ids == ()
        first = await anext(stream)
        assert stream.result.token_ids[0] == first.id
        tokens = [first, *[token async for token in stream]]
        result = stream.result
        assert tuple(token.id for token in tokens) == result.token_ids == alone.token_ids
        assert "".join(token.text for token in tokens) == result.text == alone.text
        assert result.finish_reason == alone.finish_reason
        assert [token async for token in stream] == []
        assert (await session.astream(PROMPT, max_new_tokens=12).drain()).token_ids == alone.token_ids

    run(main())


def test_closed_async_stream_releases_its_slot(open_session: Open) -> None:
    session = open_session()
    whole = session.generate(PROMPT, **ENDLESS)

    async def main() -> None:
        async with session.astream(PROMPT, logits_processor=slowly, **ENDLESS) as stream:
            first = await anext(stream)
        await stream.aclose()
        assert [token async for token in stream] == []
        assert stream.result.finish_reason == "cancelled"
        assert first.id == whole.token_ids[0]
        assert len(stream.result.token_ids) < 100
        assert (await session.agenerate(PROMPT, max_new_tokens=3)).stats.tokens == 3

    run(main())


# Ends, and how long it took


def test_deadline_and_cancel_have_different_finish_reasons(open_session: Open) -> None:
    session, cancel = open_session(), threading.Event()
    late = session.generate(PROMPT, deadline=0.1, logits_processor=slowly, **ENDLESS)
    assert (late.finish_reason, late.complete, late.interrupted) == ("deadline", False, True)
    cancel.set()
    ended = session.generate(PROMPT, deadline=60, cancel=cancel, **ENDLESS)
    assert (ended.finish_reason, ended.complete, ended.interrupted) == ("cancelled", False, True)
    whole = session.generate(PROMPT, deadline=60, **ENDLESS)
    assert (whole.finish_reason, whole.complete, whole.interrupted) == ("length", False, False)
    with session.stream(PROMPT, deadline=60, logits_processor=slowly, **ENDLESS) as stream:
        next(stream)
    assert stream.result.finish_reason == "cancelled"


def test_deadline_ends_a_list_waiting_for_slots(open_session: Open) -> None:
    session = open_session()
    began = monotonic()
    results = session.generate([PROMPT] * 2000, deadline=0.3, logits_processor=slowly, **ENDLESS)
    assert monotonic() - began < 60, "one after the other they take ten minutes"
    assert [result.finish_reason for result in results] == ["deadline"] * 2000
    assert results[-1].token_ids == ()


@pytest.mark.parametrize("way", ["stream", "astream"])
def test_statistics_include_queue_time_and_time_to_first_token(way: str, open_session: Open) -> None:
    session, both = open_session(), threading.Event()

    def pause(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        assert both.wait(60)
        threading.Event().wait(0.02)
        return scores

    def ask() -> GenerationResult:
        if way == "stream":
            return session.generate(PROMPT, max_new_tokens=10, ignore_eos=True, logits_processor=pause)
        return run(session.agenerate(PROMPT, max_new_tokens=10, ignore_eos=True, logits_processor=pause))

    results: list[GenerationResult] = []
    threads = [threading.Thread(target=lambda: results.append(ask())) for _ in range(2)]
    began = monotonic()
    for thread in threads:
        thread.start()
    while session.metrics().waiting == 0:
        threading.Event().wait(0.002)
    both.set()
    for thread in threads:
        thread.join(60)
    took = monotonic() - began
    first, second = sorted((result.stats for result in results), key=lambda stats: stats.queue_seconds)
    # The second waits for the ten tokens of the first.
    assert 0 <= first.queue_seconds < second.queue_seconds
    assert second.queue_seconds > 0.15
    for stats in (first, second):
        assert stats.queue_seconds + 0.015 < stats.first_token_seconds < took
