"""A session: a bundle loaded once, decoding for many threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

import numpy as np

from runtime.adaptation.call_costs import CallCosts
from runtime.backends import open_backend
from runtime.bundle.bundle import Bundle
from runtime.bundle.costs import NEUTRAL
from runtime.bundle.manifest import Manifest
from runtime.decoding.decisions import Decisions
from runtime.decoding.decoder import Decoder
from runtime.decoding.drafts import LearnedDrafts
from runtime.decoding.overlapping import OverlappingDecoder
from runtime.engines.cross_cache import CrossCache
from runtime.engines.prefix_store import PrefixStore
from runtime.engines.runner import Runner
from runtime.errors import CapacityError, OptionError
from runtime.keywords import SessionKeywords, merged
from runtime.machine.device import Device, check_runnable
from runtime.machine.machine import check_saturation, costs_here, usable_cores
from runtime.metrics import Metrics, Observer, RequestEvent
from runtime.option_checks import shown
from runtime.options import SessionOptions
from runtime.requests.asking import Asking
from runtime.requests.request import Model
from runtime.requests.request_builder import RequestBuilder
from runtime.requests.thresholds import DefaultMode, Thresholds
from runtime.scheduling.batched_call import BatchedCall
from runtime.scheduling.batching import rules_of
from runtime.scheduling.callbacks import guarded
from runtime.scheduling.scheduler import Scheduler
from runtime.text.tokenizer import Tokenizer


class Session(Asking):
    """Loads a bundle and generates. Thread-safe: requests share engine calls, each has a slot of the KV cache to
    itself, and its result does not depend on what else runs (docs/serving.md).

    `options`, and keyword arguments in place of its fields, are those of SessionOptions. `decisions` is for
    measurements: predictions in place of the decoders' own (runtime/decoding/decisions.py). `on_event` is called with
    each RequestEvent, in the thread that asks or decodes: it must be quick. Raises BundleError, CapacityError,
    EngineError, OptionError.
    """

    def __init__(
        self,
        bundle: Path | str,
        options: SessionOptions | None = None,
        *,
        decisions: Decisions | None = None,
        on_event: Callable[[RequestEvent], None] | None = None,
        **keywords: Unpack[SessionKeywords],
    ) -> None:
        self.options = merged(SessionOptions, options, keywords)
        if on_event is not None and not callable(on_event):
            raise OptionError(f"on_event is {shown(on_event)}; give a callable that takes a RequestEvent")
        self.bundle = Bundle.open(bundle, self.options.verify)
        manifest = self.bundle.manifest
        check_saturation(manifest)
        check_runnable(manifest, Device.parse(self.options.device))
        self.capacity = _capacity(manifest, self.options.capacity)
        self.threads = self.options.threads or usable_cores()
        self._costs = costs_here(manifest, self.threads)
        self._thresholds = Thresholds(self.bundle, self.options, self._costs)
        self._placement = open_backend(self.bundle, self.options, self.capacity, self.threads)
        with self._placement.loading() as engine:
            trusted = self.options.trust_templates
            self._tokenizer = Tokenizer.load(self.bundle.path, self.manifest.files) if trusted else None
            shallow, deep = self._placement.runners(engine)
            self._encoder = self._placement.encoder(engine, shallow)
        self.overlap = deep.beside
        self._runners = shallow, deep
        self._scheduler = self._schedule(shallow, deep, decisions)
        limit = self.options.prefix_cache_bytes
        self._prefixes: PrefixStore[Any] | None = PrefixStore(limit) if limit else None
        model = Model(manifest, self.capacity, self._encoder, self._tokenizer, self._prefixes)
        self._observer = Observer(None if on_event is None else guarded(on_event, self._scheduler))
        calls = CallCosts(manifest.costs or NEUTRAL)
        self._builder = RequestBuilder(
            self.bundle, self.options, model, self._scheduler, self._thresholds, calls, self._observer
        )
        self._closed = False

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The bundle's tokenizer; None where it has none, or trust_templates is False: prompts must be token ids."""
        return self._tokenizer

    @contextmanager
    def decoder(self, prompt: np.ndarray | None = None) -> Iterator[Decoder]:
        """A slot of the session, to drive by hand: for measurements. `prompt` int64 [n] is what the encoder of an
        encoder-decoder reads, by default one token; the decoder has read nothing yet."""
        self._refuse_if_closed()
        with self._scheduler.borrowed() as decoder:
            decoder.reset()
            if self._encoder is not None:
                decoder.attend(self._encoder.run(np.zeros(1, np.int64) if prompt is None else prompt, decoder))
            decoder.want_logits(False)
            yield decoder

    @property
    def threshold(self) -> float:
        """The threshold with which a request of mode "free" without its own would begin now."""
        self._scheduler.process.check()
        return self._thresholds.decide(None, "free").value

    @property
    def default_mode(self) -> DefaultMode:
        """How requests that give neither mode nor threshold are decoded, and the gain that is expected; its str is one
        line for a person."""
        return self._thresholds.default()

    def forget_drafts(self) -> None:
        """Forget what requests of mode "lossless" have learned of drafts: the next is like the first."""
        self._builder.learned = LearnedDrafts(CallCosts(self.manifest.costs or NEUTRAL))

    def metrics(self) -> Metrics:
        """What was counted since the session was opened, and what runs now."""
        metrics = self._observer.metrics()
        metrics.running, metrics.waiting = self._scheduler.running, self._scheduler.waiting
        used = int(self._runners[0].cache.lengths.sum())
        metrics.kv_cache_usage = used / (self.options.slots * self.capacity)
        metrics.threshold = self.threshold
        metrics.prefix_cache_queries = 0 if self._prefixes is None else metrics.prompt_tokens
        return metrics

    def adaptive_state(self) -> dict[str, Any]:
        """The learned state of a session with threshold="adaptive", a dict for JSON: another session continues from it
        (SessionOptions.adaptive_state). Raises OptionError if the threshold is not adaptive."""
        self._scheduler.process.check()
        if self._thresholds.adaptive is None:
            raise OptionError(f"threshold is {self.options.threshold!r}; only an 'adaptive' one has a state")
        return self._thresholds.adaptive.state()

    @property
    def closed(self) -> bool:
        """Whether it was closed, and refuses requests."""
        return self._closed

    def close(self, drain: bool = False) -> None:
        """Refuse new requests; end running ones after their next token and waiting ones at once. With `drain`, complete
        all first, streams too, whose tokens can be read afterwards. Does nothing else in a fork. Idempotent."""
        self._closed = True
        if self._scheduler.process.left:
            return
        self._scheduler.close()
        if drain:
            self._scheduler.drain()
        self._scheduler.closing = True
        self._scheduler.release()
        self._placement.close(self._scheduler.drain)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _schedule(self, shallow: Runner, deep: Runner, decisions: Decisions | None) -> Scheduler:
        manifest, slots = self.manifest, self.options.slots
        sizes = manifest.hidden_size, manifest.vocab_size
        kind: Callable[..., Decoder] = Decoder
        if deep.beside:
            kind = partial(OverlappingDecoder, run_ahead=self.options.run_ahead)
        decoders = [kind(shallow, deep, slot, *sizes, manifest.max_pending, decisions) for slot in range(slots)]
        cross = CrossCache(slots, shallow.zeros)
        batches = {runner: BatchedCall(runner, cross, *sizes) for runner in (shallow, deep)}
        rules = rules_of(self._costs)._replace(packed=manifest.packed)
        return Scheduler(decoders, batches, cross, self.options.queue, rules)


def _capacity(manifest: Manifest, wanted: int | None) -> int:
    if wanted is not None and wanted > manifest.capacity:
        raise CapacityError(
            f"capacity {wanted} is more than the {manifest.capacity} positions this bundle was converted for; "
            "lower it, or convert with --capacity"
        )
    if wanted not in (None, manifest.capacity) and manifest.target == "tensorrt":
        raise CapacityError(
            f"capacity {wanted} is not the {manifest.capacity} positions that the graphs of this bundle are fixed to; "
            "leave it out, or convert with --capacity"
        )
    return wanted or manifest.capacity
