"""A session: a bundle loaded once, decoding for many threads."""

from __future__ import annotations

import dataclasses
import logging
import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from runtime.adaptive import AdaptiveThreshold
from runtime.bundle import Bundle
from runtime.decoder import Decoder
from runtime.device import Device, check_runnable
from runtime.encoder import Encoder
from runtime.engines.onnx import OnnxEngine
from runtime.errors import CapacityError, OptionError
from runtime.generation_defaults import read_defaults, with_defaults
from runtime.int8_range import check_int8_range
from runtime.kv_cache import KVCache
from runtime.lane import Lane
from runtime.machine import available_memory, usable_cores
from runtime.manifest import LEAST_GAIN, OVERLAP_GAIN, Manifest
from runtime.options import GenerationOptions, SessionOptions
from runtime.pace import Pace
from runtime.prompt import Prompt, encode_prompt
from runtime.request import Request, threshold_of
from runtime.result import GenerationResult
from runtime.stream import Start, Stream, take
from runtime.text_stream import TextStream
from runtime.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Thresholds for which a session remembers how long drafts should be.
MOST_PACES = 64


class Session:
    """Loads a bundle and generates. Thread-safe: each request has a slot of the KV cache to itself, and its result
    does not depend on what else runs.

    Keyword arguments are those of SessionOptions. Raises BundleError, CapacityError, EngineError, OptionError.
    """

    def __init__(self, bundle: Path | str, **options: Any) -> None:
        self.options = SessionOptions(**_known(SessionOptions, options))
        self.bundle = Bundle.open(bundle, self.options.verify)
        manifest = self.bundle.manifest
        check_int8_range(manifest)
        check_runnable(manifest, Device.parse(self.options.device))
        self.capacity = _capacity(manifest, self.options.capacity)
        self._adaptive = self._adapting(self.options)
        self._tokenizer = Tokenizer.load(self.bundle.path)
        self._check_memory(manifest)
        self.threads = self.options.threads or usable_cores()
        self.overlap = self._overlaps(manifest)
        shallow = self._lane("shallow", manifest.shallow_layers, beside=False)
        deep = self._lane("deep", manifest.deep_layers, beside=self.overlap)
        self._encoder = Encoder(self._engine("encoder"), self._engine("prologue")) if manifest.encoder_decoder else None
        self._slots: queue.LifoQueue[Decoder] = queue.LifoQueue()
        for slot in range(self.options.slots):
            self._slots.put(self._decoder(shallow, deep, slot))
        self._closed = threading.Event()
        self._paces: dict[tuple[float, bool], Pace] = {}

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The bundle's tokenizer; None where it has none, and prompts must be token ids."""
        return self._tokenizer

    def generate(self, prompt: Prompt, *, cancel: threading.Event | None = None, **options: Any) -> GenerationResult:
        """Decode one prompt to its end. Keyword arguments are those of GenerationOptions.

        `prompt` is text, a list of token ids, or a list of {"role", "content"} for the bundle's chat template. `cancel`
        ends it after the next token. Raises PromptError, OptionError.
        """
        stream = self.stream(prompt, cancel=cancel, **options)
        for _ in stream:
            pass
        return stream.result

    def stream(self, prompt: Prompt, *, cancel: threading.Event | None = None, **options: Any) -> Stream:
        """Decode one prompt token by token; arguments as for `generate`. Closing the stream ends the request."""
        request = self._request(prompt, options, cancel)
        return self._stream(self._slots, request.start, request, cancel, partial(self._learn, request))

    def generate_best(
        self, prompt: Prompt, num_return_sequences: int, *, cancel: threading.Event | None = None, **options: Any
    ) -> list[GenerationResult]:
        """As many continuations of one prompt, which is read once, best first: samples by log-probability per token, or
        with `num_beams` the best beams by their scores.

        Other arguments as for `generate`. Cancelled, it returns those that ended before. Raises as `generate` does.
        """
        request = self._request(prompt, {**options, "output_logprobs": True}, cancel)
        beams = request.options.num_beams
        most = math.inf if request.options.samples else beams
        if not isinstance(num_return_sequences, int) or not 1 <= num_return_sequences <= most:
            raise OptionError(
                f"num_return_sequences is {num_return_sequences!r}; choose 1 or more, "
                "with do_sample=True or a temperature above 0, or up to num_beams"
            )
        decoder = take(self._slots, partial(self._cancelled, cancel))
        if decoder is None:
            return []
        own: queue.Queue[Decoder] = queue.Queue()
        own.put(decoder)
        results: list[GenerationResult] = []
        try:
            for start in request.several(num_return_sequences):
                stream = self._stream(own, start, request, cancel)
                deque(stream, maxlen=0)
                if stream.result.finish_reason == "cancelled":
                    break
                results.append(stream.result)
        finally:
            self._slots.put(decoder)
            self._learn(request)
        if beams > 1:
            return results
        return sorted(results, key=lambda result: -sum(result.logprobs or ()) / len(result.token_ids))

    @contextmanager
    def decoder(self, prompt: np.ndarray | None = None) -> Iterator[Decoder]:
        """A slot of the session, to drive by hand: for measurements. `prompt` int64 [n] is what the encoder of an
        encoder-decoder reads, by default one token; the decoder has read nothing yet."""
        decoder = self._slots.get()
        try:
            decoder.reset()
            if self._encoder is not None:
                decoder.attend(self._encoder.run(np.zeros(1, np.int64) if prompt is None else prompt))
            decoder.want_logits(False)
            yield decoder
        finally:
            self._slots.put(decoder)

    @property
    def threshold(self) -> float:
        """What a request of mode "free" that gives no threshold begins with now."""
        if self._adaptive is not None:
            return self._adaptive.threshold
        chosen = self.options.threshold
        return self.manifest.threshold if chosen is None else float(chosen)

    def adaptive_state(self) -> dict[str, Any]:
        """What a session with threshold="adaptive" has learned, as JSON can hold it: for SessionOptions.adaptive_state
        of another. Raises OptionError where the threshold does not adapt."""
        if self._adaptive is None:
            raise OptionError(f"threshold is {self.options.threshold!r}; only an 'adaptive' one has a state")
        return self._adaptive.state()

    def close(self) -> None:
        """Refuse new requests and end running ones after their next token. Idempotent."""
        self._closed.set()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, prompt: Prompt, given: dict[str, Any], cancel: threading.Event | None) -> Request:
        options = GenerationOptions(**_known(GenerationOptions, given))
        if self._closed.is_set():
            raise OptionError("the session is closed; open a new one")
        manifest = self.manifest
        if options.max_pending is not None and options.max_pending > manifest.max_pending:
            raise OptionError(
                f"max_pending is {options.max_pending}; this bundle has room for {manifest.max_pending} (see convert)"
            )
        if options.threshold is None and isinstance(self.options.threshold, (int, float)):
            options = dataclasses.replace(options, threshold=self.options.threshold)
        if options.samples:
            options = with_defaults(options, read_defaults(self.bundle.path))
        limit = manifest.encoder_capacity or self.capacity
        tokens = encode_prompt(prompt, self._tokenizer, manifest.vocab_size, limit)
        pace, cancelled = self._pace(options), partial(self._cancelled, cancel)
        adapts = self._adaptive is not None and options.threshold is None and options.mode == "free"
        observation = self._adaptive.begin() if self._adaptive is not None and adapts else None
        return Request(manifest, self.capacity, self._encoder, tokens, options, pace, cancelled, observation)

    def _learn(self, request: Request) -> None:
        if self._adaptive is not None and request.observation is not None:
            self._adaptive.complete(request.observation)

    def _adapting(self, options: SessionOptions) -> AdaptiveThreshold | None:
        if options.threshold != "adaptive":
            return None
        calibration = self.bundle.calibration
        return AdaptiveThreshold(self.manifest, calibration, options.adaptive_memory, options.adaptive_state)

    def _pace(self, options: GenerationOptions) -> Pace:
        """What requests that draft at one threshold have learned, shared by them."""
        key = threshold_of(options, self.manifest), options.samples
        if key not in self._paces and len(self._paces) >= MOST_PACES:
            self._paces.pop(next(iter(self._paces)), None)
        return self._paces.setdefault(key, Pace(self.manifest.max_pending, self.manifest.break_even))

    def _stream(
        self,
        slots: queue.Queue[Decoder],
        start: Start,
        request: Request,
        cancel: threading.Event | None,
        ended: Callable[[], None] | None = None,
    ) -> Stream:
        text = TextStream(self._tokenizer, tuple(request.options.stop))
        return Stream(slots, start, text, request.eos, request.limit, partial(self._cancelled, cancel), ended)

    def _cancelled(self, cancel: threading.Event | None) -> bool:
        return self._closed.is_set() or (cancel is not None and cancel.is_set())

    def _decoder(self, shallow: Lane, deep: Lane, slot: int) -> Decoder:
        manifest = self.manifest
        return Decoder(shallow, deep, slot, manifest.hidden_size, manifest.vocab_size, manifest.max_pending)

    def _engine(self, name: str) -> OnnxEngine:
        return OnnxEngine(self.bundle.engine(name), self.threads, Device.parse(self.options.device))

    def _overlaps(self, manifest: Manifest) -> bool:
        """Whether deep passes run beside shallow steps: as asked, else as the costs that `convert` measured say."""
        gain = manifest.break_even.get(OVERLAP_GAIN)
        chosen = gain is not None and gain >= LEAST_GAIN if self.options.overlap is None else self.options.overlap
        known = "not measured" if gain is None else f"{gain:.2f}x both in turn"
        logger.info("overlap of shallow and deep: %s (%s)", "on" if chosen else "off", known)
        return chosen

    def _lane(self, name: str, layers: range, beside: bool) -> Lane:
        manifest = self.manifest
        dtype = np.float16 if manifest.precision == "fp16" else np.float32
        rows = self.capacity + manifest.max_pending
        cache = KVCache(layers, self.options.slots, manifest.kv_heads, rows, manifest.head_dim, dtype)
        return Lane(self._engine(name), cache, beside)

    def _check_memory(self, manifest: Manifest) -> None:
        rows = self.capacity + manifest.max_pending
        need = manifest.kv_bytes_per_token * rows * self.options.slots
        what = f"{self.options.slots} slots x {rows} positions x {manifest.kv_bytes_per_token} bytes"
        logger.info("KV cache: %.1f MB (%s)", need / 1e6, what)
        available = available_memory()
        if available is not None and need > available:
            raise CapacityError(
                f"the KV cache needs {need / 1e9:.1f} GB ({what}), {available / 1e9:.1f} GB is available; "
                "lower capacity or slots"
            )


def _capacity(manifest: Manifest, asked: int | None) -> int:
    if asked is not None and asked > manifest.capacity:
        raise CapacityError(
            f"capacity {asked} is more than the {manifest.capacity} positions this bundle was converted for; "
            "lower it, or convert with --capacity"
        )
    if asked not in (None, manifest.capacity) and manifest.target == "tensorrt":
        raise CapacityError(
            f"capacity {asked} is not the {manifest.capacity} positions that the graphs of this bundle are fixed to; "
            "leave it out, or convert with --capacity"
        )
    return asked or manifest.capacity


def _known(options: type, given: dict[str, Any]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(options)]
    unknown = sorted(given.keys() - set(names))
    if unknown:
        raise OptionError(f"unknown option {', '.join(unknown)}; known are {', '.join(names)}")
    return given
