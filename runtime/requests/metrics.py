"""Metrics of a session, and the events of its requests."""

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

# Upper bounds in seconds, of queueing and whole requests, and of the time between two tokens.
REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
PASS_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)

EventKind = Literal["queued", "started", "first_token", "ended"]


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """An event of a request.

    Attributes:
        kind: "queued": the request was made, in the context of its caller. "started": its prompt is
            read next. "first_token": the first token is final. "ended": it has a result or an
            error.
        request: Number of the request within its session.
        time: Seconds since 1970.
        result: Result of a request that ended.
        error: Exception that ended it, such as QueueFullError.
    """

    kind: EventKind
    request: int
    time: float
    result: GenerationResult | None = None
    error: BaseException | None = None


@dataclass(slots=True)
class Histogram:
    """Histogram of values.

    Attributes:
        bounds: Upper bounds of the buckets, inclusive.
        counts: Values per bucket. The last one counts values above all bounds.
        total: Sum of the values.
    """

    bounds: Sequence[float] = REQUEST_SECONDS
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, or `times` equal ones."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


@dataclass(slots=True)
class Metrics:
    """Metrics since the session was opened.

    Tokens and passes of a request are added when it ends. Times are in seconds.

    Attributes:
        running: Requests that have a slot.
        waiting: Requests that wait for a slot.
        kv_cache_usage: Used share of the positions of all slots.
        threshold: Current threshold of requests in mode "free" that set none.
        prompt_tokens: Tokens of prompts.
        prefill_only_tokens: Tokens computed by requests with `max_new_tokens` 0, which count
            nowhere else.
        prefix_cache_queries: Prompt tokens looked up in the prefix cache. 0 if it is disabled.
        prefix_cache_hits: Prompt tokens that were reused.
        generated_tokens: Generated tokens.
        exited_tokens: Accepted shallow predictions.
        deep_tokens: Deep predictions.
        forced_tokens: Tokens that a grammar forced, without a prediction.
        deep_passes: Sync passes, without those of prompts.
        rejected_tokens: Shallow predictions that a deep pass rejected.
        drafts: Drafts in modes "lossless" and "rollback", including those from text.
        draft_tokens: Tokens of these drafts.
        accepted_tokens: Accepted tokens of these drafts.
        accepted_at: Accepted tokens in mode "lossless" by position in the draft, from 0.
        finished: Requests by finish reason, "error" for those that raised an exception.
        time_to_first_token: From the call to the first token.
        inter_token_latency: Between two tokens.
        request_latency: From the call to the end.
        queue_time: From the call until a slot was free.
        prefill_time: Encoding and reading the prompt.
        decode_time: The rest of the time in the slot.
        pass_rows: Tokens per sync pass.
    """

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    threshold: float = 1.0
    prompt_tokens: int = 0
    prefill_only_tokens: int = 0
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

    def add_request(self, results: Sequence[GenerationResult]) -> None:
        """Add the prompt and the times of a finished request, from its continuations."""
        first = results[0]
        stats = first.stats
        self.prompt_tokens += stats.prompt_tokens
        self.prefix_cache_hits += stats.cached_tokens
        if stats.mode is not None:  # it had a slot
            prefill = stats.encode_seconds + stats.prefill_seconds
            self.queue_time.observe(stats.queue_seconds)
            self.prefill_time.observe(prefill)
            decoding = sum(each.stats.seconds for each in results) - prefill
            self.decode_time.observe(max(0.0, decoding))
        if first.token_ids:
            self.time_to_first_token.observe(stats.first_token_seconds)

    def add(self, result: GenerationResult, token_times: Sequence[float]) -> None:
        """Add a finished continuation of a prompt.

        `token_times` are the times at which its tokens became final.
        """
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
    """Counts the requests of a session and calls `hook` with each event.

    "queued" is reported in the context of the caller, all others in the worker. Exceptions of the
    hook become warnings and do not end the request.
    """

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
        """Report an event to the hook, if there is one."""
        if self._hook is None:
            return
        try:
            self._hook(RequestEvent(kind, number, time.time(), result=result, error=error))
        except Exception as failure:
            text = f"on_event raised {type(failure).__name__}: {failure}; fix it"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def ended(
        self,
        number: int,
        arrival: float,
        results: Sequence[GenerationResult],
        times: Sequence[Sequence[float]],
        error: BaseException | None,
    ) -> None:
        """Count a request that has ended, and report it.

        A request that only reads its prompt adds to `prefill_only_tokens` and to nothing else.

        Args:
            number: Number of the request.
            arrival: Time of the call, on the monotonic clock.
            results: Results of its continuations.
            times: Times at which their tokens became final.
            error: Exception that ended it.
        """
        first = results[0]
        reads_only = error is None and first.finish_reason == "length" and not first.token_ids
        with self._lock:
            metrics = self._metrics
            if reads_only:
                metrics.prefill_only_tokens += first.stats.prompt_tokens - first.stats.cached_tokens
            else:
                metrics.finished[first.finish_reason if error is None else "error"] += 1
                metrics.request_latency.observe(time.monotonic() - arrival)
                metrics.add_request(results)
                for result, token_times in zip(results, times, strict=True):
                    metrics.add(result, token_times)
        self.tell("ended", number, None if error is not None else first, error)

    def metrics(self) -> Metrics:
        """Return a copy of the current metrics."""
        with self._lock:
            return copy.deepcopy(self._metrics)
