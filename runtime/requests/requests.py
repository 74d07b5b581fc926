"""From the arguments of a call to requests in the scheduler."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any

import numpy as np

from runtime.errors import OptionError, shown
from runtime.options.generation_options import GenerationOptions, SpeechOptions, merged
from runtime.options.option_keywords import GenerationKeywords
from runtime.requests.generation import Generation
from runtime.requests.languages import check_languages
from runtime.requests.scheduler import CLOSED, Scheduler
from runtime.requests.sequence import Sequence
from runtime.requests.session_state import SessionState
from runtime.requests.stream import PromptList, SegmentStream, Stream
from runtime.result import GenerationResult
from runtime.speech.windows import Decode, Sound, SpeechPrompt, Transcriber
from runtime.text.grammar import Constraint
from runtime.text.prompt import Prompt

Given = GenerationOptions | None

# Maximum number of continuations of one prompt. They are decoded one after the other, in one slot.
MAX_SEQUENCES = 1024


class Requests:
    """Creates the requests of a session.

    Methods take the options of a call and its keyword arguments, which replace fields. The keyword
    `cancel`, a threading.Event, ends a request after its next token.

    Args:
        state: What the requests of the session share.
        scheduler: Decodes the requests.
        transcriber: For a bundle that reads speech.

    Attributes:
        closed: True if further requests are refused.
    """

    def __init__(
        self, state: SessionState, scheduler: Scheduler, transcriber: Transcriber | None
    ) -> None:
        self.closed = False
        self._state = state
        self._scheduler = scheduler
        self._transcriber = transcriber

    def check_open(self) -> None:
        """Check that requests are accepted.

        Raises:
            OptionError: If they are not.
        """
        self._scheduler.check()
        if self.closed:
            raise OptionError(CLOSED)

    def options(self, given: Given, keywords: GenerationKeywords) -> GenerationOptions:
        """Return the options of a request, of the type for the bundle."""
        keywords.pop("cancel", None)
        kind = GenerationOptions if self._transcriber is None else SpeechOptions
        return merged(kind, given, keywords)

    def one(
        self,
        prompt: Prompt,
        given: Given,
        keywords: GenerationKeywords,
        count: int | None = None,
    ) -> Sequence:
        """Return the request for a prompt, or for a sound of one window, with `count` outputs."""
        cancel = keywords.get("cancel")
        options = self.options(given, keywords)
        if count is not None:
            check_count(count, options)
        self.check_open()
        read: Prompt | SpeechPrompt = prompt
        if self._transcriber is not None and isinstance(options, SpeechOptions):
            read = self._transcriber.single(prompt, options, self._decode(cancel))
        return sequence_of(self._state, read, options, cancel=cancel, count=count)

    @contextmanager
    def several(
        self,
        prompts: List[Prompt],
        given: Given,
        keywords: GenerationKeywords,
        ended: Callable[[None], None],
    ) -> Iterator[PromptList]:
        """Context manager: yields submitted requests, which are abandoned if the body raises."""
        cancel = keywords.get("cancel")
        options = self.options(given, keywords)
        self.check_open()
        arrival = monotonic()
        until = math.inf if options.deadline is None else arrival + options.deadline
        make = partial(sequence_of, self._state, options=options, cancel=cancel, arrival=arrival)
        listed = PromptList(make, prompts, until, partial(ended, None))
        try:
            first = listed.follow()
            if first is not None:
                self._scheduler.submit(first)
            yield listed
        except BaseException:
            listed.abandon()
            raise

    def transcribe(self, audio: Any, given: Given, keywords: GenerationKeywords) -> Any:
        """Return the result of a window or a sound, or those of a list of sounds in order."""
        transcriber, options, decode = self._speech(given, keywords)
        if isinstance(audio, SpeechPrompt):
            return decode(audio, options)
        if isinstance(audio, (list, tuple)):
            return [transcriber.transcribe(each, options, decode) for each in audio]
        return transcriber.transcribe(audio, options, decode)

    def segments(self, audio: Any, given: Given, keywords: GenerationKeywords) -> SegmentStream:
        """Return the segments of a sound, which is decoded as they are read."""
        transcriber, options, decode = self._speech(given, keywords)
        transcriber.check(options)
        return SegmentStream(transcriber.segments(audio, options, decode))

    def window(self, audio: Any, language: str | None) -> SpeechPrompt:
        """Return a window of speech, which each request encodes again."""
        transcriber, options, decode = self._speech(SpeechOptions(language=language), {})
        prompt = transcriber.single(audio, options, decode)
        return replace(prompt, sound=Sound(prompt.sound.features, keeps=False))

    def _speech(
        self, given: Given, keywords: GenerationKeywords
    ) -> tuple[Transcriber, SpeechOptions, Decode]:
        if self._transcriber is None:
            raise OptionError("the bundle reads text, not speech; use generate")
        cancel = keywords.pop("cancel", None)
        options = merged(SpeechOptions, given, keywords)
        self.check_open()
        return self._transcriber, options, self._decode(cancel)

    def _decode(self, cancel: threading.Event | None) -> Decode:
        def decode(prompt: SpeechPrompt, options: GenerationOptions) -> GenerationResult:
            sequence = sequence_of(self._state, prompt, options, cancel=cancel)
            return Stream(self._scheduler, sequence, whole=True).drain()

        return decode


def sequence_of(
    state: SessionState,
    prompt: Prompt | SpeechPrompt,
    options: GenerationOptions,
    *,
    cancel: threading.Event | None = None,
    count: int | None = None,
    arrival: float | None = None,
) -> Sequence:
    """Create the request for a prompt.

    Args:
        state: What the requests of the session share.
        prompt: The prompt.
        options: Options of the request.
        cancel: Event that ends the request after its next token.
        count: Number of continuations, ordered by log-probability. Default: one, without an order.
        arrival: Time of the call, on the monotonic clock. Default: now.

    Raises:
        PromptError: If the prompt is not valid or does not fit.
        OptionError: If the options do not fit the bundle.
        CapacityError: If the caches of beams do not fit into memory.
    """
    if count is not None:
        options = replace(options, output_logprobs=True)
    options = state.resolve(options)
    src_lang = options.src_lang
    tgt_lang = options.tgt_lang
    sound: Sound | None = None
    grammar: Constraint | None
    if isinstance(prompt, SpeechPrompt):
        check_languages(state.manifest, is_text=False, src_lang=src_lang, tgt_lang=tgt_lang)
        ids = np.array(prompt.prefix, np.int64)
        sound = prompt.sound
        grammar = prompt.rules
    else:
        ids = state.encode(
            prompt,
            parse_special=options.parse_special,
            src_lang=src_lang,
            tgt_lang=tgt_lang,
        )
        grammar = state.grammar(options)
    generation = Generation(
        state,
        ids,
        options,
        arrival=monotonic() if arrival is None else arrival,
        cancel=cancel,
        count=count or 1,
        grammar=grammar,
        sound=sound,
    )
    return Sequence(generation, state.observer)


def check_count(count: int, options: GenerationOptions) -> None:
    """Check that `count` continuations of one prompt are possible.

    Raises:
        OptionError: If they are not.
    """
    if not options.max_new_tokens:
        raise OptionError("max_new_tokens is 0 with num_return_sequences; raise it")
    max_count = MAX_SEQUENCES if options.samples else options.num_beams
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= max_count:
        raise OptionError(
            f"num_return_sequences is {shown(count)}; choose 1 to {MAX_SEQUENCES} with "
            "do_sample=True or a temperature above 0, or up to num_beams"
        )
