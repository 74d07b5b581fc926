"""A session: a bundle loaded once, decoding for many threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as List
from contextlib import contextmanager
from functools import partial
from numbers import Integral
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Unpack, overload

import numpy as np

from runtime.adaptation.call_costs import CallCosts
from runtime.backends import open_backend
from runtime.batching import BatchedCall, BatchRules, rules_of
from runtime.bundle.bundle import Bundle
from runtime.bundle.costs import NEUTRAL
from runtime.bundle.manifest import Manifest
from runtime.decoding.decoder import Decisions, Decoder
from runtime.decoding.overlapping import OverlappingDecoder
from runtime.engines.cross_cache import CrossCache
from runtime.engines.runner import Runner
from runtime.errors import CapacityError, OptionError, shown
from runtime.keywords import GenerationKeywords, SessionKeywords
from runtime.machine.device import Device, check_runnable
from runtime.machine.machine import check_saturation, costs_here, usable_cores
from runtime.metrics import Metrics, Observer, RequestEvent
from runtime.options import GenerationOptions, SessionOptions, merged
from runtime.result import GenerationResult
from runtime.scheduler import CLOSED, Scheduler
from runtime.sequence import Model, Sequence, check_count
from runtime.stream import AsyncInbox, AsyncStream, Inbox, PromptList, Stream
from runtime.text.prompt import Prompt
from runtime.text.tokenizer import Tokenizer
from runtime.thresholds import DefaultMode, Thresholds


class Session:
    """Loads a bundle and generates. Thread-safe: requests share engine calls, each has a slot of the KV cache to
    itself, and its result does not depend on what else runs (docs/serving.md).

    `options`, and keyword arguments in place of its fields, are those of SessionOptions. `decisions` is for
    measurements: predictions in place of the decoders' own (runtime/decoding/decoder.py). `on_event` is called with
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
        costs = costs_here(manifest, self.threads)
        thresholds = Thresholds(self.bundle, self.options, costs)
        self._placement = open_backend(self.bundle, self.options, self.capacity, self.threads)
        with self._placement.loading() as engine:
            trusted = self.options.trust_templates
            self._tokenizer = Tokenizer.load(self.bundle.path, manifest.files) if trusted else None
            shallow, deep = self._placement.runners(engine)
            encoder = self._placement.encoder(engine, shallow)
        self.overlap = deep.beside
        self._runners = shallow, deep
        calls = CallCosts(manifest.costs or NEUTRAL)
        rules = rules_of(costs)._replace(packed=manifest.packed)
        self._scheduler = scheduler = self._schedule(shallow, deep, decisions, rules, calls)
        self._observer = Observer(None if on_event is None else scheduler.guarded(on_event))
        self._model = Model(
            self.bundle,
            self.options,
            self.capacity,
            encoder,
            self._tokenizer,
            thresholds,
            calls,
            self._observer,
            scheduler.guarded,
        )
        self._closed = False

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The bundle's tokenizer; None where it has none, or trust_templates is False: prompts must be token ids."""
        return self._tokenizer

    @overload
    def generate(  # type: ignore[overload-overlap]
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        cancel: threading.Event | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> GenerationResult: ...

    @overload
    def generate(
        self,
        prompt: List[Prompt],
        options: GenerationOptions | None = None,
        *,
        cancel: threading.Event | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> list[GenerationResult]: ...

    def generate(
        self,
        prompt: Any,
        options: GenerationOptions | None = None,
        *,
        cancel: threading.Event | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> Any:
        """Decode one prompt to its end, or each of a list of prompts. `options` are GenerationOptions; keyword
        arguments are its fields, and take precedence.

        A prompt is text, a list of token ids, or a list of {"role", "content"} for the bundle's chat template. `cancel`
        ends it after the next token. A list of prompts gives a list of results in the same order. Raises PromptError,
        OptionError, QueueFullError; for a list BatchError, after all have ended, where any failed.
        """
        chosen = merged(GenerationOptions, options, keywords)
        if not _is_list_of_prompts(prompt):
            return Stream(self._scheduler, self._sequence(prompt, chosen, cancel), whole=True).drain()
        inbox = Inbox[int]()
        with self._prompts(prompt, chosen, cancel, inbox.put) as (prompts, until):
            while prompts.running:
                try:
                    prompts.take(inbox.get(until))
                except TimeoutError:
                    prompts.leave()
                    break
        return prompts.results()

    def stream(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        cancel: threading.Event | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> Stream:
        """Decode one prompt token by token; arguments as for `generate`, and raises what that does, at the call. The
        request enters the queue at once, and is decoded whether or not its tokens are read. Closing the stream ends
        it."""
        return Stream(self._scheduler, self._sequence(prompt, merged(GenerationOptions, options, keywords), cancel))

    @overload
    async def agenerate(  # type: ignore[overload-overlap]
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        cancel: threading.Event | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> GenerationResult: ...

    @overload
    async def agenerate(
        self,
        prompt: List[Prompt],
        options: GenerationOptions | None = None,
        *,
        cancel: threading.Event | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> list[GenerationResult]: ...

    async def agenerate(
        self,
        prompt: Any,
        options: GenerationOptions | None = None,
        *,
        cancel: threading.Event | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> Any:
        """`generate` for asyncio: a result, or a list of them. Cancelling the task ends the request."""
        chosen = merged(GenerationOptions, options, keywords)
        if not _is_list_of_prompts(prompt):
            return await AsyncStream(self._scheduler, self._sequence(prompt, chosen, cancel), whole=True).drain()
        inbox = AsyncInbox[int]()
        with self._prompts(prompt, chosen, cancel, inbox.put) as (prompts, until):
            while prompts.running:
                try:
                    prompts.take(await inbox.get(until))
                except TimeoutError:
                    prompts.leave()
                    break
        return prompts.results()

    def astream(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        cancel: threading.Event | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> AsyncStream:
        """`stream` for asyncio: raises QueueFullError at the call, before a server begins to answer. Leaving the loop
        ends the request."""
        chosen = merged(GenerationOptions, options, keywords)
        return AsyncStream(self._scheduler, self._sequence(prompt, chosen, cancel))

    def encode(self, prompt: Prompt) -> np.ndarray:
        """The token ids, int64 [n], that `generate` reads of a prompt: it takes them as the prompt, too. Raises
        PromptError."""
        return self._model.encode(prompt)

    def generate_best(
        self,
        prompt: Prompt,
        num_return_sequences: int,
        options: GenerationOptions | None = None,
        *,
        cancel: threading.Event | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> list[GenerationResult]:
        """Several continuations of one prompt, which is read once, best first: samples by log-probability per token, or
        with `num_beams` the best beams by their scores. At most MOST_SEQUENCES (runtime/sequence.py).

        Other arguments as for `generate`. Cancelled, or at its deadline, it returns those that are finished. Raises as
        `generate` does, and CapacityError for beams whose caches would not fit the memory.
        """
        chosen = merged(GenerationOptions, options, keywords)
        check_count(num_return_sequences, chosen)
        sequence = self._sequence(prompt, chosen, cancel, num_return_sequences)
        Stream(self._scheduler, sequence, whole=True).drain()
        return sequence.best()

    @contextmanager
    def decoder(self, prompt: np.ndarray | None = None) -> Iterator[Decoder]:
        """A slot of the session, to drive by hand: for measurements. `prompt` int64 [n] is what the encoder of an
        encoder-decoder reads, by default one token; the decoder has read nothing yet."""
        self._refuse_if_closed()
        with self._scheduler.borrowed() as decoder:
            decoder.reset()
            if self._model.encoder is not None:
                decoder.attend(self._model.encoder.run(np.zeros(1, np.int64) if prompt is None else prompt, decoder))
            decoder.want_logits(False)
            yield decoder

    @property
    def threshold(self) -> float:
        """The threshold with which a request of mode "free" without its own would begin now."""
        self._scheduler.check()
        return self._model.thresholds.decide(None, "free").value

    @property
    def default_mode(self) -> DefaultMode:
        """How requests that give neither mode nor threshold are decoded, and the gain that is expected; its str is one
        line for a person."""
        return self._model.thresholds.default()

    def forget_drafts(self) -> None:
        """Forget what requests of mode "lossless" have learned of drafts: the next is like the first."""
        self._model.learned.forget()

    def metrics(self) -> Metrics:
        """Counts since the session was opened, and the requests that run now."""
        metrics = self._observer.metrics()
        metrics.running, metrics.waiting = self._scheduler.running, self._scheduler.waiting
        used = int(self._runners[0].cache.lengths.sum())
        metrics.kv_cache_usage = used / (self.options.slots * self.capacity)
        metrics.threshold = self.threshold
        metrics.prefix_cache_queries = 0 if self._model.prefixes is None else metrics.prompt_tokens
        return metrics

    def adaptive_state(self) -> dict[str, Any]:
        """The learned state of a session with threshold="adaptive", a dict for JSON: another session continues from it
        (SessionOptions.adaptive_state). Raises OptionError if the threshold is not adaptive."""
        self._scheduler.check()
        adaptive = self._model.thresholds.adaptive
        if adaptive is None:
            raise OptionError(f"threshold is {self.options.threshold!r}; only an 'adaptive' one has a state")
        return adaptive.state()

    @property
    def closed(self) -> bool:
        """Whether it was closed, and refuses requests."""
        return self._closed

    def close(self, drain: bool = False) -> None:
        """Refuse new requests; end running ones after their next token and waiting ones at once. With `drain`, complete
        all first, streams too, whose tokens can be read afterwards. Does nothing else in a fork. Idempotent."""
        self._closed = True
        self._scheduler.close(drain)
        if not self._scheduler.forked:
            self._placement.close(self._scheduler.drain)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _sequence(
        self, prompt: Prompt, options: GenerationOptions, cancel: threading.Event | None, count: int | None = None
    ) -> Sequence:
        self._refuse_if_closed()
        return self._model.sequence(prompt, options, cancel, count)

    @contextmanager
    def _prompts(
        self,
        prompts: List[Prompt],
        options: GenerationOptions,
        cancel: threading.Event | None,
        ended: Callable[[int], None],
    ) -> Iterator[tuple[PromptList, float]]:
        """Requests that have begun, and their deadline; they are abandoned where the body raises."""
        self._refuse_if_closed()
        asked = monotonic()
        until = math.inf if options.deadline is None else asked + options.deadline
        make = partial(self._model.sequence, options=options, cancel=cancel, asked=asked)
        listed = PromptList(self._scheduler, make, prompts, self.options.slots, until, ended)
        with self._scheduler.listing():
            try:
                listed.begin()
                yield listed, until
            except BaseException:
                listed.abandon()
                raise

    def _refuse_if_closed(self) -> None:
        self._scheduler.check()
        if self._closed:
            raise OptionError(CLOSED)

    def _schedule(
        self, shallow: Runner, deep: Runner, decisions: Decisions | None, rules: BatchRules, costs: CallCosts
    ) -> Scheduler:
        manifest, slots = self.manifest, self.options.slots
        sizes = manifest.hidden_size, manifest.vocab_size
        kind: Callable[..., Decoder] = Decoder
        if deep.beside:
            kind = partial(OverlappingDecoder, run_ahead=self.options.run_ahead)
        decoders = [kind(shallow, deep, slot, *sizes, manifest.max_pending, decisions) for slot in range(slots)]
        cross = CrossCache(slots, shallow.zeros)
        batches = {runner: BatchedCall(runner, cross, *sizes) for runner in (shallow, deep)}
        return Scheduler(decoders, batches, cross, self.options.queue, rules, costs)


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


def _is_list_of_prompts(prompt: Any) -> bool:
    """A list of texts, of lists, or of arrays; a list of token ids or of messages is one prompt."""
    if not isinstance(prompt, (list, tuple)) or not prompt:
        return False
    return not isinstance(prompt[0], (Integral, float, Mapping))
