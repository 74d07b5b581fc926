"""Counts of a session's requests, and the events of each while it runs."""

from __future__ import annotations

import copy
import itertools
import threading
import time
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from runtime.result import GenerationResult

# Upper bounds, seconds: of waiting and whole requests, and of the time between two tokens.
REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
PASS_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)

EventKind = Literal["queued", "started", "first_token", "ended"]


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """An event of a request, numbered within its session, at `time`, seconds since 1970.

    "queued": it was asked for, in the context of who asked. "started": its prompt is read next. "first_token". "ended":
    with its `result`, or the `error` that it raised, such as QueueFullError.
    """

    kind: EventKind
    request: int
    time: float
    result: GenerationResult | None = None
    error: BaseException | None = None


@dataclass(slots=True)
class Histogram:
    """`counts[i]` values are at most `bounds[i]` and more than the bound before; the last count is of those above all
    bounds. `total` is their sum."""

    bounds: Sequence[float] = REQUEST_SECONDS
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


@dataclass(slots=True)
class Metrics:
    """Counts since the session was opened; tokens and passes of a request are added when it ends, seconds are seconds.

    running, waiting: requests with and without a slot. kv_cache_usage: share of all slots' positions in use.
    finished: requests by finish reason, "error" for those that raised. deep_passes: sync passes, after the prompt.
    exited_tokens, deep_tokens: accepted shallow predictions, and deep ones. forced_tokens: those that a grammar left no
    choice for, which no decoder predicted. rejected_tokens: shallow predictions that a deep pass rejected. drafts,
    draft_tokens, accepted_tokens: of modes "lossless" and "rollback", drafts from the text included. accepted_at:
    accepted tokens of mode "lossless" by their place in the draft, from 0. threshold: with which a request of mode
    "free" without its own would begin now.
    prefix_cache_queries: prompt tokens that were looked up, 0 where a session keeps no prefixes; prefix_cache_hits:
    those that were reused.
    """

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    threshold: float = 1.0
    prompt_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    generated_tokens: int = 0
    exited_tokens: int = 0
    deep_tokens: int = 0
    forced_tokens: int = 0
    deep_passes: int = 0
    rejected_tokens: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: Counter[int] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)
    time_to_first_token: Histogram = field(default_factory=Histogram)
    inter_token_latency: Histogram = field(default_factory=lambda: Histogram(TOKEN_SECONDS))
    request_latency: Histogram = field(default_factory=Histogram)
    queue_time: Histogram = field(default_factory=Histogram)
    prefill_time: Histogram = field(default_factory=Histogram)
    decode_time: Histogram = field(default_factory=Histogram)
    pass_rows: Histogram = field(default_factory=lambda: Histogram(PASS_ROWS))

    def add(self, result: GenerationResult, token_times: Sequence[float]) -> None:
        """Count a continuation of a prompt, whose tokens became final at these times."""
        stats = result.stats
        self.generated_tokens += stats.tokens
        self.exited_tokens += stats.exits
        self.deep_tokens += max(0, stats.tokens - stats.exits - stats.forced_tokens)
        self.forced_tokens += stats.forced_tokens
        self.deep_passes += stats.sync_passes
        self.rejected_tokens += stats.rejected
        if stats.mode in ("lossless", "rollback"):
            self.drafts += sum(count for rows, count in stats.sync_sizes.items() if rows > 1)
            self.draft_tokens += stats.accepted + stats.rejected
            self.accepted_tokens += stats.accepted
            for counts in stats.drafts.values():
                self.accepted_at.update(
                    {at: right for at, (right, _) in enumerate(counts.by_position) if right}
                )
        for rows, count in stats.sync_sizes.items():
            self.pass_rows.observe(rows, count)
        for earlier, later in itertools.pairwise(token_times):
            self.inter_token_latency.observe(later - earlier)


class Observer:
    """Counts the requests of a session, and calls `hook` with each event: "queued" in the context of who asks, the rest
    in the worker. What the hook raises is a warning: it ends no request."""

    def __init__(self, hook: Callable[[RequestEvent], None] | None) -> None:
        self._hook = hook
        self.next_number = itertools.count().__next__
        self._lock = threading.Lock()
        self._metrics = Metrics()

    def tell(
        self,
        kind: EventKind,
        number: int,
        result: GenerationResult | None = None,
        error: BaseException | None = None,
    ) -> None:
        if self._hook is None:
            return
        try:
            self._hook(RequestEvent(kind, number, time.time(), result, error))
        except Exception as failure:
            text = f"on_event raised {type(failure).__name__}: {failure}; fix it"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def ended(
        self,
        number: int,
        asked: float,
        results: Sequence[GenerationResult],
        times: Sequence[Sequence[float]],
        error: BaseException | None,
    ) -> None:
        """A request that was asked for at this time of the monotonic clock has ended, with these continuations, whose
        tokens became final at these times."""
        first = results[0]
        with self._lock:
            metrics = self._metrics
            stats = first.stats
            metrics.finished[first.finish_reason if error is None else "error"] += 1
            metrics.request_latency.observe(time.monotonic() - asked)
            for result, token_times in zip(results, times, strict=True):
                metrics.add(result, token_times)
            metrics.prompt_tokens += stats.prompt_tokens
            metrics.prefix_cache_hits += stats.cached_tokens
            if stats.mode is not None:  # it had a slot
                prefill = stats.encode_seconds + stats.prefill_seconds
                metrics.queue_time.observe(stats.queue_seconds)
                metrics.prefill_time.observe(prefill)
                metrics.decode_time.observe(
                    max(0.0, sum(each.stats.seconds for each in results) - prefill)
                )
            if first.token_ids:
                metrics.time_to_first_token.observe(stats.first_token_seconds)
        self.tell("ended", number, None if error is not None else first, error)

    def metrics(self) -> Metrics:
        with self._lock:
            return copy.deepcopy(self._metrics)
