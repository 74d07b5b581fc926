"""Counts of a session, and its events."""

from __future__ import annotations

import itertools
import threading
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

from runtime import GenerationResult, Metrics, OptionError, QueueFullError, RequestEvent, Session, Stats
from runtime.requests.metrics import TOKEN_SECONDS, Histogram
from runtime.result import PassStats

PROMPT = [5, 6, 7]


def test_histogram_bucket_includes_its_upper_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    histogram.observe(2.0, times=3)
    assert (histogram.counts, histogram.total) == ([2, 4, 1], 18.0)


def test_drafts_are_counted_in_the_modes_that_verify() -> None:
    longer = {3: PassStats(2)}
    given: dict[str, Any] = {"tokens": 11, "exits": 6, "rejected": 2, "single_passes": 4, "longer_passes": longer}
    stats = [Stats("lossless", **given), Stats("free", **given)]
    for source, proposed, accepted in (("lookup", 3, 2), ("lookup", 7, 0), ("exit", 2, 2), ("exit", 4, 3)):
        stats[0].count_draft(source, proposed, accepted)
    assert stats[0].drafts["lookup"].by_position == [(1, 2), (1, 1), (0, 1)]
    assert stats[0].drafts["exit"].by_position == [(2, 2), (2, 2), (1, 1), (0, 1)]
    counted = Metrics()
    for each in stats:
        counted.add(GenerationResult("", (), (), (), "eos", each), [1.0, 1.002, 1.003])
    assert (counted.drafts, counted.draft_tokens, counted.accepted_tokens) == (2, 10, 8)
    assert counted.accepted_at == {0: 3, 1: 3, 2: 1}
    assert (counted.exited_tokens, counted.deep_tokens, counted.rejected_tokens) == (12, 10, 4)
    assert counted.deep_passes == 12
    assert counted.pass_rows.counts[:3] == [8, 0, 4]
    assert sum(counted.inter_token_latency.counts) == 4
    assert counted.inter_token_latency.counts[TOKEN_SECONDS.index(0.001) : TOKEN_SECONDS.index(0.0025) + 1] != [0, 0]


def test_requests_are_counted_by_finish_reason(chat: Path) -> None:
    gate = threading.Event()

    def hold(ids: Any, scores: Any) -> Any:
        assert ids.shape[1] == len(PROMPT) or gate.wait(30)  # from the second token on
        return scores

    with Session(chat, threads=1, slots=1) as session:
        results = session.generate([PROMPT, PROMPT], max_new_tokens=9, threshold=0.3)
        stream = session.stream(PROMPT, max_new_tokens=9, logits_processor=hold)
        next(stream)
        during = session.metrics()
        threading.Timer(0.2, gate.set).start()
        stream.close()
        after = session.metrics()
    assert (during.running, during.waiting) == (1, 0)
    assert 3 / 4096 <= during.kv_cache_usage <= 5 / 4096
    assert (after.running, after.kv_cache_usage) == (0, 0)
    assert after.finished == {"length": 2, "cancelled": 1}
    assert after.generated_tokens == during.generated_tokens + len(stream.result.token_ids) < 18 + 9
    assert after.prompt_tokens == 9
    assert after.exited_tokens == sum(result.stats.exits for result in results)
    assert sum(after.time_to_first_token.counts) == sum(after.queue_time.counts) == 3
    assert during.finished == {"length": 2}  # a copy


def test_request_events_are_ordered(chat: Path) -> None:
    told: list[RequestEvent] = []
    with Session(chat, threads=1, slots=1, queue=0, on_event=told.append) as session:
        result = session.generate(PROMPT, max_new_tokens=3)
        with session.stream(PROMPT, max_new_tokens=4000, ignore_eos=True), pytest.raises(QueueFullError):
            session.generate(PROMPT)
    of = {number: list(events) for number, events in itertools.groupby(told[:4], lambda event: event.request)}
    assert [event.kind for event in of[0]] == ["queued", "started", "first_token", "ended"]
    assert of[0][-1].result == result
    assert [event.time for event in of[0]] == sorted(event.time for event in of[0])
    refused = [event for event in told if event.request == 2]
    assert [event.kind for event in refused] == ["queued", "ended"]
    assert isinstance(refused[-1].error, QueueFullError)
    left = [event for event in told if event.request == 1]
    assert (left[0].kind, left[-1].kind) == ("queued", "ended")  # it may have started
    assert left[-1].result is not None
    assert left[-1].result.finish_reason == "cancelled"


def test_queued_events_run_in_the_context_of_the_caller(chat: Path) -> None:
    span, told = ContextVar[str]("span", default="none"), list[tuple[str, int, str]]()
    span.set("parent")

    def hook(event: RequestEvent) -> None:
        told.append((event.kind, event.request, span.get()))

    with Session(chat, threads=1, slots=1, on_event=hook) as session:
        session.generate([PROMPT] * 4, max_new_tokens=2)
    assert [event for event in told if event[0] == "queued"] == [("queued", n, "parent") for n in range(4)]
    assert sorted(number for kind, number, _ in told if kind == "ended") == [0, 1, 2, 3]


def test_failed_request_is_counted_as_an_error(chat: Path) -> None:
    def broken(ids: Any, scores: Any) -> Any:
        raise ArithmeticError("broken")

    told: list[RequestEvent] = []
    with Session(chat, threads=1, on_event=told.append) as session:
        with pytest.raises(ArithmeticError):
            session.generate(PROMPT, logits_processor=broken)
        assert session.metrics().finished == {"error": 1}
    assert isinstance(told[-1].error, ArithmeticError)


def test_failing_event_hook_ends_no_request_and_cannot_call_its_session(chat: Path) -> None:
    def hook(event: RequestEvent) -> None:
        session.generate(PROMPT)

    warned = pytest.warns(RuntimeWarning, match="on_event raised OptionError: a callback called its own")
    with Session(chat, threads=1, on_event=hook) as session, warned:
        assert len(session.generate(PROMPT, max_new_tokens=3).token_ids) == 3
    with pytest.raises(OptionError, match="on_event is 3; give a callable"):
        Session(chat, on_event=3)  # type: ignore[arg-type]
