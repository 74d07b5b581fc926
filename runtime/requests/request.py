"""A prompt with its options, resolved against a bundle: what begins it in a slot, and its decode loop."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial
from time import perf_counter

import numpy as np

from runtime.adaptation.draft_length import DraftLength
from runtime.bundle.beta_mixture import NEVER_EXIT
from runtime.bundle.manifest import Manifest
from runtime.decoding.beam_rows import BeamRows
from runtime.decoding.beam_search import BeamSearch, Hypothesis, Scores
from runtime.decoding.decoder import Decoder
from runtime.decoding.loops import Loop, free, full, lossless, rollback, shallow
from runtime.decoding.output_tokens import OutputTokens, Step
from runtime.decoding.prediction import Prediction
from runtime.decoding.slot_call import Waits
from runtime.engines.encoder import Encoder
from runtime.errors import OptionError
from runtime.options import GenerationOptions, Mode
from runtime.requests.response import Start
from runtime.requests.thresholds import Threshold
from runtime.result import Stats
from runtime.text.logits_processors import log_softmax
from runtime.text.sampler import LogitsProcessor, Sampler, Warping


class Request:
    """`limit`: most tokens, by the options and by the room of a slot with `capacity` positions. `eos`: what ends it.
    `mode`: how it is decoded, which is not always as asked for (see the option `threshold`).

    `encoder` of an encoder-decoder, else None; `pace` in mode lossless. `observation`: what it teaches, where the
    threshold adapts. Raises OptionError for options that do not fit the bundle.
    """

    def __init__(
        self,
        manifest: Manifest,
        capacity: int,
        encoder: Encoder | None,
        tokens: np.ndarray,
        options: GenerationOptions,
        threshold: Threshold,
        pace: DraftLength | None,
        cancelled: Callable[[], bool],
    ) -> None:
        self.options = options
        self._threshold, self.observation = threshold
        self._tokens, self._encoder, self._pace, self._cancelled = tokens, encoder, pace, cancelled
        # What the decoder reads before its first token.
        self._prompt = tokens if encoder is None else np.array([manifest.decoder_start_token_id or 0], np.int64)
        # The newest token is never read back, so it needs no position.
        self.limit = min(options.max_new_tokens, capacity - len(self._prompt) + 1)
        self.eos = frozenset() if options.ignore_eos else frozenset(manifest.eos_token_ids)
        self.mode = _mode(options, self._threshold, self.observation is not None and self.observation.learns)
        self._rollback_threshold = _rollback_threshold(options, manifest)
        tuned = manifest.tuned_max_pending if options.mode == "free" else None
        self._max_pending = options.max_pending or tuned or manifest.max_pending
        self._seed = secrets.randbits(64) if options.seed is None else int(options.seed)
        _check_biases(options, manifest)
        if options.num_beams > 1 and encoder is None:
            raise OptionError(
                f"num_beams is {options.num_beams}; beam search is for encoder-decoders, this bundle is decoder-only"
            )

    @property
    def positions(self) -> int:
        """Most of a cache, of each beam's where there are beams."""
        return len(self._prompt) + self.limit

    def start(self, decoder: Decoder) -> Loop:
        """Begin in a slot: the tokens, endless, and what they wait for."""
        if self.options.num_beams > 1:
            return self.several(1)[0](decoder)
        decoder.reset()
        output = self._continuation(0)
        decoder.want_logits(output.needs_logits)

        def steps() -> Loop:
            first = yield from self._read(decoder)
            yield from self._loop(decoder, first, output)

        return steps()

    def several(self, count: int) -> list[Start]:
        """As many continuations of the prompt, which is read once: to be run one after the other in one slot."""
        return self._beams(count) if self.options.num_beams > 1 else self._samples(count)

    def _beams(self, count: int) -> list[Start]:
        """The best beams of one search, best first."""
        found: list[Hypothesis] = []

        def start(number: int, decoder: Decoder) -> Loop:
            decoder.reset()

            def steps() -> Loop:
                if number == 0:
                    hypotheses = yield from self._search(decoder)
                    found.extend(hypotheses)
                wanted = self.options.output_logprobs
                for hypothesis in found[number : number + 1]:
                    for token, logprob in zip(hypothesis.tokens, hypothesis.logprobs, strict=True):
                        yield Step(token, False, None, logprob if wanted else None)

            return steps()

        return [partial(start, number) for number in range(count)]

    def _search(self, decoder: Decoder) -> Waits[list[Hypothesis]]:
        options = self.options
        rows = BeamRows(decoder, self._encode(decoder), options.num_beams, self.positions)
        sampler = _sampler(options, len(self._prompt), self.eos, (self._seed, 0))

        def score(sequences: np.ndarray, sources: np.ndarray) -> Waits[Scores]:
            newest = sequences[:, -1] if sequences.shape[1] else np.full(len(sequences), self._prompt[-1])
            raw = log_softmax((yield from rows.stepping(newest, sources)))
            if sampler is None:
                return raw, raw
            processed = np.empty_like(raw)
            for row, sequence in enumerate(sequences):
                read = np.concatenate([self._prompt, sequence])
                processed[row] = sampler.process(raw[row].astype(np.float32), read)
                yield None
            return processed, raw

        search = BeamSearch(
            options.num_beams, self.limit, self.eos, float(options.length_penalty), options.early_stopping
        )
        return (yield from search.turns(score, self._cancelled))

    def _samples(self, count: int) -> list[Start]:
        read: list[Prediction] = []

        def start(number: int, decoder: Decoder) -> Loop:
            output = self._continuation(number)
            if number:
                decoder.stats = Stats(self.mode, len(self._tokens))
                decoder.trim(len(self._prompt))
            else:
                decoder.reset()
                decoder.want_logits(output.needs_logits)

            def steps() -> Loop:
                if not read:
                    first = yield from self._read(decoder)
                    read.append(first._replace(logits=None if first.logits is None else first.logits.copy()))
                yield from self._loop(decoder, read[0], output)

            return steps()

        return [partial(start, number) for number in range(count)]

    def _read(self, decoder: Decoder) -> Waits[Prediction]:
        self._count(decoder.stats)
        if self._encoder is not None:
            decoder.attend(self._encode(decoder))
        # Lossless must not cost more than full before it knows that drafts pay.
        head = self.mode not in ("full", "lossless") or self.options.output_confidence
        return (yield from decoder.prefilling(self._prompt, head))

    def _encode(self, decoder: Decoder) -> dict[str, np.ndarray]:
        assert self._encoder is not None
        self._count(decoder.stats)
        began = perf_counter()
        cross = self._encoder.run(self._tokens, decoder)
        decoder.stats.encode_seconds = perf_counter() - began
        return cross

    def _count(self, stats: Stats) -> None:
        stats.mode, stats.prompt_tokens = self.mode, len(self._tokens)

    def _loop(self, decoder: Decoder, first: Prediction, output: OutputTokens) -> Loop:
        mode, threshold = self.mode, self._threshold
        if mode == "full" and self.options.output_confidence:
            return free(decoder, first, output, NEVER_EXIT, self._max_pending)
        if mode == "full":
            return full(decoder, first, output)
        if mode == "lossless":
            assert self._pace is not None
            return lossless(decoder, first, output, threshold, self._max_pending, self._pace)
        if mode == "rollback":
            return rollback(decoder, first, output, threshold, self._max_pending, self._rollback_threshold)
        if mode == "shallow":
            return shallow(decoder, first, output)
        seen = self.observation
        if seen is None or not seen.learns:
            return free(decoder, first, output, threshold, self._max_pending, self.options.sync_every)
        # What a pass in the background reads gets no answer, and so no label.
        return free(decoder, first, output, threshold, self._max_pending, 0, seen.label, seen.leave)

    def _continuation(self, sample: int) -> OutputTokens:
        sampler = _sampler(self.options, len(self._prompt), self.eos, (self._seed, sample))
        return OutputTokens(self._prompt, self.limit, self.eos, sampler, self.options.output_logprobs)


