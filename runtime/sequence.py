"""A request from its prompt to its end: `Model` makes sequences of prompts and options, the scheduler runs them."""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Callable, Container, Generator, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, cast

import numpy as np

from runtime.adaptation.call_costs import CallCosts
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import Manifest
from runtime.decoding.beams import BeamRows, BeamSearch, Hypothesis, Scores
from runtime.decoding.calls import AT_ONCE, Prediction, Waiting, Waits
from runtime.decoding.decoder import Decoder
from runtime.decoding.draft_rule import Drafts, LearnedDrafts
from runtime.decoding.draft_sources import DraftSources
from runtime.decoding.loops import Loop, free, full, lossless, rollback, shallow
from runtime.decoding.response import Response
from runtime.engines.kv_cache import check_beams
from runtime.engines.prefix_store import Prefix, PrefixStore, hashes, keeps_generated
from runtime.engines.runner import Encoder
from runtime.errors import BundleError, OptionError, PromptLengthError
from runtime.json_file import read_object
from runtime.machine.device import Device
from runtime.metrics import Observer
from runtime.options import GenerationOptions, Mode, SessionOptions
from runtime.result import GenerationResult, Stats, Token
from runtime.speech import Sound, SpeechPrompt
from runtime.text.detokenizer import Detokenizer
from runtime.text.grammar import Constraint, Grammar, Grammars
from runtime.text.prompt import NO_TOKENIZER, UNTRUSTED, Prompt, encode_expected, encode_prompt
from runtime.text.sampler import LogitsProcessor, Sampler, Warping
from runtime.text.tokenizer import Tokenizer
from runtime.thresholds import Thresholds

# Most continuations of one prompt: they are decoded one after the other in one slot.
MOST_SEQUENCES = 1024

GENERATION_CONFIG = "generation_config.json"
LARGEST_CONFIG = 4 << 20  # bytes
# Sampling values that a bundle may recommend.
RECOMMENDED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

