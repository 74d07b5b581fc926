"""What was asked for: a prompt with its options, resolved against a bundle, and how it is decoded in a slot."""

from __future__ import annotations

import secrets
from collections.abc import Generator
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from runtime.bundle.beta_mixture import NEVER_EXIT
from runtime.bundle.manifest import Manifest
from runtime.decoding.beam_rows import BeamRows
from runtime.decoding.beam_search import BeamSearch, Hypothesis, Scores
from runtime.decoding.decoder import Decoder
from runtime.decoding.draft_sources import DraftSources
from runtime.decoding.drafts import Drafts, LearnedDrafts
from runtime.decoding.loops import Loop, free, full, lossless, rollback, shallow
from runtime.decoding.prediction import Prediction
from runtime.decoding.prefix import Prefix
from runtime.decoding.response import Caller, Response
from runtime.decoding.slot_call import Waiting, Waits
from runtime.engines.encoder import Encoder
from runtime.engines.prefix_store import PrefixStore, hashes
from runtime.errors import OptionError
from runtime.metrics import Watch
from runtime.options import GenerationOptions, Mode
from runtime.requests.sampling import check_biases, sampler_of
from runtime.requests.thresholds import Threshold
from runtime.result import GenerationResult, Stats, Token
from runtime.scheduling.task import Task
from runtime.text.detokenizer import Detokenizer
from runtime.text.sampler import log_softmax
from runtime.text.tokenizer import Tokenizer

# Most samples of one request: they are decoded one after the other in one slot.
MOST_SEQUENCES = 1024


class Model(NamedTuple):
    """What requests of a session are for. `capacity`: positions of a slot. `encoder` of an encoder-decoder, else None;
    `tokenizer` None: results have no text. `prefixes` is
    what requests reuse of earlier ones: blocks, or what the encoder gave; None: nothing."""

    manifest: Manifest
    capacity: int
    encoder: Encoder | None
    tokenizer: Tokenizer | None
    prefixes: PrefixStore[Any] | None = None


