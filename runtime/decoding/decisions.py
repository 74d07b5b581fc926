"""A hook for measurements: what the decoders are taken to have said, in place of what they did."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.decoding.prediction import Prediction

if TYPE_CHECKING:
    from runtime.decoding.decoder import Decoder


class Decisions:
    """For `Session(..., decisions=...)`: subclass it and override what is to be decided; this one changes nothing. All
    engines run as ever, so what is measured is what such decisions would cost. Called by whichever thread drives, for
    one sequence at a time. Positions are counted from 0 at the first token of the prompt."""

    def begin(self, decoder: Decoder, prompt: int) -> None:
        """A sequence has read its prompt of so many tokens, with a decoder that is its own until it ends."""

    def guess(self, decoder: Decoder, position: int, said: Prediction) -> Prediction:
        """What a step with the shallow head is taken to say, after the token at `position`."""
        return said

    def answers(self, decoder: Decoder, first: int, said: list[Prediction]) -> list[Prediction]:
        """What a sync pass is taken to say, after the tokens at `first` and the positions that follow."""
        return said