# Runs a callback of the caller's, so that it cannot wait for the session that waits for it.
Guard = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass
class Model:
    """The common part of a session's sequences: the bundle, what is loaded of it, and what was learned.

    `capacity`: positions of a slot. `encoder` of an encoder-decoder, else None. `tokenizer` None: results have no text.
    `costs` of engine calls. `prefixes`: what sequences reuse of earlier ones, blocks or what the encoder gave; None:
    nothing.
    """

    bundle: Bundle
    options: SessionOptions
    capacity: int
    encoder: Encoder | None
    tokenizer: Tokenizer | None
    thresholds: Thresholds
    costs: CallCosts
    observer: Observer
    guard: Guard
    prefixes: PrefixStore | None = None

    def __post_init__(self) -> None:
        self.manifest, self.learned = self.bundle.manifest, LearnedDrafts(self.costs)
        self.keeps_generated = keeps_generated(self.manifest)
        # Whether an exit's own layers read every row, and whether a request may go without: a prefix that they have
        # not read is none for one that needs them.
        self.own_layers = bool(self.manifest.exit_layers) and not self.manifest.exit_engine
        self.chooses_exit = self.own_layers and (self.encoder is not None or self.prefixes is None)
        self._grammars = Grammars(self.tokenizer, self.manifest.vocab_size, self.manifest.eos_token_ids)

    def encode(
        self,
        prompt: Prompt,
        parse_special: bool | None = None,
        tools: List[Mapping[str, Any]] | None = None,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
    ) -> np.ndarray:
        """Token ids int64 [n], with the languages of a request. Raises PromptError, and OptionError for a language."""
        self._check_languages(prompt, src_lang=src_lang, tgt_lang=tgt_lang)
        limit = self.manifest.encoder_capacity or self.capacity
        missing = NO_TOKENIZER if self.options.trust_templates else UNTRUSTED
        parse_special = None if parse_special is None else bool(parse_special)
        ids = encode_prompt(prompt, self.tokenizer, self.manifest.vocab_size, limit, parse_special, missing, tools)
        return self._with_languages(ids, src_lang, tgt_lang)

    def _check_languages(self, prompt: Prompt | SpeechPrompt, **codes: str | None) -> None:
        """Raise OptionError for a language that the bundle does not know, or cannot set."""
        languages = self.manifest.languages
        for name, code in codes.items():
            if code is None:
                continue
            given = f"{name} is {code!r}"
            if languages is None:
                raise OptionError(f"{given}; this bundle has no language tokens, leave it out")
            if name == "src_lang" and languages.source is None:
                raise OptionError(f"{given}; this bundle's prompts do not name their language, leave it out")
            if code not in languages.tokens:
                near = get_close_matches(code, languages.tokens, 5, 0.3) or sorted(languages.tokens)[:5]
                raise OptionError(f"{given}; this bundle has {len(languages.tokens)} languages, as {', '.join(near)}")
            if not isinstance(prompt, str) and (name == "src_lang" or languages.target == "prompt"):
                raise OptionError(f"{given}, which is for a prompt of text; put its token among the ids")

    def _with_languages(self, ids: np.ndarray, src_lang: str | None, tgt_lang: str | None) -> np.ndarray:
        languages = self.manifest.languages
        if languages is not None and languages.source is not None and src_lang is not None:
            # The tokenizer adds the token of one language, at the beginning or at the end.
            ends = np.array([0, len(ids) - 1])
            places = ends[ids[ends] == languages.tokens[languages.source]]
            ids[places] = languages.tokens[src_lang]
        if languages is not None and languages.target == "prompt" and tgt_lang is not None:
            ids = np.concatenate([[languages.tokens[tgt_lang]], ids])
            most = self.manifest.encoder_capacity
            if len(ids) > most:
                raise PromptLengthError(
                    f"the prompt and its language have {len(ids)} tokens, at most {most} fit; shorten it, or convert "
                    "with a larger capacity"
                )
        return ids

    def grammar(self, options: GenerationOptions) -> Grammar | None:
        """The grammar that constrains a request, compiled unless it was. Raises OptionError."""
        constraint = options.constraint
        return None if constraint is None else self._grammars.open(*constraint, self.capacity + 1)

    def sequence(
        self,
        prompt: Prompt | SpeechPrompt,
        options: GenerationOptions,
        cancel: threading.Event | None = None,
        count: int | None = None,
        asked: float | None = None,
    ) -> Sequence:
        """A request that was `asked` at this time of the monotonic clock, by default now. `count` continuations are to
        be ordered by log-probability; None is one as it is. Raises PromptError, OptionError, CapacityError."""
        manifest, options = self.manifest, self.thresholds.with_mode(options)
        if count is not None:
            options = replace(options, output_logprobs=True)
        if options.max_pending is not None and options.max_pending > manifest.max_pending:
            raise OptionError(
                f"max_pending is {options.max_pending}; this bundle has room for {manifest.max_pending} (see convert)"
            )
        if options.num_beams > 1 and self.encoder is None:
            raise OptionError(
                f"num_beams is {options.num_beams}; beam search is for encoder-decoders, this bundle is decoder-only"
            )
        for tokens in options.sequence_bias or ():
            if max(tokens) >= manifest.vocab_size:
                raise OptionError(
                    f"sequence_bias names token {max(tokens)}; the ids of this bundle are 0 to "
                    f"{manifest.vocab_size - 1}"
                )
        if options.samples:
            recommended = read_defaults(self.bundle.path, manifest.files).items()
            options = replace(options, **{name: value for name, value in recommended if getattr(options, name) is None})
        if options.logits_processor:
            processors = cast(tuple[LogitsProcessor, ...], options.logits_processor)
            options = replace(options, logits_processor=[self.guard(each) for each in processors])
        if options.draft_source is not None:
            options = replace(options, draft_source=self.guard(options.draft_source))
        if options.predicted_output is not None:
            expected = encode_expected(options.predicted_output, self.tokenizer, manifest.vocab_size, self.capacity)
            options = replace(options, predicted_output=expected.tolist())
        sound: Sound | None = None
        grammar: Constraint | None = None
        if isinstance(prompt, SpeechPrompt):
            self._check_languages(prompt, src_lang=options.src_lang, tgt_lang=options.tgt_lang)
            tokens, sound, grammar = np.array(prompt.prefix, np.int64), prompt.sound, prompt.rules
        else:
            tokens = self.encode(prompt, options.parse_special, None, options.src_lang, options.tgt_lang)
            grammar = self.grammar(options)
        asked = monotonic() if asked is None else asked
        return Sequence(self, tokens, options, cancel, asked, count or 1, grammar, sound)