class Request:
    """`responses`: what comes back: of `count` continuations of the prompt those that have begun, and the first.
    `mode`: how it is decoded, which is not always as asked for (see the option `threshold`). `positions`: most of a
    cache, of each beam's where there are beams.

    `tokens` int64 [n] is the prompt. `learned`: of drafts, in mode lossless. `watch` is told what happens to it. Raises
    OptionError for options that do not fit the bundle.
    """

    def __init__(
        self,
        model: Model,
        tokens: np.ndarray,
        options: GenerationOptions,
        threshold: Threshold,
        learned: LearnedDrafts,
        caller: Caller,
        count: int = 1,
        watch: Watch | None = None,
    ) -> None:
        manifest = model.manifest
        self._watch = watch
        self.options, self.caller = options, caller
        self._tokens, self._encoder, self._learned, self._threshold = tokens, model.encoder, learned, threshold
        # What the decoder reads before its first token.
        start = np.array([manifest.decoder_start_token_id or 0], np.int64)
        self._prompt = tokens if model.encoder is None else start
        # The newest token is never read back, so it needs no position.
        self._limit = min(options.max_new_tokens, model.capacity - len(self._prompt) + 1)
        self.positions = len(self._prompt) + self._limit
        self._eos = frozenset() if options.ignore_eos else frozenset(manifest.eos_token_ids)
        self.mode = _mode(options, threshold)
        self._rollback_threshold = _rollback_threshold(options, manifest)
        tuned = manifest.tuned_max_pending if options.mode == "free" else None
        self._max_pending = options.max_pending or tuned or manifest.max_pending
        self._seed = secrets.randbits(64) if options.seed is None else int(options.seed)
        check_biases(options, manifest.vocab_size)
        if options.num_beams > 1 and model.encoder is None:
            raise OptionError(
                f"num_beams is {options.num_beams}; beam search is for encoder-decoders, this bundle is decoder-only"
            )
        self._prefixes, self._prefix = model.prefixes, None
        if model.prefixes is not None and model.encoder is None:
            exits = bool(manifest.exit_layers) and (self._head or self._exits)
            self._prefix = Prefix(model.prefixes, tokens, options.cache_salt, exits)
        self._first: Prediction | None = None
        self._found: list[Hypothesis] = []
        self._tokenizer, self._count = model.tokenizer, count
        self._vocab_size = manifest.vocab_size
        self.responses = [self._response(0)]

    def run(self, decoder: Decoder) -> Loop:
        """Decode in a slot, one continuation after the other: the tokens, and what they wait for."""
        try:
            for number in range(self._count):
                if number:
                    self.responses.append(self._response(number))
                response = self.responses[number]
                self._reset(decoder, number)
                response.begin(decoder.stats)
                if self._watch is not None and not number:
                    self._watch.started()
                try:
                    if self.options.num_beams > 1:
                        yield from self._beam(decoder, response, number)
                    else:
                        loop = yield from self._begin(decoder, response, number)
                        yield from loop
                finally:
                    response.close()
                if self._prefix is not None:
                    self._prefix.keep(decoder.runners, decoder.slot, [token.id for token in response.tokens])
                if not response.complete:
                    return
        finally:
            self._threshold.learn()

    def task(self) -> Task:
        """For a scheduler: a step of it may take long where it runs code of its caller's, or many beams."""
        own = bool(self.options.logits_processor) or self.options.draft_source is not None
        aside = own or self.options.num_beams > 1
        return Task(self.run, self.caller, aside, self._observe)

    def _observe(self, kind: str, error: BaseException | None) -> None:
        if self._watch is None:
            return
        if kind == "ended":
            results = [(response.result, response.times) for response in self.responses]
            self._watch.ended(self.caller.asked, results, error)
        elif error is not None:
            self._watch.refused(error)
        else:
            self._watch.queued()

    def best(self) -> list[GenerationResult]:
        """Of the continuations that came to their end, best first."""
        done = [response.result for response in self.responses if response.complete]
        if self.options.num_beams > 1:
            return done
        return sorted(done, key=lambda result: -sum(result.logprobs or ()) / len(result.token_ids))

    def _response(self, number: int) -> Response:
        options = self.options
        sampler = sampler_of(options, len(self._prompt), self._eos, (self._seed, number))
        text = Detokenizer(self._tokenizer, tuple(options.stop))
        first = self._watch.first_token if self._watch is not None and number == 0 else None
        logprobs, best = options.output_logprobs, int(options.top_logprobs)
        return Response(self._prompt, self._limit, self._eos, sampler, logprobs, text, self.caller, first, best)

    def _reset(self, decoder: Decoder, number: int) -> None:
        """Begin anew, or after the prompt, which was read."""
        if number == 0 or self.options.num_beams > 1:
            decoder.reset()
        else:
            decoder.stats = Stats()
            decoder.trim(0 if self._encoder is not None else len(self._prompt))
        decoder.stats.mode, decoder.stats.prompt_tokens = self.mode, len(self._tokens)
        decoder.stats.predicted = int(self._encoder is None)

    def _begin(self, decoder: Decoder, response: Response, number: int) -> Generator[Token | Waiting, None, Loop]:
        """Begin a continuation: the loop that goes on with it. A decoder-only model's first token is the deep
        prediction after the prompt, which is read once for all; an encoder-decoder decides it like the others."""
        if number == 0:
            decoder.want_logits(response.needs_logits)
        if self._encoder is not None:
            if number == 0:
                decoder.attend(self._encode(decoder))
            decoder.begin(self._exits or self._head)
        else:
            if self._first is None:
                first = yield from decoder.prefilling(self._prompt, self._head, self._exits, self._prefix)
                self._first = first._replace(logits=None if first.logits is None else first.logits.copy())
            yield response.add(response.choose(self._first), False, self._first.confidence, self._first)
        return self._loop(decoder, response)

    def _loop(self, decoder: Decoder, response: Response) -> Loop:
        mode, (threshold, labels, _) = self.mode, self._threshold
        if mode == "rollback":
            return rollback(decoder, response, threshold, self._max_pending, self._rollback_threshold)
        if mode == "shallow":
            return shallow(decoder, response)
        if mode == "free" and (labels is None or not labels.learns):
            return free(decoder, response, threshold, self._max_pending, self.options.sync_every)
        if mode == "free":
            # What a pass in the background reads gets no answer, and so no label.
            return free(decoder, response, threshold, self._max_pending, 0, labels)
        if mode == "full" and self.options.output_confidence:
            return free(decoder, response, NEVER_EXIT, self._max_pending)
        if mode == "full":
            return full(decoder, response)
        acceptance = self._learned.acceptance(threshold, self.options.samples)
        drafts = Drafts(self._learned.costs, acceptance, self._draft_sources(), self.options.drafts != "lookup")
        return lossless(decoder, response, threshold, self._max_pending, drafts)

    def _draft_sources(self) -> DraftSources | None:
        options = self.options
        if options.drafts == "exit":
            return None
        source = () if self._encoder is None else self._tokens.tolist()
        predicted = options.predicted_output
        assert not isinstance(predicted, str)
        return DraftSources(self._vocab_size, self._prompt.tolist(), source, predicted, options.draft_source)

    def _beam(self, decoder: Decoder, response: Response, number: int) -> Loop:
        """The best beams of one search, best first."""
        if number == 0:
            self._found = yield from self._search(decoder)
        wanted = self.options.output_logprobs
        for hypothesis in self._found[number : number + 1]:
            for token, logprob in zip(hypothesis.tokens, hypothesis.logprobs, strict=True):
                if not response.finished:
                    yield response.add(token, False, None, None, logprob if wanted else None)

    def _search(self, decoder: Decoder) -> Waits[list[Hypothesis]]:
        options = self.options
        rows = BeamRows(decoder, self._encode(decoder), options.num_beams, self.positions)
        sampler = sampler_of(options, len(self._prompt), self._eos, (self._seed, 0))

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
            options.num_beams, self._limit, self._eos, float(options.length_penalty), options.early_stopping
        )
        return (yield from search.turns(score, self.caller.gone))

    @property
    def _exits(self) -> bool:
        """Whether the shallow head may run after the prompt."""
        return self.mode != "full" and not (self.mode == "lossless" and self.options.drafts == "lookup")

    @property
    def _head(self) -> bool:
        """Whether the shallow head runs at the prompt: lossless must not cost more than full before it knows that
        drafts pay."""
        return self.mode not in ("full", "lossless") or self.options.output_confidence

    def _encode(self, decoder: Decoder) -> dict[str, np.ndarray]:
        assert self._encoder is not None
        began, store, tokens = perf_counter(), self._prefixes, self._tokens
        chain = [] if store is None else hashes(tokens, len(tokens), self.options.cache_salt)
        found = store.find(chain) if store is not None else []
        cross: dict[str, np.ndarray] = found[0] if found else self._encoder.run(tokens, decoder)
        if found:
            decoder.stats.cached_tokens = len(tokens)
        elif store is not None:
            store.keep(chain, lambda number: cross, sum(array.nbytes for array in cross.values()))
        decoder.stats.encode_seconds = perf_counter() - began
        return cross


