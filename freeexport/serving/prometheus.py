"""Prometheus metrics of sessions."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from freeexport.serving.service import Service
from runtime import Histogram

PREFIX = "freeexport_"
FINISHED = ("eos", "stop", "length", "cancelled", "deadline", "error")

# Name in Prometheus, then field of Metrics and help text.
GAUGES = {
    "num_requests_running": ("running", "Number of requests being decoded."),
    "num_requests_waiting": ("waiting", "Number of requests waiting for a slot."),
    "kv_cache_usage_perc": ("kv_cache_usage", "KV cache usage. 1 means 100 percent usage."),
    "threshold": (
        "threshold",
        "Current confidence threshold of mode free. Changes over time if it is adaptive.",
    ),
}
COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Number of prefill tokens processed."),
    "prefill_only_tokens": (
        "prefill_only_tokens",
        "Number of tokens that were only read, for the prefix cache.",
    ),
    "prefix_cache_queries": (
        "prefix_cache_queries",
        "Prefix cache queries, in prompt tokens.",
    ),
    "prefix_cache_hits": ("prefix_cache_hits", "Prefix cache hits, in prompt tokens."),
    "generation_tokens": ("generated_tokens", "Number of generated tokens."),
    "forced_tokens": (
        "forced_tokens",
        "Number of tokens determined by a grammar, which need no prediction.",
    ),
    "deep_passes": ("deep_passes", "Number of sync passes of the deep decoder, without prefill."),
    "rollback_tokens": ("rejected_tokens", "Number of exited tokens rejected by a sync pass."),
    "spec_decode_num_drafts": (
        "drafts",
        "Number of verified drafts, in modes lossless and rollback.",
    ),
    "spec_decode_num_draft_tokens": (
        "draft_tokens",
        "Number of draft tokens, from the exit and from text.",
    ),
    "spec_decode_num_accepted_tokens": ("accepted_tokens", "Number of accepted draft tokens."),
}
HISTOGRAMS = {
    "time_to_first_token_seconds": ("time_to_first_token", "Time to first token, in seconds."),
    "inter_token_latency_seconds": ("inter_token_latency", "Time between two tokens, in seconds."),
    "e2e_request_latency_seconds": ("request_latency", "End-to-end request latency, in seconds."),
    "request_queue_time_seconds": (
        "queue_time",
        "Time in the queue before prefill, in seconds.",
    ),
    "request_prefill_time_seconds": ("prefill_time", "Prefill time, in seconds."),
    "request_decode_time_seconds": ("decode_time", "Decode time, in seconds."),
    "sync_pass_rows": ("pass_rows", "Number of tokens per sync pass."),
}
FAMILIES: tuple[tuple[Any, dict[str, tuple[str, str]]], ...] = (
    (GaugeMetricFamily, GAUGES),
    (CounterMetricFamily, COUNTERS),
    (HistogramMetricFamily, HISTOGRAMS),
)


class SessionCollector(Collector):
    """Collects the metrics of sessions on each scrape, at no cost to requests."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        measured = {name: session.metrics() for name, session in self._service.sessions.items()}
        for family, figures in FAMILIES:
            for name, (field, text) in figures.items():
                metric = family(PREFIX + name, text, labels=["model_name"])
                for model, metrics in measured.items():
                    value = getattr(metrics, field)
                    if isinstance(value, Histogram):
                        bounds = [*(f"{bound:g}" for bound in value.bounds), "+Inf"]
                        buckets = list(zip(bounds, accumulate(value.counts), strict=True))
                        metric.add_metric([model], buckets, value.total)
                    else:
                        metric.add_metric([model], value)
                yield metric
        finished = CounterMetricFamily(
            PREFIX + "request_success",
            "Number of finished requests, by finish reason.",
            labels=["model_name", "finished_reason"],
        )
        exits = CounterMetricFamily(
            PREFIX + "exit_tokens",
            "Number of generated tokens, by the decoder that predicted them.",
            labels=["model_name", "depth"],
        )
        accepted = CounterMetricFamily(
            PREFIX + "spec_decode_num_accepted_tokens_per_pos",
            "Number of accepted draft tokens in mode lossless, by position in the draft.",
            labels=["model_name", "position"],
        )
        responses = CounterMetricFamily(
            PREFIX + "http_responses",
            "Number of HTTP responses, by path and status.",
            labels=["path", "status"],
        )
        for model, metrics in measured.items():
            for reason in FINISHED:
                finished.add_metric([model, reason], metrics.finished[reason])
            exits.add_metric([model, "shallow"], metrics.exited_tokens)
            exits.add_metric([model, "deep"], metrics.deep_tokens)
            for place, count in sorted(metrics.accepted_at.items()):
                accepted.add_metric([model, str(place)], count)
        for (path, status), count in self._service.responses.items():
            responses.add_metric([path, str(status)], count)
        yield from (finished, exits, accepted, responses)