class Sequence(Response):
    """A request: how its prompt `ids`, int64 [n], are decoded in a slot, and its place in the scheduler. Of speech, the
    encoder reads `sound`, and the decoder `ids` first.

    `mode`: how it is decoded, which is not always as asked for (see the option `threshold`). `results` of its `count`
    continuations of the prompt, as far as they have ended, and `token_times`, when their tokens became final.

    In the scheduler: `waits` for an engine call or event since the turn `since`. `abandoned`: nobody wants it any more,
    and it ends at the next turn. `error` ended it. `deliver`, where it is set, is called with each token, and `on_end`
    once nothing more comes, both in the worker: they must not raise. `follow` gives the next of a list of prompts;
    this one `follows` another.
    """

    waits: Waiting = None
    since = 0
    abandoned = ended = begun = follows = _told = False
    error: BaseException | None = None
    deliver: Callable[[Token], None] | None = None
    on_end: Callable[[], None] | None = None
    follow: Callable[[], Sequence | None] | None = None
    _decoder: Decoder | None = None
    _coroutine: Loop | None = None
    _first: Prediction | None = None
    _found: tuple[Hypothesis, ...] = ()

    def __init__(
        self,
        model: Model,
        ids: np.ndarray,
        options: GenerationOptions,
        cancel: threading.Event | None = None,
        asked: float = 0.0,
        count: int = 1,
        grammar: Constraint | None = None,
        sound: Sound | None = None,
    ) -> None:
        manifest = model.manifest
        self.model, self.ids, self.options, self.count, self.sound = model, ids, options, count, sound
        self.results: list[GenerationResult] = []
        self.token_times: list[list[float]] = []
        # What the decoder reads before its first token.
        languages, target = manifest.languages, None
        if languages is not None and options.tgt_lang is not None:
            target = languages.tokens[options.tgt_lang]
        start = manifest.decoder_start_token_id or 0
        if target is not None and languages is not None and languages.target == "start":
            start = target
        prompt = ids if model.encoder is None or sound is not None else np.array([start], np.int64)
        # Whether it is read before the first token, which is then the deep prediction after it.
        self._reads = model.encoder is None or len(prompt) > 1
        # The newest token is never read back, so it needs no position.
        limit = min(options.max_new_tokens, model.capacity - len(prompt) + 1)
        eos = frozenset[int]() if options.ignore_eos else frozenset(manifest.eos_token_ids)
        fixed, first = dict[int, int](), manifest.forced_first_token_id
        if target is not None and languages is not None and languages.target == "first":
            first = target
        if first is not None:
            fixed[0] = first
        if manifest.forced_last_token_id is not None and not options.ignore_eos and grammar is None:
            fixed[limit - 1] = manifest.forced_last_token_id
        # What a grammar is about begins behind a token that is not free.
        self._sampled_from = len(prompt) + (grammar is not None and 0 in fixed)
        self._seed = secrets.randbits(64) if options.seed is None else int(options.seed)
        sampler = sampler_of(options, self._sampled_from, eos, (self._seed, 0), grammar)
        text = Detokenizer(model.tokenizer, tuple(options.stop))
        until = math.inf if options.deadline is None else asked + options.deadline
        super().__init__(
            prompt,
            limit,
            eos=eos,
            sampler=sampler,
            text=text,
            logprobs=options.output_logprobs,
            top_logprobs=int(options.top_logprobs),
            fixed=fixed,
            cancel=cancel,
            arrival=asked,
            until=until,
        )
        assert options.mode is not None
        self._threshold, self._labels = model.thresholds.decide(options.threshold, options.mode)
        # Full where nothing can exit, unless the request returns or learns from confidences.
        learns = self._labels is not None and self._labels.learns
        never = self._threshold >= NEVER_EXIT and options.mode in ("free", "rollback")
        never = never and not (options.output_confidence or learns)
        self.mode: Mode = "full" if never or options.drafts == "none" else options.mode
        self._rollback_threshold = _rollback_threshold(options, manifest)
        tuned = manifest.tuned_max_pending if options.mode == "free" else None
        self._max_pending = options.max_pending or tuned or manifest.max_pending
        # Whether the shallow head may run after the prompt, and whether it runs at the prompt: lossless must not cost
        # more than full before it knows that drafts pay.
        self._exits = self.mode != "full" and not (self.mode == "lossless" and options.drafts == "lookup")
        if self.mode == "lossless" and options.drafts == "auto" and model.chooses_exit:
            self._exits = model.learned.acceptance(self._threshold, options.samples).choice.next()
        self._head = self.mode not in ("full", "lossless") or options.output_confidence
        self._prefix: Prefix | None = None
        if model.prefixes is not None and model.encoder is None:
            exits = bool(manifest.exit_layers) and (self._head or self._exits)
            self._prefix = Prefix(model.prefixes, ids, options.cache_salt, exits)
        if options.num_beams > 1 and Device.parse(model.options.device).index is None:
            check_beams(manifest, options.num_beams, len(prompt) + limit)
        self.number = model.observer.next_number()

    # In the scheduler

    @property
    def decoder(self) -> Decoder:
        assert self._decoder is not None
        return self._decoder

    def enter(self, decoder: Decoder) -> None:
        """Take a slot."""
        self._decoder, self._coroutine = decoder, self.run(decoder)

    def advance(self, error: Exception | None = None) -> bool:
        """Go on to what it waits for next, or with an `error` of that: whether there is something. Raises its error."""
        coroutine = self._coroutine
        assert coroutine is not None
        self.begun = True
        try:
            item = next(coroutine) if error is None else coroutine.throw(error)
            while item is not AT_ONCE:
                if not isinstance(item, Token):
                    self.waits = item
                    return True
                if not self._told:
                    self._told = True
                    self.model.observer.tell("first_token", self.number)
                if self.deliver is not None:
                    self.deliver(item)
                item = next(coroutine)
        except StopIteration:
            return False
        self.waits = AT_ONCE
        return True

    def stop(self) -> None:
        """Close the coroutine, which must not touch its slot afterwards."""
        if self._coroutine is not None:
            self._coroutine.close()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more will come, for this `error` if there was one."""
        self.waits = self._decoder = self._coroutine = None
        self.error = error
        try:
            results = self.results or [self.result]
            self.model.observer.ended(self.number, self.arrival, results, self.token_times or [[]], error)
        finally:
            # A list of prompts and its requests know each other.
            on_end, self.on_end, self.follow, self.ended = self.on_end, None, None, True
            if on_end is not None:
                on_end()

    def best(self) -> list[GenerationResult]:
        """Results of the continuations that came to their end, best first."""
        done = [result for result in self.results if not result.interrupted]
        if self.options.num_beams > 1:
            return done
        return sorted(done, key=lambda result: -sum(result.logprobs or ()) / len(result.token_ids))

    # In a slot

    def run(self, decoder: Decoder) -> Loop:
        """Decode in a slot, one continuation after the other: the tokens, and what they wait for."""
        try:
            for number in range(self.count):
                if number:
                    seed = self._seed, number
                    sampler = sampler_of(self.options, self._sampled_from, self.eos, seed, self._grammar)
                    self.restart(sampler, Detokenizer(self.model.tokenizer, tuple(self.options.stop)))
                self._reset(decoder, number)
                self.begin(decoder.stats)
                if not number:
                    self.model.observer.tell("started", self.number)
                try:
                    if self.options.num_beams > 1:
                        yield from self._beam(decoder, number)
                    else:
                        yield from (yield from self._begin(decoder, number))
                finally:
                    self.close()
                    self.results.append(self.result)
                    self.token_times.append(self.times)
                if self._prefix is not None and self.model.keeps_generated:
                    self._prefix.keep(decoder.runners, decoder.slot, [token.id for token in self.tokens])
                if self.results[-1].interrupted:
                    return
        finally:
            self.model.thresholds.learn(self._labels)

    def _reset(self, decoder: Decoder, number: int) -> None:
        """Begin anew, or after the prompt, which was read."""
        if number == 0 or self.options.num_beams > 1:
            decoder.reset()
        else:
            decoder.stats = Stats()
            decoder.trim(len(self.prompt) if self._reads else 0)
        decoder.stats.mode, decoder.stats.prompt_tokens = self.mode, len(self.ids)
        decoder.stats.predicted = int(self._reads)

    def _begin(self, decoder: Decoder, number: int) -> Generator[Token | Waiting, None, Loop]:
        """Begin a continuation: the loop that goes on with it. A decoder-only model's first token, and that of speech,
        is the deep prediction after the prompt, which is read once for all; an encoder-decoder of text decides it like
        the others."""
        if number == 0:
            decoder.want_logits(self.reads_logits)
            if self.model.encoder is not None:
                decoder.attend(self._encode(decoder))
        if not self._reads:
            decoder.begin(self._exits or self._head)
        else:
            if self._first is None:
                first = yield from decoder.prefilling(self.prompt, self._head, self._exits, self._prefix)
                self._first = first._replace(logits=None if first.logits is None else first.logits.copy())
            yield self.add(self.choose(self._first), False, self._first.confidence, self._first)
        return self._loop(decoder)

    def _loop(self, decoder: Decoder) -> Loop:
        mode, threshold, labels, room = self.mode, self._threshold, self._labels, self._max_pending
        if mode == "rollback":
            return rollback(decoder, self, threshold, room, self._rollback_threshold)
        if mode == "shallow":
            return shallow(decoder, self)
        if mode == "free" and (labels is None or not labels.learns):
            return free(decoder, self, threshold, room, self.options.sync_every)
        if mode == "free":
            # What a pass in the background reads gets no answer, and so no label.
            return free(decoder, self, threshold, room, 0, labels)
        if mode == "full" and self.options.output_confidence:
            return free(decoder, self, NEVER_EXIT, room)
        if mode == "full":
            return full(decoder, self)
        learned = self.model.learned
        acceptance = learned.acceptance(threshold, self.options.samples)
        sources: DraftSources | None = None
        if self.options.drafts != "exit":
            predicted, own = self.options.predicted_output, self.options.draft_source
            assert not isinstance(predicted, str)
            text = () if self.model.encoder is None or self.sound is not None else self.ids.tolist()
            vocabulary = self.model.manifest.vocab_size
            sources = DraftSources(vocabulary, self.prompt.tolist(), text, predicted, own)
        costs = learned.costs if self._exits or not self.model.own_layers else learned.costs_without_exit
        drafts = Drafts(costs, acceptance, sources, self._exits)
        return lossless(decoder, self, threshold, room, drafts)

    def _beam(self, decoder: Decoder, number: int) -> Loop:
        """The best beams of one search, best first."""
        if number == 0:
            self._found = tuple((yield from self._search(decoder)))
        for hypothesis in self._found[number : number + 1]:
            for token, logprob in zip(hypothesis.tokens, hypothesis.logprobs, strict=True):
                if not self.finished:
                    yield self.add(token, False, None, None, logprob if self.options.output_logprobs else None)

    def _search(self, decoder: Decoder) -> Waits[list[Hypothesis]]:
        options, sampler = self.options, self.sampler
        rows = BeamRows(decoder, self._encode(decoder), options.num_beams, self._end)

        def score(sequences: np.ndarray, sources: np.ndarray) -> Waits[Scores]:
            newest = sequences[:, -1] if sequences.shape[1] else np.full(len(sequences), self.prompt[-1])
            scores = Scores.of((yield from rows.stepping(newest, sources)))
            fixed = self._fixed.get(len(self.prompt) + sequences.shape[1])
            if fixed is not None:
                processed = np.full_like(scores.logits, -np.inf)
                processed[:, fixed] = 0.0
                return scores._replace(processed=processed)
            if sampler is None:
                return scores
            processed = (scores.logits - scores.log_sums[:, None]).astype(np.float32)
            for row, sequence in enumerate(sequences):
                processed[row] = sampler.process(processed[row], np.concatenate([self.prompt, sequence]))
                yield None
            return scores._replace(processed=processed)

        limit, penalty = self._end - len(self.prompt), float(options.length_penalty)
        search = BeamSearch(options.num_beams, limit, self.eos, penalty, options.early_stopping)
        return (yield from search.search(score, lambda: self.interruption() is not None))

    def _encode(self, decoder: Decoder) -> dict[str, np.ndarray]:
        assert self.model.encoder is not None
        began, store, ids = perf_counter(), self.model.prefixes, self.ids
        if (sound := self.sound) is not None:
            read = sound.cross or self.model.encoder.run(sound.features, decoder)
            if sound.keeps:
                sound.cross = read
            decoder.stats.encode_seconds = perf_counter() - began
            return read
        chain = [] if store is None else hashes(ids, len(ids), self.options.cache_salt)
        found = store.find(chain) if store is not None else []
        cross: dict[str, np.ndarray] = found[0] if found else self.model.encoder.run(ids, decoder)
        if found:
            decoder.stats.cached_tokens = len(ids)
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


def sampler_of(
    options: GenerationOptions,
    prompt_length: int,
    eos: frozenset[int],
    seed: tuple[int, int],
    grammar: Constraint | None = None,
) -> Sampler | None:
    """How options choose among logits; None where that is arg max, which the engines do themselves."""

    def given(value: float | None, default: float) -> float:
        return default if value is None else float(value)

    warping = None
    if options.samples:
        temperature, top_k = given(options.temperature, 1.0), int(given(options.top_k, 50))
        warping = Warping(temperature, top_k, given(options.top_p, 1.0), given(options.min_p, 0.0))
    penalty, processors = given(options.repetition_penalty, 1.0), cast(tuple[LogitsProcessor], options.logits_processor)
    biases, least = options.sequence_bias, options.min_new_tokens
    if not (warping or biases or processors or least or grammar) and penalty == 1.0:
        return None
    return Sampler(prompt_length, eos, least, penalty, biases, processors, warping, seed, grammar)


def read_defaults(bundle: Path, listed: Container[str] = (GENERATION_CONFIG,)) -> dict[str, Any]:
    """The values of RECOMMENDED in the bundle's generation_config.json; none where the manifest has not `listed` it.

    BundleError where one cannot be used.
    """
    file = bundle / GENERATION_CONFIG
    if GENERATION_CONFIG not in listed or not file.exists():
        return {}
    content = read_object(file, "convert the checkpoint again", limit=LARGEST_CONFIG)
    values = {name: content[name] for name in RECOMMENDED if content.get(name) is not None}
    try:
        GenerationOptions(do_sample=True, **values)
    except OptionError as error:
        raise BundleError(f"{file}: {str(error)[:300]}; or pass your own") from None
    return values


def _rollback_threshold(options: GenerationOptions, manifest: Manifest) -> float:
    given = manifest.rollback_threshold if options.rollback_threshold is None else options.rollback_threshold
    if given is None and options.mode == "rollback":
        raise OptionError(
            "rollback_threshold is None and this bundle records none; pass nats above which a token is taken back, "
            "as rollback_threshold=3.0, or calibrate"
        )
    return float("inf") if given is None else float(given)
