"""The output of one request: chooses tokens, makes them final, and decides when the output ends."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Mapping, Sequence
from time import monotonic
from types import MappingProxyType

import numpy as np

from runtime.decoding.calls import Prediction
from runtime.result import (
    FinishReason,
    GenerationResult,
    PromptLogprobs,
    Stats,
    Token,
    TopLogprobs,
)
from runtime.text.detokenizer import Detokenizer
from runtime.text.sampler import Sampler, likeliest, log_softmax


class Response:
    """The tokens of one request so far, and the choice of the next.

    Choosing is stateless: rejected drafts leave no trace, and drafts are chosen like final tokens.

    Args:
        prompt: Tokens that the decoder reads before the first token, int64 [n].
        limit: Maximum number of tokens. 0: the prompt is only read.
        eos: Tokens that end the output.
        sampler: Chooses among logits. Default: arg max.
        text: Converts tokens to text and finds stop strings.
        logprobs: Return a log-probability for each token.
        top_logprobs: Number of most likely tokens to return at each position.
        prompt_logprobs: Number of most likely tokens to return at each position of the prompt.
            Default: return no log-probabilities of the prompt.
        fixed: Tokens that the model prescribes by their place in the output, such as a target
            language. A constraint starts after the first token if that is fixed.
        cancel: Event that ends the request after its next token.
        arrival: Time of the request, on the monotonic clock.
        until: Deadline, on the monotonic clock.

    Attributes:
        finished: Why the output ended, None until then.
        cancelled: Set it to end the output after its next token.
        greedy: True if the next choice needs only the token of a prediction.
        plain: True if every token is that of a prediction: none is sampled, constrained or
            prescribed.
        reads_logits: True if any choice needs logits.
        joins_forced: True if the next token may be forced, so that it needs no prediction.
        times: Time at which each token became final.
    """

    def __init__(
        self,
        prompt: np.ndarray,
        limit: int,
        *,
        eos: frozenset[int] = frozenset(),
        sampler: Sampler | None = None,
        text: Detokenizer | None = None,
        logprobs: bool = False,
        top_logprobs: int = 0,
        prompt_logprobs: int | None = None,
        fixed: Mapping[int, int] = MappingProxyType({}),
        cancel: threading.Event | None = None,
        arrival: float = 0.0,
        until: float = math.inf,
    ) -> None:
        self.prompt = prompt
        self.limit = limit
        self.eos = eos
        self.cancelled = False
        self.arrival = arrival
        self.until = until
        self.interruptible = cancel is not None or until != math.inf
        self._cancel = cancel
        self._ids = np.empty(len(prompt) + limit, np.int64)
        self._ids[: len(prompt)] = prompt
        self._end = len(prompt) + limit
        self._fixed = {len(prompt) + place: token for place, token in fixed.items()}
        self._grammar_begins = len(prompt) + (0 in fixed)
        self._logprobs = logprobs or top_logprobs > 0
        self._top_logprobs = top_logprobs
        self._prompt_alternatives = prompt_logprobs
        self._prompt_logprobs: list[float | None] = [None]
        self._prompt_top_logprobs: list[TopLogprobs] = [()]
        self._frozen: GenerationResult | None = None
        self.restart(sampler, text or Detokenizer(None))

    def restart(self, sampler: Sampler | None, text: Detokenizer) -> None:
        """Start another continuation of the prompt."""
        self.tokens: list[Token] = []
        self.times: list[float] = []
        self.newest = int(self.prompt[-1])
        self._length = len(self.prompt)
        self.finished: FinishReason | None = None if self.limit else "length"
        self.sampler = sampler
        self._text = text
        self.plain = sampler is None and not self._fixed
        self.reads_logits = (
            sampler is not None or self._logprobs or self._prompt_alternatives is not None
        )
        self._grammar = None if sampler is None else sampler.grammar
        self._takes_best = sampler is not None and sampler.only_masks
        self._look_ahead()
        # Looked up once because it is called for every token.
        self._push = text.push
        self._rest = ""  # text withheld for a possible stop string when the output was interrupted
        self._stats = Stats()
        self._began: float | None = None  # start time, while it has a slot

    def score_prompt(self, place: int, logits: np.ndarray) -> None:
        """Add the log-probabilities of the tokens after some rows of the prompt."""
        for row, token in enumerate(self.prompt[place + 1 : place + 1 + len(logits)].tolist()):
            logprobs = log_softmax(logits[row])
            self._prompt_logprobs.append(logprobs.item(token))
            best: TopLogprobs = ()
            if self._prompt_alternatives:
                ids = likeliest(logits[row], self._prompt_alternatives)
                best = tuple(zip(ids.tolist(), logprobs[ids].tolist(), strict=True))
            self._prompt_top_logprobs.append(best)

    @property
    def _scored_prompt(self) -> PromptLogprobs | None:
        if self._prompt_alternatives is None or len(self._prompt_logprobs) < len(self.prompt):
            return None
        return PromptLogprobs(
            tuple(self.prompt.tolist()),
            tuple(self._prompt_logprobs),
            tuple(self._prompt_top_logprobs),
        )

    def interruption(self) -> FinishReason | None:
        """Return why the request must end now, None if it may continue."""
        if self.cancelled or (self._cancel is not None and self._cancel.is_set()):
            return "cancelled"
        return "deadline" if self.until != math.inf and monotonic() >= self.until else None

    def choose(self, prediction: Prediction, drafts: Sequence[int] = ()) -> int:
        """Return the token after the final ones and `drafts`."""
        if self._fixed:
            fixed = self._fixed.get(self._length + len(drafts))
            if fixed is not None:
                return fixed
        if self.sampler is None:
            return prediction.token
        context = self._context(drafts)
        grammar = self._grammar
        if grammar is not None:
            output = context[self._grammar_begins :]
            forced = grammar.forced(output)
            if forced is not None:
                return forced
            # If the best token is allowed, it is the best allowed one.
            if self._takes_best and grammar.allows(output, (prediction.token,)):
                return prediction.token
        assert prediction.logits is not None
        return self.sampler(prediction.logits, context)

    def constrained(self, prediction: Prediction, drafts: Sequence[int] = ()) -> Prediction:
        """Set a shallow prediction's confidence to 0 if the grammar rejects it after `drafts`."""
        if self._grammar is None or prediction.confidence is None:
            return prediction
        if self._length + len(drafts) in self._fixed:
            return prediction
        allowed = self._grammar.allows(self._output(drafts), (prediction.token,))
        return prediction if allowed else prediction._replace(confidence=0.0)

    def forced(self, drafts: Sequence[int] = ()) -> int | None:
        """Return the only token that may follow the final ones and `drafts`.

        It is fixed, or forced by the grammar. None if there is a choice, or if tokens need a
        prediction for their log-probability.
        """
        if self._logprobs:
            return None
        fixed = self._fixed.get(self._length + len(drafts))
        if fixed is not None or self._grammar is None:
            return fixed
        return self._grammar.forced(self._output(drafts))

    def _look_ahead(self) -> None:
        """Update the requirements of the next choice."""
        fixed = self._length in self._fixed
        self.greedy = not self.reads_logits and not fixed
        self.joins_forced = (fixed or self._grammar is not None) and not self._logprobs

    def prescribed(self, place: int) -> int | None:
        """Return the token fixed at a place of the output, None if there is none."""
        return self._fixed.get(len(self.prompt) + place)

    def _context(self, drafts: Sequence[int]) -> np.ndarray:
        length = self._length + len(drafts)
        self._ids[self._length : length] = drafts
        return self._ids[:length]

    def _output(self, drafts: Sequence[int]) -> np.ndarray:
        """Return the final tokens and `drafts` that the grammar constrains."""
        return self._context(drafts)[self._grammar_begins :]

    def ends(self, drafts: Sequence[int]) -> bool:
        """Return True if the request would end with the last of `drafts`."""
        return drafts[-1] in self.eos or self._length + len(drafts) >= self._end

    def within(self, drafts: list[int]) -> list[int]:
        """Cut `drafts` before a token the grammar rejects, and after one that ends the output."""
        drafts = drafts[: self._end - self._length]
        for place, token in enumerate(drafts):
            if token in self.eos:
                drafts = drafts[: place + 1]
                break
        if self._grammar is None or not drafts:
            return drafts
        return drafts[: self._grammar.allows(self._output(()), drafts)]

    def add(
        self,
        token: int,
        exited: bool,
        confidence: float | None,
        prediction: Prediction | None = None,
        logprob: float | None = None,
        source: str | None = None,
    ) -> Token:
        """Make a token final.

        Args:
            exited: The token is an accepted shallow prediction.
            confidence: Confidence of the shallow decoder.
            prediction: Prediction whose logits give the log-probability.
            logprob: Log-probability, if `prediction` has none.
            source: See Token. Default: "exit" or "deep".
        """
        self.newest = token
        if self.sampler is not None:
            self._ids[self._length] = token
        self._length += 1
        if self._fixed:
            self._look_ahead()
        best: TopLogprobs | None = None
        if self._logprobs and prediction is not None and prediction.logits is not None:
            logprobs = log_softmax(prediction.logits)
            logprob = logprobs.item(token)
            if self._top_logprobs:
                ids = likeliest(prediction.logits, self._top_logprobs)
                best = tuple(zip(ids.tolist(), logprobs[ids].tolist(), strict=True))
        if token in self.eos:
            text = ""
            self.finished = "eos"
        else:
            text = self._push(token)
            if self._text.stopped:
                self.finished = "stop"
            elif self._length == self._end:
                self.finished = "length"
            elif self.interruptible or self.cancelled:
                self.finished = self.interruption()
        if self.finished is not None:
            text += self._text.finish()
        # Avoids the Python function that constructs a named tuple.
        source = source or ("exit" if exited else "deep")
        final: Token = tuple.__new__(
            Token, (token, text, exited, confidence, logprob, best, source)
        )
        self.times.append(monotonic())
        self.tokens.append(final)
        return final

    def start(self, stats: Stats) -> None:
        """Called when the request gets a slot. `stats` collects its statistics from now on."""
        self._began = monotonic()
        stats.queue_seconds = self._began - self.arrival
        self._stats = stats

    def finish(self) -> None:
        """Called when no more tokens follow. Sets `finished` unless the output ended by itself."""
        if self.finished is None:
            self.finished = self.interruption() or "cancelled"

    def close(self) -> None:
        """Called when the request returns its slot."""
        self.finish()
        self._rest = self._text.finish()
        self._count()
        self._began = None

    def freeze(self, count: int | None = None) -> None:
        """End the request at the deadline for its caller, with its first `count` tokens.

        Default: all tokens so far. The worker may still add tokens.
        """
        if self._frozen is None:
            tokens = tuple(self.tokens[:count])
            self._count()
            # The worker may still write to the originals.
            passes = self._stats.longer_passes
            passes = {rows: dataclasses.replace(done) for rows, done in dict(passes).items()}
            stats = dataclasses.replace(self._stats, longer_passes=passes, tokens=len(tokens))
            self._frozen = _result(tokens, "", "deadline", stats=stats, prompt=self._scored_prompt)

    @property
    def result(self) -> GenerationResult:
        """The tokens so far.

        `finish_reason` is "cancelled" or "deadline" until the output has ended by itself.
        """
        if self._frozen is not None:
            return self._frozen
        self._count()
        reason = self.finished or self.interruption() or "cancelled"
        return _result(
            tuple(self.tokens), self._rest, reason, stats=self._stats, prompt=self._scored_prompt
        )

    def _count(self) -> None:
        """Update the statistics that are not updated at every token."""
        self._stats.tokens = len(self.tokens)
        if self._grammar is not None:
            self._stats.grammar_seconds = self._grammar.seconds
        if self.tokens:
            self._stats.first_token_seconds = self.times[0] - self.arrival
        if self._began is not None:
            self._stats.seconds = monotonic() - self._began


def _result(
    tokens: tuple[Token, ...],
    rest: str,
    reason: FinishReason,
    stats: Stats,
    prompt: PromptLogprobs | None,
) -> GenerationResult:
    logprobs = tuple(token.logprob for token in tokens if token.logprob is not None)
    best = tuple(token.top_logprobs for token in tokens if token.top_logprobs is not None)
    return GenerationResult(
        text="".join(token.text for token in tokens) + rest,
        token_ids=tuple(token.id for token in tokens),
        exited=tuple(token.exited for token in tokens),
        confidence=tuple(token.confidence for token in tokens),
        finish_reason=reason,
        stats=stats,
        logprobs=logprobs if tokens and len(logprobs) == len(tokens) else None,
        top_logprobs=best if tokens and len(best) == len(tokens) else None,
        sources=tuple(token.source for token in tokens),
        prompt_logprobs=prompt,
    )
