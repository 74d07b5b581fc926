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
    "num_requests_running": ("running", "Requests that have a slot."),
    "num_requests_waiting": ("waiting", "Requests that wait for a slot."),
    "kv_cache_usage_perc": ("kv_cache_usage", "Share of the KV cache's positions in use, 0 to 1."),
    "threshold": (
        "threshold",
        "Confidence above which tokens exit in mode free; it moves where it is adaptive.",
    ),
}
COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts that were read."),
    "prefix_cache_queries": (
        "prefix_cache_queries",
        "Tokens of prompts that were looked up among those kept.",
    ),
    "prefix_cache_hits": ("prefix_cache_hits", "Tokens of prompts that were reused and not read."),
    "generation_tokens": ("generated_tokens", "Tokens that were generated."),
    "forced_tokens": (
        "forced_tokens",
        "Tokens that a grammar left no choice for, which needed no prediction.",
    ),
    "deep_passes": ("deep_passes", "Sync passes of the deep decoder, after the prompt."),
    "rollback_tokens": ("rejected_tokens", "Shallow predictions that a sync pass rejected."),
    "spec_decode_num_drafts": (
        "drafts",
        "Sync passes that verified a draft, in modes lossless and rollback.",
    ),
    "spec_decode_num_draft_tokens": (
        "draft_tokens",
        "Tokens of drafts, of the exit and from the text.",
    ),
    "spec_decode_num_accepted_tokens": ("accepted_tokens", "Tokens of drafts that were accepted."),
}
HISTOGRAMS = {
    "time_to_first_token_seconds": ("time_to_first_token", "From the request to its first token."),
    "inter_token_latency_seconds": ("inter_token_latency", "From a token to the next."),
    "e2e_request_latency_seconds": ("request_latency", "From the request to its end."),
    "request_queue_time_seconds": (
        "queue_time",
        "From the request until its prompt began to be read.",
    ),
    "request_prefill_time_seconds": ("prefill_time", "Reading the prompt."),
    "request_decode_time_seconds": ("decode_time", "From the prompt to the last token."),
    "sync_pass_rows": ("pass_rows", "Tokens of a sync pass."),
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
            "Requests by what ended them.",
            labels=["model_name", "finished_reason"],
        )
        exits = CounterMetricFamily(
            PREFIX + "exit_tokens",
            "Tokens by the decoder whose prediction they are.",
            labels=["model_name", "depth"],
        )
        accepted = CounterMetricFamily(
            PREFIX + "spec_decode_num_accepted_tokens_per_pos",
            "Tokens of drafts that were accepted in mode lossless, by their place in the draft.",
            labels=["model_name", "position"],
        )
        responses = CounterMetricFamily(
            PREFIX + "http_responses", "Responses.", labels=["path", "status"]
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
