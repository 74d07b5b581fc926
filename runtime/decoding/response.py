"""The output of one request: the loops choose its tokens and make them final, here, to its end."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Mapping, Sequence
from time import monotonic
from types import MappingProxyType

import numpy as np

from runtime.decoding.calls import Prediction
from runtime.result import FinishReason, GenerationResult, Stats, Token, TopLogprobs
from runtime.text.detokenizer import Detokenizer
from runtime.text.sampler import Sampler, likeliest, log_softmax


class Response:
    """The tokens of one request so far, and the next: choosing does not depend on what was chosen and given up before,
    so a draft is chosen as the final token is.

    `prompt` int64 [n]: what the decoder reads before the first token. `limit`: most tokens. `eos`: tokens that end it.
    `fixed`: tokens that the model wants at a place of the output, whatever is predicted (a target language, the last
    end of sequence); a grammar is about what follows the first. `sampler` None is arg max. `logprobs`: also of each
    token, and with `top_logprobs` of as many of the likeliest in its place. `greedy`: of the next prediction the token
    is all that is needed; `reads_logits`: of some it is not. It ends early once `cancel` is set, or `cancelled`, and at
    `until`, which is like `asked` a time of the monotonic clock. `finished`: why it has ended, None until then.
    `times`: when each token became final.
    """

    def __init__(
        self,
        prompt: np.ndarray,
        limit: int,
        eos: frozenset[int] = frozenset(),
        sampler: Sampler | None = None,
        logprobs: bool = False,
        text: Detokenizer | None = None,
        top_logprobs: int = 0,
        cancel: threading.Event | None = None,
        asked: float = 0.0,
        until: float = math.inf,
        fixed: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self.prompt, self.cancelled, self.asked, self.until = prompt, False, asked, until
        self.may_leave = cancel is not None or until != math.inf
        self._cancel = cancel
        self._ids = np.empty(len(prompt) + limit, np.int64)
        self._ids[: len(prompt)] = prompt
        self._end = len(prompt) + limit
        self._fixed = {len(prompt) + place: token for place, token in fixed.items()}
        self._grammar_begins = len(prompt) + (0 in fixed)
        self._eos = eos
        self._logprobs, self._top_logprobs = logprobs or top_logprobs > 0, top_logprobs
        self._left: GenerationResult | None = None
        self.restart(sampler, text or Detokenizer(None))

    def restart(self, sampler: Sampler | None, text: Detokenizer) -> None:
        """Begin another continuation of the prompt."""
        self.tokens: list[Token] = []
        self.times: list[float] = []
        self.newest, self._length = int(self.prompt[-1]), len(self.prompt)
        self.finished: FinishReason | None = None
        self._sampler, self._text = sampler, text
        self.reads_logits = sampler is not None or self._logprobs
        self._grammar = None if sampler is None else sampler.grammar
        self._takes_best = sampler is not None and sampler.only_masks
        self._look_ahead()
        # Looked up once: what is called for every token is seldom in the processor's cache.
        self._push = text.push
        self._rest = ""  # text that was withheld when it was cut short
        self._stats = Stats()
        self._began: float | None = None  # while it has a slot

    def leaves(self) -> FinishReason | None:
        """Why the request is to end now; None where it may go on."""
        if self.cancelled or (self._cancel is not None and self._cancel.is_set()):
            return "cancelled"
        return "deadline" if self.until != math.inf and monotonic() >= self.until else None

    def choose(self, prediction: Prediction, drafts: Sequence[int] = ()) -> int:
        """The token that comes after the final ones and `drafts`."""
        if self._fixed:
            fixed = self._fixed.get(self._length + len(drafts))
            if fixed is not None:
                return fixed
        if self._sampler is None:
            return prediction.token
        context, grammar = self._context(drafts), self._grammar
        if grammar is not None:
            output = context[self._grammar_begins :]
            forced = grammar.forced(output)
            if forced is not None:
                return forced
            # The best token, where it is allowed, is the best that is.
            if self._takes_best and grammar.allows(output, (prediction.token,)):
                return prediction.token
        assert prediction.logits is not None
        return self._sampler(prediction.logits, context)

    def judged(self, guess: Prediction, drafts: Sequence[int] = ()) -> Prediction:
        """A shallow prediction, whose confidence is 0 where the grammar refuses its best token after `drafts`."""
        if self._grammar is None or guess.confidence is None or self._length + len(drafts) in self._fixed:
            return guess
        allowed = self._grammar.allows(self._output(drafts), (guess.token,))
        return guess if allowed else guess._replace(confidence=0.0)

    def forced(self, drafts: Sequence[int] = ()) -> int | None:
        """The only token that may come after the final ones and `drafts`, as it is fixed, or by the grammar; None where
        there is a choice, and where forced tokens need a prediction too, as their log-probabilities are one."""
        if self._logprobs:
            return None
        fixed = self._fixed.get(self._length + len(drafts))
        if fixed is not None or self._grammar is None:
            return fixed
        return self._grammar.forced(self._output(drafts))

    def _look_ahead(self) -> None:
        """Say how the next token is chosen. `joins_forced`: it may go without a prediction."""
        fixed = self._length in self._fixed
        self.greedy = not self.reads_logits and not fixed
        self.joins_forced = (fixed or self._grammar is not None) and not self._logprobs

    def _context(self, drafts: Sequence[int]) -> np.ndarray:
        length = self._length + len(drafts)
        self._ids[self._length : length] = drafts
        return self._ids[:length]

    def _output(self, drafts: Sequence[int]) -> np.ndarray:
        """The final tokens and `drafts` that the grammar is about."""
        return self._context(drafts)[self._grammar_begins :]

    def ends(self, drafts: Sequence[int]) -> bool:
        """True where the request is over with the last of `drafts`, should all of them become final."""
        return drafts[-1] in self._eos or self._length + len(drafts) >= self._end

    def within(self, drafts: list[int]) -> list[int]:
        """Cut `drafts` before the first that the grammar refuses, and behind the one that ends the request, should all
        of them become final."""
        ends = (place + 1 for place, token in enumerate(drafts) if token in self._eos)
        drafts = drafts[: min(next(ends, len(drafts)), self._end - self._length)]
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
    ) -> Token:
        """Make a token final. Its log-probability, where wanted, is what `prediction` gives it, else `logprob`."""
        self.newest = token
        if self._sampler is not None:
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
        if token in self._eos:
            text, self.finished = "", "eos"
        else:
            text = self._push(token)
            if self._text.stopped:
                self.finished = "stop"
            elif self._length == self._end:
                self.finished = "length"
            elif self.may_leave or self.cancelled:
                self.finished = self.leaves()
        if self.finished is not None:
            text += self._text.finish()
        # Without the function that a named tuple makes itself with.
        final: Token = tuple.__new__(Token, (token, text, exited, confidence, logprob, best))
        self.times.append(monotonic())
        self.tokens.append(final)
        return final

    def begin(self, stats: Stats) -> None:
        """It has a slot, whose `stats` are its own from now on."""
        self._began = monotonic()
        stats.queue_seconds = self._began - self.asked
        self._stats = stats

    def finish(self) -> None:
        """Nothing more will come: say why, unless it came to its end."""
        if self.finished is None:
            self.finished = self.leaves() or "cancelled"

    def close(self) -> None:
        """It gives its slot back."""
        self.finish()
        self._rest = self._text.finish()
        self._count()
        self._began = None

    def leave(self, count: int | None = None) -> None:
        """Stop waiting for it at its deadline: the first `count` tokens, by default those so far, are the result."""
        if self._left is None:
            tokens = tuple(self.tokens[:count])
            self._count()
            # The worker may go on writing to them.
            passes = {rows: dataclasses.replace(done) for rows, done in dict(self._stats.longer_passes).items()}
            stats = dataclasses.replace(self._stats, longer_passes=passes, tokens=len(tokens))
            self._left = _result(tokens, "", "deadline", stats)

    @property
    def result(self) -> GenerationResult:
        """The tokens so far; `finish_reason` is "cancelled" or "deadline" unless it came to its end."""
        if self._left is not None:
            return self._left
        self._count()
        reason = self.finished or self.leaves() or "cancelled"
        return _result(tuple(self.tokens), self._rest, reason, self._stats)

    def _count(self) -> None:
        """Fill in the counts that are not worth keeping at every token."""
        self._stats.tokens = len(self.tokens)
        if self._grammar is not None:
            self._stats.grammar_seconds = self._grammar.seconds
        if self.tokens:
            self._stats.first_token_seconds = self.times[0] - self.asked
        if self._began is not None:
            self._stats.seconds = monotonic() - self._began


def _result(tokens: tuple[Token, ...], rest: str, reason: FinishReason, stats: Stats) -> GenerationResult:
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
    )
