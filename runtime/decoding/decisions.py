"""A hook for measurements: predictions in place of the decoders' own."""

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
        """A sequence begins to decode after a prompt of so many tokens, an encoder-decoder's start token among them,
        with a decoder that is its own until it ends."""

    def guess(self, decoder: Decoder, position: int, shallow: Prediction) -> Prediction:
        """In place of the shallow prediction after the token at `position`."""
        return shallow

    def answers(self, decoder: Decoder, first: int, deep: list[Prediction]) -> list[Prediction]:
        """In place of a sync pass's predictions after the tokens at `first` and the positions that follow."""
        return deep
