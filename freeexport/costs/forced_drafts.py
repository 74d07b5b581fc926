"""Drafts that are replayed, not made: what mode lossless costs at a rate of right drafts, whatever the model has
learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from freeexport.costs.forced_exits import drawn
from runtime import Session
from runtime.adaptation.call_costs import CallCosts
from runtime.adaptation.draft_length import DraftLengths
from runtime.decoding.decoder import Decoder, RunAhead
from runtime.decoding.prediction import Prediction
from runtime.decoding.slot_call import Waits
from runtime.engines.runner import Runner


class Answer:
    """What mode full said to a prompt, for drafts to be taken from; None: the shallow decoder drafts. The draft of
    place i is right where `right[i]`."""

    def __init__(self) -> None:
        self.tokens: Sequence[int] | None = None
        self.right: Sequence[bool] = [True]


class DraftDecoder(Decoder):
    """A decoder whose shallow predictions are sure, and right where the answer says so. The deep decoder says the
    answer, as with rounded weights it might stray from it over several rows. Everything runs."""

    def __init__(self, answer: Answer, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._answer, self._prompt = answer, 0

    def prefilling(self, tokens: np.ndarray, head: bool) -> Waits[Prediction]:
        self._prompt = len(tokens)
        return (yield from super().prefilling(tokens, head))

    def stepping(self, token: int, head: bool) -> Waits[Prediction]:
        said = yield from super().stepping(token, head)
        tokens, right = self._answer.tokens, self._answer.right
        if tokens is None or not head:
            return said
        # Places are counted from the first token, which comes from the prompt's last row.
        place = self.lengths()[0] - self._prompt
        if place >= len(tokens):
            return said._replace(confidence=0.0)
        wrong = 0 if right[place % len(right)] else 1
        return said._replace(token=(tokens[place] + wrong) % self.vocab_size, confidence=1.0)

    def syncing(self, heads: int, drafts: Sequence[int], ahead: RunAhead | None) -> Waits[list[Prediction]]:
        said = yield from super().syncing(heads, drafts, ahead)
        tokens = self._answer.tokens
        if tokens is None:
            return said
        first = self.lengths()[1] - self._prompt - heads + 1
        return [
            one._replace(token=tokens[place]) if place < len(tokens) else one for place, one in enumerate(said, first)
        ]


class ForcedDraftSession(Session):
    """A session of one slot, without overlap, that can replay drafts in mode "lossless"."""

    def __init__(self, bundle: Path | str, **options: Any) -> None:
        self._answer = Answer()
        super().__init__(bundle, **{**options, "overlap": False, "slots": 1})

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
        learned, self._intake.paces = self._intake.paces, DraftLengths(CallCosts(self._intake.paces.costs.base))
        try:
            yield
        finally:
            self._intake.paces = learned

    @property
    def draft_costs(self) -> CallCosts:
        """What requests have learned of what drafts cost."""
        return self._intake.paces.costs

    def _decoder(self, shallow: Runner, deep: Runner, slot: int) -> Decoder:
        return DraftDecoder(self._answer, shallow, deep, slot, *self._sizes)
