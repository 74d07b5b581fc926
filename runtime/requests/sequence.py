"""Where a request stands: from the queue, through its slot, to its results."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Generator
from time import perf_counter

import numpy as np

from runtime.adaptation.call_costs import CallCosts
from runtime.adaptation.learner import RequestLabels
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import Manifest
from runtime.decoding.acceptance import Acceptance
from runtime.decoding.beams import BeamRows, BeamSearch, Hypothesis, Scores
from runtime.decoding.calls import RUN_INLINE, Prediction, Waiting, Waits
from runtime.decoding.decoder import Decoder
from runtime.decoding.draft_sources import DraftSource, Own, Predicted, TextSource
from runtime.decoding.drafts import ConfidentExits, Drafts, Plain
from runtime.decoding.loops import Loop, Policy, decode, shallow
from runtime.decoding.response import Response
from runtime.engines.kv_cache import check_beams
from runtime.engines.prefix_store import Prefix, hashes
from runtime.errors import OptionError
from runtime.machine.device import Device
from runtime.options.generation_options import GenerationOptions, Mode
from runtime.requests.languages import target_token
from runtime.requests.request import Request, sampler_of
from runtime.requests.session_state import SessionState
from runtime.result import GenerationResult, Stats, Token
from runtime.text.detokenizer import Detokenizer
from runtime.text.sampler import Sampler


class Sequence:
    """A request that is queued, decoded in a slot, or done.

    Args:
        state: What the requests of the session share.
        request: What was asked.

    Attributes:
        mode: The mode used, which may differ from the option (see the option `threshold`).
        response: The continuation being decoded.
        results: The finished continuations, at most `request.count`.
        token_times: Times at which their tokens became final.
        observer: Receives its events.
        number: Number of the request in the session.
        waits: The engine call or event that it waits for.
        since: The turn since which it has waited.
        abandoned: Set if nobody needs it any more. It ends at the next turn.
        started: True once it has had a slot.
        ended: True once no more tokens follow.
        error: The exception that ended it, if any.
        deliver: Called with each token, in the worker. Must not raise.
        on_end: Called at the end, in the worker. Must not raise.
        follow: Returns the sequence of the next prompt, if this one belongs to a list of prompts.
        follows: True for all but the first sequence of a list.
    """

    waits: Waiting = None
    since = 0
    abandoned = False
    started = False
    ended = False
    error: BaseException | None = None
    deliver: Callable[[Token], None] | None = None
    on_end: Callable[[], None] | None = None
    follow: Callable[[], Sequence | None] | None = None
    follows = False
    _delivered = False  # a token has been delivered
    _decoder: Decoder | None = None
    _coroutine: Loop | None = None

    def __init__(self, state: SessionState, request: Request) -> None:
        options = request.options
        ids = request.ids
        manifest = state.manifest
        self.state = state
        self.request = request
        self.options = options
        self.results: list[GenerationResult] = []
        self.token_times: list[list[float]] = []
        self.observer = state.observer
        self.number = state.observer.next_number()
        self._first: Prediction | None = None  # the deep prediction after the prompt
        self._beams: tuple[Hypothesis, ...] = ()

        prompt = ids
        if state.encoder is not None and request.sound is None:
            start = target_token(manifest, options.tgt_lang, "start")
            prompt = np.array(
                [(manifest.decoder_start_token_id or 0) if start is None else start], np.int64
            )
        # The decoder reads the prompt before the first token, which is then the deep prediction
        # after it.
        self._reads = state.encoder is None or len(prompt) > 1
        # The newest token is never read, so it needs no position.
        limit = min(options.max_new_tokens, state.capacity - len(prompt) + 1)
        fixed = self._fixed_tokens(limit)
        # A constraint starts after a fixed first token.
        self._sampled_from = len(prompt) + (request.grammar is not None and 0 in fixed)
        self._eos = frozenset[int]() if options.ignore_eos else frozenset(manifest.eos_token_ids)
        self._seed = secrets.randbits(64) if options.seed is None else int(options.seed)
        self.response = Response(
            prompt,
            limit,
            eos=self._eos,
            sampler=self._sampler(0),
            text=self._detokenizer(),
            logprobs=options.output_logprobs,
            top_logprobs=int(options.top_logprobs),
            prompt_logprobs=options.prompt_logprobs,
            fixed=fixed,
            cancel=request.cancel,
            arrival=request.arrival,
            until=math.inf if options.deadline is None else request.arrival + options.deadline,
        )
        self._decide_mode()
        self._prefix: Prefix | None = None
        if (
            state.prefixes is not None
            and state.encoder is None
            and options.prompt_logprobs is None  # every row of the prompt needs its logits
        ):
            exits = bool(manifest.exit_layers) and (self._head or self._exits)
            self._prefix = Prefix(state.prefixes, ids, options.cache_salt, exits)
        if options.num_beams > 1 and Device.parse(state.options.device).index is None:
            check_beams(manifest, options.num_beams, len(prompt) + limit)

    def _fixed_tokens(self, limit: int) -> dict[int, int]:
        """Return the tokens that the model prescribes, by their place in the output."""
        manifest = self.state.manifest
        fixed: dict[int, int] = {}
        first = target_token(manifest, self.options.tgt_lang, "first")
        first = manifest.forced_first_token_id if first is None else first
        if first is not None:
            fixed[0] = first
        last = manifest.forced_last_token_id
        if (
            last is not None
            and limit
            and not self.options.ignore_eos
            and self.request.grammar is None
        ):
            fixed[limit - 1] = last
        return fixed

    def _sampler(self, number: int) -> Sampler | None:
        seed = self._seed, number
        return sampler_of(
            self.options, self._sampled_from, self._eos, seed=seed, grammar=self.request.grammar
        )

    def _detokenizer(self) -> Detokenizer:
        return Detokenizer(self.state.tokenizer, tuple(self.options.stop))

    def _decide_mode(self) -> None:
        """Set the mode used, its parameters, and where the shallow head runs."""
        state = self.state
        options = self.options
        mode = options.mode
        assert mode is not None
        self._threshold, self._labels = state.thresholds.decide(options.threshold, mode)
        # "full" if nothing can exit, unless the request returns confidences or learns from them.
        learns = self._labels is not None and self._labels.learns
        never = self._threshold >= NEVER_EXIT and mode in ("free", "rollback")
        never = never and not (options.output_confidence or learns)
        self.mode: Mode = "full" if never or options.drafts == "none" else mode
        self._rollback_threshold = _rollback_threshold(options, state.manifest)
        tuned = state.manifest.tuned_max_pending if mode == "free" else None
        self._max_pending = options.max_pending or tuned or state.manifest.max_pending
        # `_exits`: the shallow head may run after the prompt. `_head`: it runs at the prompt.
        # "lossless" must not cost more than "full" before drafts are known to pay.
        drafts = options.drafts or "auto"
        if drafts == "auto" and not state.drafts_exit:
            drafts = "phrases"
        text_alone = self.mode == "lossless" and drafts in ("lookup", "phrases")
        self._exits = self.mode != "full" and not text_alone
        # A request that only reads its prompt stores it for requests with and without the exit.
        chooses = self.mode == "lossless" and drafts == "auto" and state.chooses_exit
        if chooses and options.max_new_tokens:
            acceptance = state.learned.acceptance(self._threshold, options.samples)
            self._exits = acceptance.exit_choice.next()
        self._head = self.mode not in ("full", "lossless") or options.output_confidence

    @property
    def decoder(self) -> Decoder:
        """The decoder of its slot."""
        assert self._decoder is not None
        return self._decoder

    @property
    def result(self) -> GenerationResult:
        """The result so far."""
        return self.response.result

    def enter(self, decoder: Decoder) -> None:
        """Take a slot."""
        self._decoder = decoder
        self._coroutine = self._run(decoder)

    def advance(self, error: Exception | None = None) -> bool:
        """Continue up to the next wait, and return False if the request has ended.

        Raises the error that ended the request.

        Args:
            error: The error of what it waited for, if that failed.
        """
        coroutine = self._coroutine
        assert coroutine is not None
        if not self.started:
            self.started = True
            self.observer.tell("started", self.number)
        try:
            item = next(coroutine) if error is None else coroutine.throw(error)
            while item is not RUN_INLINE:
                if not isinstance(item, Token):
                    self.waits = item
                    return True
                if not self._delivered:
                    self._delivered = True
                    self.observer.tell("first_token", self.number)
                if self.deliver is not None:
                    self.deliver(item)
                item = next(coroutine)
        except StopIteration:
            return False
        self.waits = RUN_INLINE
        return True

    def stop(self) -> None:
        """Close the coroutine, so that it no longer uses its slot."""
        if self._coroutine is not None:
            self._coroutine.close()

    def end(self, error: BaseException | None = None) -> None:
        """Called when no more tokens follow, with the `error` that ended the request."""
        self.waits = None
        self._decoder = None
        self._coroutine = None
        self.error = error
        try:
            results = self.results or [self.result]
            times = self.token_times or [[]]
            self.observer.ended(
                self.number, self.response.arrival, results, times=times, error=error
            )
        finally:
            on_end = self.on_end
            # Break the reference cycle of a list of prompts and its requests.
            self.on_end = None
            self.follow = None
            self.ended = True
            if on_end is not None:
                on_end()

    def best(self) -> list[GenerationResult]:
        """Return the results of the continuations that were not interrupted, best first."""
        done = [result for result in self.results if not result.interrupted]
        if self.options.num_beams > 1:
            return done
        return sorted(done, key=lambda result: -sum(result.logprobs or ()) / len(result.token_ids))

    def _run(self, decoder: Decoder) -> Loop:
        """Decode the continuations in a slot, one after the other.

        Yields tokens, and the calls and events to wait for.
        """
        response = self.response
        try:
            for number in range(self.request.count):
                if number:
                    response.restart(self._sampler(number), self._detokenizer())
                self._reset(decoder, number)
                response.start(decoder.stats)
                try:
                    if self.options.num_beams > 1:
                        yield from self._beam(decoder, number)
                    else:
                        yield from (yield from self._start(decoder, number))
                finally:
                    response.close()
                    self.results.append(response.result)
                    self.token_times.append(response.times)
                if self.state.memory is not None and response.limit:
                    self.state.memory.keep(
                        self.options.cache_salt,
                        response.prompt.tolist(),
                        self.results[-1].token_ids,
                    )
                kept = self.state.generated_limit - len(response.prompt)
                if self._prefix is not None and kept > 0:
                    generated = [token.id for token in response.tokens[:kept]]
                    self._prefix.keep(decoder.runners, decoder.slot, generated)
                if self.results[-1].interrupted:
                    return
        finally:
            if response.limit:
                self.state.thresholds.learn(self._labels)

    def _reset(self, decoder: Decoder, number: int) -> None:
        """Reset the slot, or trim it to the prompt if that was already read."""
        if number == 0 or self.options.num_beams > 1:
            decoder.reset()
        else:
            decoder.stats = Stats()
            decoder.trim(len(self.response.prompt) if self._reads else 0)
        decoder.stats.mode = self.mode
        decoder.stats.prompt_tokens = len(self.request.ids)
        decoder.stats.predicted = int(self._reads)
        decoder.stats.reads_exit = self._exits or self._head

    def _start(self, decoder: Decoder, number: int) -> Generator[Token | Waiting, None, Loop]:
        """Start a continuation, and return the loop that continues it.

        For decoder-only models and speech, the first token is the deep prediction after the prompt,
        which is read once. Encoder-decoders for text generate the first token in the loop.
        """
        response = self.response
        if number == 0:
            decoder.want_logits(response.reads_logits)
            if self.state.encoder is not None:
                decoder.attend(self._encode(decoder))
        if not self._reads:
            decoder.start(self._exits or self._head)
        else:
            if self._first is None:
                scored = self.options.prompt_logprobs is not None
                first = yield from decoder.prefilling(
                    response.prompt,
                    self._head,
                    exits=self._exits,
                    prefix=self._prefix,
                    score=response.score_prompt if scored else None,
                )
                self._first = first._replace(
                    logits=None if first.logits is None else first.logits.copy()
                )
            first = self._first
            if response.limit:
                yield response.add(response.choose(first), False, first.confidence, first)
        return self._loop(decoder)

    def _loop(self, decoder: Decoder) -> Loop:
        """Return the loop of the mode."""
        mode = self.mode
        if mode == "shallow":
            return shallow(decoder, self.response)
        policy = Policy(max_pending=self._max_pending)
        drafts = Plain()
        labels: RequestLabels | None = None
        if mode == "rollback":
            policy = policy._replace(limit=self._rollback_threshold)
            drafts = ConfidentExits(self._threshold)
        elif mode == "lossless":
            drafts = self._drafts()
        elif mode == "free":
            labels = self._labels if self._labels is not None and self._labels.learns else None
            # A background pass returns no predictions, so it provides no labels.
            sync_every = self.options.sync_every if labels is None else 0
            policy = policy._replace(threshold=self._threshold, sync_every=sync_every)
            # Confidences of all tokens, also as labels, need the exit at every token.
            asks = self.options.output_confidence or labels is not None
            published = asks or self.options.drafts == "exit"
            drafts = ConfidentExits(NEVER_EXIT) if published else self._drafts()
        elif self.options.output_confidence:
            drafts = ConfidentExits(NEVER_EXIT)
        return decode(decoder, self.response, drafts, policy, labels)

    def _drafts(self) -> Drafts:
        """Return the drafts of a request in mode lossless or free."""
        state = self.state
        options = self.options
        # Drafts change which tokens of "free" are verified, so they must depend on the request
        # alone: not on measured times, nor on other requests.
        by_request = self.mode == "free"
        if by_request:
            exit_rate = state.thresholds.exit_rate(self._threshold) or 0.5
            acceptance = Acceptance(exit_draft=1 / max(1 - exit_rate, 1 / self._max_pending))
            costs = CallCosts(_fixed_costs(state.manifest))
        else:
            acceptance = state.learned.acceptance(self._threshold, options.samples)
            reads_exit = self._exits or not state.own_layers
            costs = state.learned.costs if reads_exit else state.learned.costs_without_exit
        sources: list[DraftSource] = []
        if options.drafts != "exit":
            prompt = self.response.prompt.tolist()
            predicted = options.predicted_output
            assert not isinstance(predicted, str)
            is_read_by_decoder = state.encoder is None or self.request.sound is not None
            read = () if is_read_by_decoder else self.request.ids.tolist()
            vocab_size = state.manifest.vocab_size
            sources.append(
                TextSource(
                    acceptance,
                    vocab_size,
                    text=[*filter(None, (predicted, read)), prompt],
                    memory=None if by_request else state.memory,
                    salt=options.cache_salt,
                    phrases=state.phrase_tables(bundled=options.drafts != "lookup"),
                )
            )
            if predicted:
                sources.append(Predicted(acceptance, predicted))
            if options.draft_source is not None:
                sources.append(Own(acceptance, options.draft_source, prompt, vocab_size))
        return Drafts(
            costs,
            acceptance,
            sources,
            exits=self._exits,
            threshold=0.0 if by_request else self._threshold,
            learns=not by_request,
        )

    def _beam(self, decoder: Decoder, number: int) -> Loop:
        """Yield the tokens of one of the best beams. The first call runs the search."""
        response = self.response
        if number == 0:
            self._beams = tuple((yield from self._search(decoder)))
        for hypothesis in self._beams[number : number + 1]:
            for token, logprob in zip(hypothesis.tokens, hypothesis.logprobs, strict=True):
                if not response.finished:
                    wanted = logprob if self.options.output_logprobs else None
                    yield response.add(token, exited=False, confidence=None, logprob=wanted)

    def _search(self, decoder: Decoder) -> Waits[list[Hypothesis]]:
        """Run the beam search."""
        options = self.options
        response = self.response
        prompt = response.prompt
        sampler = response.sampler
        positions = len(prompt) + response.limit
        rows = BeamRows(decoder, self._encode(decoder), options.num_beams, positions)

        def score(sequences: np.ndarray, sources: np.ndarray) -> Waits[Scores]:
            length = sequences.shape[1]
            newest = sequences[:, -1] if length else np.full(len(sequences), prompt[-1])
            scores = Scores.of((yield from rows.stepping(newest, sources)))
            fixed = response.prescribed(length)
            if fixed is not None:
                processed = np.full_like(scores.logits, -np.inf)
                processed[:, fixed] = 0.0
                return scores._replace(processed=processed)
            if sampler is None:
                return scores
            processed = (scores.logits - scores.log_sums[:, None]).astype(np.float32)
            for row, sequence in enumerate(sequences):
                processed[row] = sampler.process(processed[row], np.concatenate([prompt, sequence]))
                yield None
            return scores._replace(processed=processed)

        search = BeamSearch(
            options.num_beams,
            response.limit,
            self._eos,
            length_penalty=float(options.length_penalty),
            early_stopping=options.early_stopping,
        )
        return (yield from search.search(score, lambda: response.interruption() is not None))

    def _encode(self, decoder: Decoder) -> dict[str, np.ndarray]:
        """Return the arrays for cross-attention, and add the time to the statistics."""
        assert self.state.encoder is not None
        began = perf_counter()
        store = self.state.prefixes
        ids = self.request.ids
        if (sound := self.request.sound) is not None:
            read = sound.cross or self.state.encoder.run(sound.features, decoder)
            if sound.keeps:
                sound.cross = read
            decoder.stats.encode_seconds = perf_counter() - began
            return read
        chain = [] if store is None else hashes(ids, len(ids), self.options.cache_salt)
        cached = store.find(chain) if store is not None else []
        cross: dict[str, np.ndarray] = cached[0] if cached else self.state.encoder.run(ids, decoder)
        if cached:
            decoder.stats.cached_tokens = len(ids)
        elif store is not None:
            store.keep(chain, lambda number: cross, sum(array.nbytes for array in cross.values()))
        decoder.stats.encode_seconds = perf_counter() - began
        return cross


def _fixed_costs(manifest: Manifest) -> Costs:
    """Return the costs in the bundle. In layers, if they were not measured on an idle machine."""
    if manifest.costs is not None and manifest.costs.trusted:
        return manifest.costs
    deep = manifest.layers - manifest.exit_layer
    # A head, and a further row of a pass, cost about a tenth of the model.
    further = 0.1 * manifest.layers
    shallow = float(manifest.exit_layer)
    return Costs(shallow + further, shallow, {1: deep, 2: deep + further}, measured=False)


def _rollback_threshold(options: GenerationOptions, manifest: Manifest) -> float:
    given = options.rollback_threshold
    given = manifest.rollback_threshold if given is None else given
    if given is None and options.mode == "rollback":
        raise OptionError(
            "mode is 'rollback', but rollback_threshold is None and this bundle records none; pass "
            "nats above which a token is taken back, as rollback_threshold=3.0, or calibrate"
        )
    return math.inf if given is None else float(given)
