"""Speech recognition with a Whisper bundle.

Windows of 30 s, language detection, segments, times of words, and decoding again at higher
temperatures (Radford et al. 2022, arXiv 2212.04356, section 4.5).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from time import monotonic
from typing import Any

import numpy as np

from runtime.bundle.manifest import Manifest
from runtime.errors import OptionError, PromptLengthError, shown
from runtime.options.generation_options import GenerationOptions, SpeechOptions
from runtime.result import GenerationResult, Segment, Stats, Word
from runtime.speech.audio import FRAMES_A_SECOND, LateError, log_mel, read_audio, window
from runtime.speech.rules import Rules
from runtime.speech.words import Span, spans_of, timed, token_starts
from runtime.text.tokenizer import Tokenizer

SECONDS_A_TIMESTAMP = 0.02
FRAMES_A_POSITION = 2  # frames per encoder position, which is also the unit of timestamps


@dataclass(eq=False)
class Sound:
    """A window of sound.

    Attributes:
        features: Log-mel spectrogram, float32 [1, bins, 2 E].
        keeps: Keep the encoder's output for further requests. False for measurements.
        cross: The encoder's output, once a request has computed it.
        spent: Statistics of requests whose tokens are not part of the result.
    """

    features: np.ndarray
    keeps: bool = True
    cross: dict[str, np.ndarray] = field(default_factory=dict)
    spent: list[Stats] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class SpeechPrompt:
    """A request for a window: the tokens that the decoder reads first, and rules for the output."""

    sound: Sound
    prefix: tuple[int, ...]
    rules: Rules | None = None

    def __len__(self) -> int:
        """Return the number of tokens that the decoder reads."""
        return len(self.prefix)

    @classmethod
    def plain(cls, manifest: Manifest, features: np.ndarray) -> SpeechPrompt:
        """Return a prompt for a window float32 [bins, 2 E] without rules. For measurements.

        The decoder reads only the start token.
        """
        return cls(
            Sound(np.ascontiguousarray(features[None])), (manifest.decoder_start_token_id or 0,)
        )


Decode = Callable[[SpeechPrompt, GenerationOptions], GenerationResult]
# Returns the weights of the alignment heads, float32 [heads, n, E], of tokens and a window.
Align = Callable[[Sequence[int], Mapping[str, np.ndarray]], np.ndarray]


class Transcriber:
    """Converts sound to text, window by window. Each window is a request to `decode`.

    Args:
        manifest: Manifest of the bundle.
        tokenizer: The tokenizer. None if results have no text.
        capacity: Positions per slot.
        align: For the times of words.
    """

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer | None,
        capacity: int,
        align: Align | None = None,
    ) -> None:
        assert manifest.speech is not None
        self._align = align
        self._speech = manifest.speech
        self._tokenizer = tokenizer
        self._capacity = capacity
        self._start = manifest.decoder_start_token_id or 0
        self._eos = manifest.eos_token_ids
        self._frames = FRAMES_A_POSITION * manifest.encoder_capacity
        self._codes = {token: code for code, token in self._speech.languages.items()}

    def check(self, options: SpeechOptions) -> None:
        """Check that speech supports these options.

        Raises:
            OptionError: If it does not.
        """
        known = ", ".join(self._speech.languages) or "only en: the model is English-only"
        if options.language is not None and options.language not in (
            self._speech.languages or ("en",)
        ):
            raise OptionError(f"language is {shown(options.language)}; choose {known}")
        if options.task == "translate" and "translate" not in self._speech.tasks:
            raise OptionError("task is 'translate', but the model is English-only; omit it")
        if (
            options.constraint is not None
            or options.num_beams > 1
            or options.predicted_output is not None
        ):
            name = (
                options.constraint
                or ("num_beams" if options.num_beams > 1 else "predicted_output",)
            )[0]
            raise OptionError(f"{name} is not supported for speech; omit it")
        if not options.max_new_tokens:
            raise OptionError("max_new_tokens is 0, which is not supported for speech; raise it")
        if options.initial_prompt is not None and self._tokenizer is None:
            raise OptionError("initial_prompt is given, but the session has no tokenizer; omit it")
        if options.word_timestamps and not self._speech.alignment_heads:
            raise OptionError(
                "word_timestamps is True, but the bundle has no alignment heads; convert the "
                "checkpoint again, for a CPU"
            )
        if options.word_timestamps and self._tokenizer is None:
            raise OptionError("word_timestamps is True, but the session has no tokenizer; omit it")

    def single(self, audio: Any, options: SpeechOptions, decode: Decode) -> SpeechPrompt:
        """Return the request for a sound of one window.

        Raises:
            PromptLengthError: If the sound is longer.
        """
        self.check(options)
        if options.word_timestamps:
            raise OptionError(
                "word_timestamps is True, and a stream of tokens has no times; use generate"
            )
        mels, frames = self._read(audio)
        if frames > self._frames:
            raise PromptLengthError(
                f"the audio has {frames / FRAMES_A_SECOND:.1f} s, and one window of "
                f"{self._frames / FRAMES_A_SECOND:g} s is decoded as a stream; use generate"
            )
        sound = Sound(window(mels, 0, self._frames))
        language = options.language or (
            self._probe(sound, options, decode)[0] if self._speech.languages else "en"
        )
        return self._prompt(
            sound, language, options, timestamps=options.timestamps, before=self._before(options)
        )

    def transcribe(self, audio: Any, options: SpeechOptions, decode: Decode) -> GenerationResult:
        """Transcribe a sound of any length. Arguments and errors are those of `segments`."""
        segments = self.segments(audio, options, decode)
        while True:
            try:
                next(segments)
            except StopIteration as end:
                result: GenerationResult = end.value
                return result

    def segments(
        self, audio: Any, options: SpeechOptions, decode: Decode
    ) -> Generator[Segment, None, GenerationResult]:
        """Yield the segments of a sound of any length, and return the result.

        The segments of a window are yielded once its text is final.

        Raises:
            PromptError: If the audio is not valid.
            OptionError: If an option is not supported.
        """
        self.check(options)
        until = math.inf if options.deadline is None else monotonic() + options.deadline
        try:
            mels, total = self._read(audio, until)
        except LateError:
            return GenerationResult("", (), (), (), finish_reason="deadline", stats=Stats())
        timestamps = options.timestamps or total > self._frames
        before = self._before(options)
        place = 0
        language = options.language or (None if self._speech.languages else "en")
        segments = list[Segment]()
        parts = list[GenerationResult]()
        while place < total:
            if until < math.inf:
                options = replace(options, deadline=max(until - monotonic(), 1e-3))
            sound = Sound(window(mels, place, self._frames))
            quiet: float | None = None
            if language is None or options.timestamps:
                detected, quiet = self._probe(sound, options, decode)
                language = language or detected
            prompt = self._prompt(sound, language, options, timestamps=timestamps, before=before)
            result, quiet, temperature = self._decoded(prompt, options, decode, quiet)
            for other in sound.spent:
                for name in (
                    "seconds",
                    "encode_seconds",
                    "prefill_seconds",
                    "shallow_seconds",
                    "deep_seconds",
                ):
                    setattr(result.stats, name, getattr(result.stats, name) + getattr(other, name))
            parts.append(result)
            if result.interrupted:
                break
            size = min(self._frames, total - place)
            nats = _mean(result)
            if _silent(options, quiet, nats):
                place += size
                continue
            tokens = [token for token in result.token_ids if token not in self._eos]
            cut, advance = (
                self._cut(tokens, size)
                if timestamps
                else ([(0, size // FRAMES_A_POSITION, tokens)], 0)
            )
            words: list[tuple[Word, ...]] | None = None
            if options.word_timestamps:
                frames = advance or size  # the next window begins after them
                words = self._words(
                    prompt.sound,
                    language,
                    options.task,
                    result=result,
                    cut=cut,
                    place=place,
                    frames=frames,
                )
            for number, (start, end, ids) in enumerate(cut):
                text = self._text(ids)
                first, last = (
                    place / FRAMES_A_SECOND + count * SECONDS_A_TIMESTAMP for count in (start, end)
                )
                segment = Segment(
                    start=first,
                    end=last,
                    text=text,
                    token_ids=tuple(ids),
                    temperature=temperature,
                    avg_logprob=nats,
                    compression_ratio=_compression(text),
                    no_speech_prob=quiet,
                    words=None if words is None else words[number],
                )
                segments.append(segment)
                yield segment
            if options.condition_on_previous:
                before = [*before, *tokens] if temperature <= 0.5 else []
            place += advance or size
        shown = timestamps or options.word_timestamps
        return self._joined(parts, segments, language, shown)

    def _read(self, audio: Any, until: float = math.inf) -> tuple[np.ndarray, int]:
        samples = read_audio(audio, until=until)
        return log_mel(samples, self._speech.bins, until), math.ceil(
            len(samples) * FRAMES_A_SECOND / 16_000
        )

    def _before(self, options: SpeechOptions) -> list[int]:
        if options.initial_prompt is None or self._tokenizer is None:
            return []
        return self._tokenizer.encode(
            f" {options.initial_prompt.strip()}", special=False, parse_special=False
        )

    def _prompt(
        self,
        sound: Sound,
        language: str,
        options: SpeechOptions,
        timestamps: bool,
        before: Sequence[int],
    ) -> SpeechPrompt:
        speech = self._speech
        limit = self._capacity // 2 - 1
        prefix = [speech.previous, *before[-limit:]] if before and limit > 0 else []
        prefix += [self._start, *speech.prefix(language, options.task, timestamps)]
        return SpeechPrompt(sound, tuple(prefix), Rules(speech, self._eos, timestamps))

    def _probe(self, sound: Sound, options: SpeechOptions, decode: Decode) -> tuple[str, float]:
        """Return the most likely language and the probability of no speech."""
        rules = Rules(self._speech, self._eos, timestamps=False, probe=True)
        deadline = GenerationOptions(max_new_tokens=1, mode="full", deadline=options.deadline)
        result = decode(SpeechPrompt(sound, (self._start,), rules), deadline)
        sound.spent.append(result.stats)
        token = result.token_ids[0] if result.token_ids else -1
        return self._codes.get(token, "en"), rules.no_speech or 0.0

    def _decoded(
        self, prompt: SpeechPrompt, options: SpeechOptions, decode: Decode, quiet: float | None
    ) -> tuple[GenerationResult, float | None, float]:
        """Decode a window, again at higher temperatures while its text is repetitive or unlikely.

        Returns the result, the probability of no speech if it was needed, and the temperature.
        """
        wanted = options.logprob_threshold
        first = float(options.temperature or 0.0)
        temperatures = [first, *(each for each in options.fallback_temperatures if each > first)]
        for temperature in temperatures:
            options_used = replace(
                options,
                output_logprobs=options.output_logprobs
                or wanted is not None
                or options.word_timestamps,
            )
            if temperature != first:
                options_used = replace(
                    options_used, temperature=temperature, do_sample=True, top_k=0
                )
            result = decode(prompt, options_used)
            nats = _mean(result)
            limit = options.compression_ratio_threshold
            repeats = limit is not None and _compression(self._text(result.token_ids)) > limit
            unlikely = wanted is not None and nats is not None and nats < wanted
            if unlikely and options.no_speech_threshold is not None and quiet is None:
                quiet = self._probe(prompt.sound, options, decode)[1]
            if result.interrupted or _silent(options, quiet, nats) or not (repeats or unlikely):
                break
            if temperature != temperatures[-1]:
                prompt.sound.spent.append(result.stats)
        return result, quiet, temperature

    def _cut(self, tokens: list[int], frames: int) -> tuple[list[tuple[int, int, list[int]]], int]:
        """Split the tokens of a window into segments at its timestamps.

        Returns start, end (in units of timestamps) and tokens of each segment, and the frames to
        advance to the next window, 0 for a whole window.
        """
        zero = self._speech.no_timestamps + 1
        times = [place for place, token in enumerate(tokens) if token >= zero]
        pairs = [place for place in times if place and tokens[place - 1] >= zero]
        whole = len(times) > 0 and times[-1] == len(tokens) - 1 and len(tokens) - 2 not in times
        if not pairs:
            last = tokens[times[-1]] - zero if times else 0
            return [(0, last or frames // FRAMES_A_POSITION, tokens)], 0
        ends = [*pairs, len(tokens)] if whole else pairs
        cut = list[tuple[int, int, list[int]]]()
        start = 0
        for end in ends:
            part = tokens[start:end]
            cut.append((part[0] - zero, part[-1] - zero, part))
            start = end
        return cut, 0 if whole else (tokens[ends[-1] - 1] - zero) * FRAMES_A_POSITION

    def _text(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without timestamps and special tokens."""
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode([token for token in tokens if self._is_text(token)])

    def _is_text(self, token: int) -> bool:
        return token < self._start and token not in self._eos

    def _words(
        self,
        sound: Sound,
        language: str,
        task: str,
        result: GenerationResult,
        cut: list[tuple[int, int, list[int]]],
        place: int,
        frames: int,
    ) -> list[tuple[Word, ...]]:
        """Return the words of each segment of a window.

        The decoder reads the text once more, without timestamps.

        Args:
            sound: The window, with the encoder's output.
            language: Code of the language.
            task: The task.
            result: Result of the window.
            cut: Its segments.
            place: First frame of the window.
            frames: Its frames that have the segments.
        """
        assert self._align is not None
        assert self._tokenizer is not None
        assert result.logprobs is not None
        kept = [token not in self._eos for token in result.token_ids]
        logprobs = np.array(result.logprobs)[kept]
        spans = list[Span]()
        counts = list[int]()
        tokens = list[int]()
        chances = list[float]()
        read = 0
        for _, _, ids in cut:
            text = [(token, read + n) for n, token in enumerate(ids) if self._is_text(token)]
            read += len(ids)
            written = [token for token, _ in text]
            found = spans_of(written, self._tokenizer, language if task == "transcribe" else "en")
            spans += [
                span._replace(first=span.first + len(tokens), end=span.end + len(tokens))
                for span in found
            ]
            counts.append(len(found))
            tokens += written
            chances += [float(np.exp(logprobs[number])) for _, number in text]
        if not spans:
            return [()] * len(cut)
        prefix = [self._start, *self._speech.prefix(language, task)]
        fitting = [*prefix, *tokens][: self._capacity]
        weights = self._align(fitting, sound.cross)
        # The row of the last token of the prefix predicts the first token of the text.
        positions = token_starts(
            weights[:, len(prefix) - 1 :, : max(1, math.ceil(frames / FRAMES_A_POSITION))]
        )
        positions = np.pad(positions, (0, len(tokens) + 1 - len(positions)), mode="edge")
        seconds = place / FRAMES_A_SECOND + positions * SECONDS_A_TIMESTAMP
        words = iter(timed(spans, seconds, np.array(chances)))
        return [tuple(islice(words, count)) for count in counts]

    def _joined(
        self,
        parts: list[GenerationResult],
        segments: list[Segment],
        language: str | None,
        shown: bool,
    ) -> GenerationResult:
        """Return the result of all windows. Silent windows have no text."""
        stats = Stats.joined([part.stats for part in parts])
        unfinished = [self._text(parts[-1].token_ids)] if parts[-1].interrupted else []
        return GenerationResult(
            text="".join([segment.text for segment in segments] + unfinished).strip(),
            token_ids=tuple(token for part in parts for token in part.token_ids),
            exited=tuple(exited for part in parts for exited in part.exited),
            confidence=tuple(confidence for part in parts for confidence in part.confidence),
            finish_reason=parts[-1].finish_reason,
            stats=stats,
            language=language,
            segments=tuple(segments) if shown else None,
            sources=tuple(source for part in parts for source in part.sources),
        )


def _silent(options: SpeechOptions, quiet: float | None, nats: float | None) -> bool:
    """Return True if no speech is likely and the text found in the window is unlikely."""
    limit = options.no_speech_threshold
    minimum = options.logprob_threshold
    if limit is None or quiet is None or quiet <= limit:
        return False
    return minimum is None or nats is None or nats < minimum


def _mean(result: GenerationResult) -> float | None:
    """Return the mean log-probability per token, in nats."""
    return sum(result.logprobs) / len(result.logprobs) if result.logprobs else None


def _compression(text: str) -> float:
    """Return the compression ratio of a text, which is high if it repeats itself."""
    data = text.encode()
    return len(data) / len(zlib.compress(data)) if data else 0.0