def _mode(options: GenerationOptions, threshold: float, learns: bool) -> Mode:
    """Where nothing can exit, the shallow head is run for those who asked for what it says, or learn from it."""
    if threshold >= NEVER_EXIT and options.mode in ("free", "rollback") and not (options.output_confidence or learns):
        return "full"
    return options.mode


def _rollback_threshold(options: GenerationOptions, manifest: Manifest) -> float:
    given = manifest.rollback_threshold if options.rollback_threshold is None else options.rollback_threshold
    if given is None and options.mode == "rollback":
        raise OptionError(
            "rollback_threshold is None and this bundle records none; pass nats above which a token is taken back, "
            "as rollback_threshold=3.0, or calibrate"
        )
    return float("inf") if given is None else float(given)


def _sampler(
    options: GenerationOptions, prompt_length: int, eos: frozenset[int], seed: tuple[int, int]
) -> Sampler | None:
    """None where nothing but arg max is asked for, which the engines do themselves."""
    sampler = Sampler(
        prompt_length,
        eos,
        options.min_new_tokens,
        _given(options.repetition_penalty, 1.0),
        options.sequence_bias,
        processors_of(options),
        _warping(options) if options.samples else None,
        seed,
    )
    plain = not sampler.sequence_bias and not sampler.processors and sampler.repetition_penalty == 1.0
    return None if plain and sampler.warping is None and sampler.min_new_tokens == 0 else sampler


def processors_of(options: GenerationOptions) -> tuple[LogitsProcessor, ...]:
    given = options.logits_processor
    return (given,) if callable(given) else tuple(given)


def _warping(options: GenerationOptions) -> Warping:
    top_k = 50 if options.top_k is None else int(options.top_k)
    return Warping(_given(options.temperature, 1.0), top_k, _given(options.top_p, 1.0), _given(options.min_p, 0.0))


def _given(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _check_biases(options: GenerationOptions, manifest: Manifest) -> None:
    for sequence in options.sequence_bias or ():
        if max(sequence) >= manifest.vocab_size:
            raise OptionError(
                f"sequence_bias names token {max(sequence)}; the ids of this bundle are 0 to {manifest.vocab_size - 1}"
            )