def check_count(count: int, options: GenerationOptions) -> None:
    """Raises OptionError for so many continuations of one prompt."""
    most = MOST_SEQUENCES if options.samples else options.num_beams
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= most:
        raise OptionError(
            f"num_return_sequences is {count!r}; choose 1 to {MOST_SEQUENCES} with do_sample=True or a temperature "
            "above 0, or up to num_beams"
        )


def _mode(options: GenerationOptions, threshold: Threshold) -> Mode:
    """Where nothing can exit, the shallow head runs only for requests that return its confidence, or learn from it."""
    if options.drafts == "none":
        return "full"
    learns = threshold.labels is not None and threshold.labels.learns
    never = threshold.value >= NEVER_EXIT and options.mode in ("free", "rollback")
    assert options.mode is not None
    return "full" if never and not (options.output_confidence or learns) else options.mode


def _rollback_threshold(options: GenerationOptions, manifest: Manifest) -> float:
    given = manifest.rollback_threshold if options.rollback_threshold is None else options.rollback_threshold
    if given is None and options.mode == "rollback":
        raise OptionError(
            "rollback_threshold is None and this bundle records none; pass nats above which a token is taken back, "
            "as rollback_threshold=3.0, or calibrate"
        )
    return float("inf") if given is None else float(given)
