"""The tokens of one request: the prompt, what is final, how the next is chosen, and where they must end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from runtime.decoding.prediction import Prediction
from runtime.text.sampler import Sampler, log_probability


class Step(NamedTuple):
    """One generated token; `confidence` is the shallow decoder's, None where it was not asked; `logprob` in nats of
    the decoder that spoke last on it, None where it was not asked for."""

    token: int
    exited: bool
    confidence: float | None
    logprob: float | None = None


class OutputTokens:
    """Choosing does not depend on what was chosen and given up before: a draft is chosen as the final token is.

    `prompt` int64 [n]: what the decoder reads before the first token. `limit`: most tokens. `sampler` None is arg max.
    """

    def __init__(
        self,
        prompt: np.ndarray,
        limit: int,
        eos: frozenset[int] = frozenset(),
        sampler: Sampler | None = None,
        logprobs: bool = False,
    ) -> None:
        self._ids = np.empty(len(prompt) + limit, np.int64)
        self._ids[: len(prompt)] = prompt
        self._length, self._end = len(prompt), len(prompt) + limit
        self._eos, self._sampler, self._logprobs = eos, sampler, logprobs

    @property
    def needs_logits(self) -> bool:
        return self._sampler is not None or self._logprobs

    @property
    def newest(self) -> int:
        """The last token, which the decoder reads next."""
        return int(self._ids[self._length - 1])

    def choose(self, said: Prediction, drafts: Sequence[int] = ()) -> int:
        """The token that comes after the final ones and `drafts`."""
        if self._sampler is None:
            return said.token
        length = self._length + len(drafts)
        self._ids[self._length : length] = drafts
        assert said.logits is not None
        return self._sampler(said.logits, self._ids[:length])

    def ends(self, drafts: Sequence[int]) -> bool:
        """Whether the request is over with the last of `drafts`, should all of them become final."""
        return drafts[-1] in self._eos or self._length + len(drafts) >= self._end

    def add(self, token: int, exited: bool, confidence: float | None, said: Prediction) -> Step:
        """Make a token final. `said` is the prediction that its log-probability comes from."""
        if self._length < self._end:
            self._ids[self._length] = token
            self._length += 1
        logprob = log_probability(said.logits, token) if self._logprobs and said.logits is not None else None
        return Step(token, exited, confidence, logprob)
