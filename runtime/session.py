"""A session: a bundle that is loaded once and decodes requests of many threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as List
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, Unpack, overload

import numpy as np

from runtime.adaptation.call_costs import CallCosts
from runtime.bundle.bundle import Bundle
from runtime.bundle.costs import NEUTRAL
from runtime.bundle.manifest import Manifest
from runtime.decoding.decoder import Decoder
from runtime.decoding.phrases import PhraseTable
from runtime.decoding.text_index import TextMemory
from runtime.engines.prefix_store import PrefixStore, default_limit_mb
from runtime.errors import OptionError, shown
from runtime.machine.device import Device, check_runnable
from runtime.machine.machine import costs_here, usable_cores
from runtime.options.generation_options import merged
from runtime.options.option_keywords import GenerationKeywords, SessionKeywords
from runtime.options.session_options import SessionOptions
from runtime.requests.load_engines import capacity_of, load_engines, open_backend
from runtime.requests.metrics import Metrics, Observer, RequestEvent
from runtime.requests.request_factory import Given, RequestFactory
from runtime.requests.scheduler import Scheduler
from runtime.requests.session_state import SessionState, open_corpus, read_phrases
from runtime.requests.stream import (
    AsyncInbox,
    AsyncStream,
    Inbox,
    SegmentStream,
    Stream,
    is_list_of_prompts,
)
from runtime.requests.thresholds import DefaultMode, Thresholds
from runtime.result import GenerationResult
from runtime.speech.alignment import Aligner
from runtime.speech.windows import SpeechPrompt, Transcriber
from runtime.text.prompt import Prompt
from runtime.text.tokenizer import Tokenizer

Keywords = GenerationKeywords


class Session:
    """Loads a bundle and generates text.

    Thread-safe. Requests share engine calls, but each has its own slot of the KV cache, and its
    result does not depend on other requests (docs/serving.md).

    Options of a request are a GenerationOptions, or a SpeechOptions for a bundle that reads speech.
    Keyword arguments replace its fields. The keyword `cancel`, a threading.Event, ends the request
    after its next token.

    Args:
        bundle: Directory of the bundle.
        options: Options of the session. Default: SessionOptions().
        on_event: Called with each RequestEvent, in the thread of the caller or of the worker. Must
            return quickly.
        **keywords: Replace fields of `options`.

    Raises:
        BundleError: If the bundle is missing, incomplete or altered.
        CapacityError: If the KV cache does not fit the bundle or into memory.
        EngineError: If an engine cannot be loaded.
        OptionError: If an option is not valid for the bundle or the device.
    """

    # Creates the decoders in place of Decoder and FeatureDecoder. For measurements without overlap.
    _decoder_type: Callable[..., Decoder] | None = None

    def __init__(
        self,
        bundle: Path | str,
        options: SessionOptions | None = None,
        *,
        on_event: Callable[[RequestEvent], None] | None = None,
        **keywords: Unpack[SessionKeywords],
    ) -> None:
        options = merged(SessionOptions, options, keywords)
        if on_event is not None and not callable(on_event):
            raise OptionError(
                f"on_event is {shown(on_event)}; give a callable that takes a RequestEvent"
            )
        self.bundle = Bundle.open(bundle, options.verify)
        manifest = self.bundle.manifest
        device = Device.parse(options.device)
        check_runnable(manifest, device)
        if options.prefix_cache_mb is None:
            options = replace(options, prefix_cache_mb=default_limit_mb(manifest))
        self.options = options
        self.capacity = capacity_of(manifest, options.capacity)
        self.threads = options.threads or usable_cores()
        costs = costs_here(manifest, self.threads)
        thresholds = Thresholds(self.bundle, options, costs)
        self._tokenizer: Tokenizer | None = None
        corpus: PhraseTable | None = None
        phrases: PhraseTable | None = None

        def load_texts() -> None:
            nonlocal corpus, phrases
            if options.trust_templates:
                self._tokenizer = Tokenizer.load(self.bundle.path, manifest.files)
            corpus = open_corpus(options, self._tokenizer)
            phrases = read_phrases(self.bundle)

        self._placement = open_backend(
            self.bundle, options, self.capacity, threads=self.threads, device=device
        )
        engines = load_engines(self._placement, options.slots, load_texts, self._decoder_type)
        self._runners = engines.shallow, engines.deep
        self.overlap = engines.deep.beside
        calls = CallCosts(manifest.costs or NEUTRAL)
        self._scheduler = scheduler = Scheduler(
            engines.decoders,
            engines.batches,
            engines.cross,
            queue=options.queue,
            costs=calls,
            packed=manifest.packed,
        )
        self._observer = Observer(None if on_event is None else scheduler.guarded(on_event))
        limit = options.prefix_cache_bytes
        memory_limit = options.draft_memory_bytes
        self._state = SessionState(
            self.bundle,
            options,
            capacity=self.capacity,
            encoder=engines.encoder,
            tokenizer=self._tokenizer,
            thresholds=thresholds,
            costs=calls,
            observer=self._observer,
            guard=scheduler.guarded,
            prefixes=PrefixStore(limit) if limit else None,
            memory=TextMemory(manifest.vocab_size, memory_limit) if memory_limit else None,
            corpus=corpus,
            phrases=phrases,
            drafts_exit=thresholds.drafts_exit,
        )
        transcriber: Transcriber | None = None
        if manifest.speech is not None:
            align = Aligner(manifest, engines.shallow.engine, engines.deep.engine).weights
            transcriber = Transcriber(manifest, self._tokenizer, self.capacity, align)
        self._requests = RequestFactory(self._state, scheduler, transcriber)

    @classmethod
    def from_pretrained(
        cls,
        bundle: Path | str,
        options: SessionOptions | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        cache_dir: Path | str | None = None,
        on_event: Callable[[RequestEvent], None] | None = None,
        **keywords: Unpack[SessionKeywords],
    ) -> Self:
        """Load a bundle from a directory, or download it from the Hugging Face hub.

        Requires `pip install 'freeexport[hub]'` for the hub.

        Args:
            bundle: Directory of the bundle, or "owner/name" or "owner/name@revision" on the hub.
                Only files listed in its manifest are downloaded, and their hashes are checked.
            options: Options of the session. Default: SessionOptions().
            revision: Branch, tag or commit on the hub. Default: the default branch.
            token: Access token of the hub, or False to send none. Default: the one of
                `hf auth login`.
            local_files_only: Only search the hub's cache.
            cache_dir: The hub's cache. Default: that of huggingface_hub, see HF_HOME.
            on_event: As for Session.
            **keywords: Replace fields of `options`.

        Raises:
            HubError: If the bundle cannot be downloaded, or a file is altered.
            FreeExportError: As for Session.
        """
        from runtime.bundle.hub import find_bundle  # not needed for a local bundle

        options = merged(SessionOptions, options, keywords)
        path = find_bundle(
            bundle,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
        )
        return cls(path, options, on_event=on_event)

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The bundle's tokenizer.

        None if the bundle has none or trust_templates is False. Prompts must then be token ids.
        """
        return self._tokenizer

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: Prompt, options: Given = None, **keywords: Unpack[Keywords]
    ) -> GenerationResult: ...

    @overload
    def generate(
        self, prompt: List[Prompt], options: Given = None, **keywords: Unpack[Keywords]
    ) -> list[GenerationResult]: ...

    def generate(self, prompt: Any, options: Given = None, **keywords: Unpack[Keywords]) -> Any:
        """Generate the complete output of a prompt, or of each prompt in a list.

        Args:
            prompt: Text, a list of token ids, or a list of {"role", "content"} messages for the
                bundle's chat template. For a bundle that reads speech: samples, floats [n] at 16
                kHz, or an audio file, as its path or content. A list of prompts returns a list of
                results in the same order.
            options: Options of the request.
            **keywords: Replace fields of `options`.

        Raises:
            PromptError: If the prompt is not valid or does not fit.
            OptionError: If an option is not valid, or the session is closed.
            QueueFullError: If the queue is full.
            BatchError: If any prompt of a list failed. Raised after all have ended.
        """
        if self.manifest.speech is not None:
            return self._requests.transcribe(prompt, options, keywords)
        if not is_list_of_prompts(prompt):
            return Stream(
                self._scheduler, self._requests.one(prompt, options, keywords), whole=True
            ).drain()
        inbox = Inbox[None]()
        with (
            self._requests.several(prompt, options, keywords, inbox.put) as prompts,
            suppress(TimeoutError),
        ):
            if prompts.running:
                inbox.get(prompts.until)
        return prompts.results()

    def stream(self, prompt: Prompt, options: Given = None, **keywords: Unpack[Keywords]) -> Stream:
        """Generate the output of one prompt token by token.

        The request is queued at once, and decoded whether or not its tokens are read. Closing the
        stream ends it. Arguments and errors are those of `generate`, and errors are raised by this
        call.
        """
        return Stream(self._scheduler, self._requests.one(prompt, options, keywords))

    @overload
    async def agenerate(  # type: ignore[overload-overlap]
        self, prompt: Prompt, options: Given = None, **keywords: Unpack[Keywords]
    ) -> GenerationResult: ...

    @overload
    async def agenerate(
        self, prompt: List[Prompt], options: Given = None, **keywords: Unpack[Keywords]
    ) -> list[GenerationResult]: ...

    async def agenerate(
        self, prompt: Any, options: Given = None, **keywords: Unpack[Keywords]
    ) -> Any:
        """`generate` for asyncio. Cancelling the task ends the request."""
        if self.manifest.speech is not None:
            import asyncio  # only then, because it takes long to import

            cancel = keywords["cancel"] = keywords.get("cancel") or threading.Event()
            try:
                return await asyncio.to_thread(self._requests.transcribe, prompt, options, keywords)
            except asyncio.CancelledError:
                cancel.set()
                raise
        if not is_list_of_prompts(prompt):
            return await AsyncStream(
                self._scheduler, self._requests.one(prompt, options, keywords), whole=True
            ).drain()
        inbox = AsyncInbox[None]()
        with (
            self._requests.several(prompt, options, keywords, inbox.put) as prompts,
            suppress(TimeoutError),
        ):
            if prompts.running:
                await inbox.get(prompts.until)
        return prompts.results()

    def transcribe(
        self, audio: Any, options: Given = None, **keywords: Unpack[Keywords]
    ) -> SegmentStream:
        """Transcribe a sound segment by segment, with a bundle that reads speech.

        A window of 30 s is decoded when its first segment is read. Its segments follow once its
        text is final. Arguments and errors are those of `generate`. An error of the audio is raised
        when the first segment is read.
        """
        return self._requests.segments(audio, options, keywords)

    def astream(
        self, prompt: Prompt, options: Given = None, **keywords: Unpack[Keywords]
    ) -> AsyncStream:
        """`stream` for asyncio. Leaving the loop ends the request.

        QueueFullError is raised by this call, before a server starts its response.
        """
        return AsyncStream(self._scheduler, self._requests.one(prompt, options, keywords))

    def encode(
        self,
        prompt: Prompt,
        *,
        tools: List[Mapping[str, Any]] | None = None,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
    ) -> np.ndarray:
        """Return the token ids of a prompt, int64 [n], as `generate` computes them.

        `generate` accepts them as the prompt.

        Args:
            prompt: The prompt.
            tools: Functions for the chat template, as described in OpenAI's API.
            src_lang: Language of the prompt, as in the options.
            tgt_lang: Language of the output, as in the options. `generate` needs it again unless
                its token is part of the prompt.

        Raises:
            PromptError: If the prompt is not valid or does not fit.
            OptionError: If a language is not supported.
        """
        return self._state.encode(prompt, tools=tools, src_lang=src_lang, tgt_lang=tgt_lang)

    def embed(
        self,
        prompts: Prompt | List[Prompt],
        *,
        normalize: bool = False,
        src_lang: str | None = None,
    ) -> np.ndarray:
        """Return an embedding of each prompt, float32 [n, d], with a bundle that has an encoder.

        An embedding is the mean of the encoder's last states over all tokens of the prompt, the
        special tokens included. Prompts are encoded one at a time, in the thread of the caller, so
        that an embedding does not depend on other prompts.

        Args:
            prompts: Texts or lists of token ids. A single prompt is a list of one.
            normalize: Scale each embedding to length 1.
            src_lang: Language of the prompts, as in the options.

        Raises:
            OptionError: If the bundle has no encoder for text, or the session is closed.
            PromptError: If a prompt is not valid or does not fit.
        """
        self._requests.check_open()
        listed: Any = prompts if is_list_of_prompts(prompts) else [prompts]
        return self._state.embed(listed, normalize=normalize, src_lang=src_lang)

    def listen(self, audio: Any, language: str | None = None) -> SpeechPrompt:
        """Return a window of speech and its prompt, for `generate` and `decoder`. For measurements.

        Each request encodes the window again.

        Raises:
            PromptError: If the audio is not valid or longer than a window.
            OptionError: If the bundle reads text.
        """
        return self._requests.window(audio, language)

    def prepare(self, options: Given = None, **keywords: Unpack[Keywords]) -> None:
        """Compile the grammar for requests with these options, which can take seconds.

        Such requests then start without delay.

        Raises:
            OptionError: If the grammar cannot be compiled.
        """
        self._state.grammar(self._requests.options(options, keywords))

    def generate_best(
        self,
        prompt: Prompt,
        num_return_sequences: int,
        options: Given = None,
        **keywords: Unpack[Keywords],
    ) -> list[GenerationResult]:
        """Generate several continuations of one prompt, best first. The prompt is read once.

        Samples are ordered by log-probability per token, beams (`num_beams`) by their scores. If
        cancelled, or at its deadline, it returns the finished ones. Other arguments and errors are
        those of `generate`.

        Args:
            num_return_sequences: Number of continuations, at most MAX_SEQUENCES
                (runtime/requests/request.py).

        Raises:
            CapacityError: If the caches of beams do not fit into memory.
        """
        sequence = self._requests.one(prompt, options, keywords, num_return_sequences)
        Stream(self._scheduler, sequence, whole=True).drain()
        return sequence.best()

    @contextmanager
    def decoder(self, prompt: np.ndarray | SpeechPrompt | None = None) -> Iterator[Decoder]:
        """Context manager: yields the decoder of a slot for direct use. For measurements.

        Args:
            prompt: Prompt of the encoder, int64 [n], or a window of speech. Default: one token. The
                decoder itself has not read anything.
        """
        self._requests.check_open()
        with self._scheduler.borrowed() as decoder:
            decoder.reset()
            if self._state.encoder is not None:
                read = prompt.sound.features if isinstance(prompt, SpeechPrompt) else prompt
                decoder.attend(
                    self._state.encoder.run(
                        np.zeros(1, np.int64) if read is None else read, decoder
                    )
                )
            decoder.want_logits(False)
            yield decoder

    @property
    def threshold(self) -> float:
        """The current threshold of requests in mode "free" that set none."""
        self._scheduler.check()
        return self._state.thresholds.decide(None, "free")[0]

    @property
    def default_mode(self) -> DefaultMode:
        """How requests without options are decoded, and the expected speedup.

        Its str is one readable line.
        """
        return self.describe_mode()

    def describe_mode(self, options: Given = None, **keywords: Unpack[Keywords]) -> DefaultMode:
        """Return how requests with these options are decoded, as `default_mode`."""
        return self._state.thresholds.describe(self._requests.options(options, keywords))

    @property
    def cached_answer_limit(self) -> int:
        """Number of leading positions at which the prefix cache also stores generated tokens.

        Tokens that are generated at later positions are computed again when they are part of the
        next prompt. A request with `max_new_tokens=0` can compute them earlier.
        """
        return self._state.generated_limit

    def forget_drafts(self) -> None:
        """Discard what requests have learned about drafts, and the outputs in the draft memory."""
        self._state.learned.forget()
        if self._state.memory is not None:
            self._state.memory.forget()

    def metrics(self) -> Metrics:
        """Return counts since the session was opened, and the numbers of current requests."""
        metrics = self._observer.metrics()
        metrics.running = self._scheduler.running
        metrics.waiting = self._scheduler.waiting
        used = int(self._runners[0].cache.lengths.sum())
        metrics.kv_cache_usage = used / (self.options.slots * self.capacity)
        metrics.threshold = self.threshold
        metrics.prefix_cache_queries = 0 if self._state.prefixes is None else metrics.prompt_tokens
        return metrics

    def adaptive_state(self) -> dict[str, Any]:
        """Return the learned state of an adaptive threshold, as a dict for JSON.

        Another session can continue from it (SessionOptions.adaptive_state).

        Raises:
            OptionError: If the threshold is not adaptive.
        """
        self._scheduler.check()
        adaptive = self._state.thresholds.adaptive
        if adaptive is None:
            raise OptionError(
                f"threshold is {self.options.threshold!r}; only an 'adaptive' one has a state"
            )
        return adaptive.state()

    @property
    def closed(self) -> bool:
        """True if the session is closed and refuses requests."""
        return self._requests.closed

    def close(self, drain: bool = False) -> None:
        """Refuse new requests and end all others: running ones after their next token.

        Waiting requests end at once. Idempotent. In a forked process, it only refuses new requests.

        Args:
            drain: First complete all requests. Tokens of streams can be read afterwards.
        """
        self._requests.closed = True
        self._scheduler.close(drain)
        if not self._scheduler.forked:
            self._placement.close(self._scheduler.drain)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
