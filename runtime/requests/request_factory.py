"""From the arguments of a call to sequences in the scheduler."""

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

from runtime.errors import OptionError
from runtime.options.generation_options import GenerationOptions, SpeechOptions, merged
from runtime.options.option_keywords import GenerationKeywords
from runtime.requests.request import check_count, request_of
from runtime.requests.scheduler import CLOSED, Scheduler
from runtime.requests.sequence import Sequence
from runtime.requests.session_state import SessionState
from runtime.requests.stream import PromptList, SegmentStream, Stream
from runtime.result import GenerationResult
from runtime.speech.windows import Decode, Sound, SpeechPrompt, Transcriber
from runtime.text.prompt import Prompt

Given = GenerationOptions | None


class RequestFactory:
    """Creates the sequences of a session.

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
        return self._sequence(read, options, cancel=cancel, count=count)

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
        make = partial(self._sequence, options=options, cancel=cancel, arrival=arrival)
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

    def _sequence(
        self, prompt: Prompt | SpeechPrompt, options: GenerationOptions, **others: Any
    ) -> Sequence:
        return Sequence(self._state, request_of(self._state, prompt, options, **others))

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
            sequence = self._sequence(prompt, options, cancel=cancel)
            return Stream(self._scheduler, sequence, whole=True).drain()

        return decode
