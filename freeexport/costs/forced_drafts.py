"""Drafts that are replayed, not made: what mode lossless costs at a rate of right drafts, whatever the model has
learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from freeexport.costs.forced_exits import drawn
from runtime import Session
from runtime.adaptation.call_costs import CallCosts
from runtime.adaptation.draft_length import DraftLengths
from runtime.decoding.decisions import Decisions
from runtime.decoding.decoder import Decoder
from runtime.decoding.prediction import Prediction


class Answer(Decisions):
    """The output of mode full for a prompt, for drafts to be taken from; None: the shallow decoder drafts. The draft of
    place i is sure, and right where `right[i]`. The deep prediction is the answer, as with quantized weights it might
    stray from it over several rows."""

    def __init__(self) -> None:
        self.tokens: Sequence[int] | None = None
        self.right: Sequence[bool] = [True]
        self._prompt = 0

    def begin(self, decoder: Decoder, prompt: int) -> None:
        self._prompt = prompt

    def guess(self, decoder: Decoder, position: int, shallow: Prediction) -> Prediction:
        if self.tokens is None:
            return shallow
        # Places are counted from the first token, which comes after the prompt's last row.
        place = position + 1 - self._prompt
        if place >= len(self.tokens):
            return shallow._replace(confidence=0.0)
        wrong = 0 if self.right[place % len(self.right)] else 1
        return shallow._replace(token=(self.tokens[place] + wrong) % decoder.vocab_size, confidence=1.0)

    def answers(self, decoder: Decoder, first: int, deep: list[Prediction]) -> list[Prediction]:
        tokens = self.tokens
        if tokens is None:
            return deep
        places = enumerate(deep, first + 1 - self._prompt)
        return [one._replace(token=tokens[place]) if place < len(tokens) else one for place, one in places]


class ForcedDraftSession(Session):
    """A session of one slot, without overlap, that can replay drafts in mode "lossless"."""

    def __init__(self, bundle: Path | str, **options: Any) -> None:
        self._answer = Answer()
        super().__init__(bundle, decisions=self._answer, **{**options, "overlap": False, "slots": 1})

    @contextmanager
    def drafting(self, tokens: Sequence[int], rate: float) -> Iterator[None]:
        """Requests meanwhile draft the `tokens` that mode full gives for their prompt, except that they take another
        in place of one minus `rate` of them, the same each time."""
        self._answer.tokens, self._answer.right = tokens, drawn(rate, 2)
        try:
            yield
        finally:
            self._answer.tokens = None

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Requests meanwhile are as the first of a session: nothing is known of drafts."""
        learned, self.draft_lengths = self.draft_lengths, DraftLengths(CallCosts(self.draft_lengths.costs.base))
        try:
            yield
        finally:
            self.draft_lengths = learned
