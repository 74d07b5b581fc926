"""Exits and drafts that are replayed, not decided: what a rate of them costs, whatever the model has learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from runtime import Session
from runtime.decoding.calls import Prediction
from runtime.decoding.decoder import Decisions, Decoder
from runtime.errors import OptionError
from runtime.json_file import parse_json, read_text

# Between the two confidences that a replayed decision is given.
THRESHOLD = 0.5
_DRAWN = 4096
# Rows of the trace between where two slots begin.
STRIDE = 257


def exit_trace(what: str, predicted: int = 1) -> list[bool]:
    """Whether each token exits, but for those of an answer that reading the prompt `predicted`: independently at a rate
    in [0, 1) ("0.8", the same draw each time), or as in a JSONL file that `freeexport generate --output` wrote. Raises
    OptionError."""
    try:
        rate = float(what)
    except ValueError:
        return _recorded(Path(what), predicted)
    if not 0 <= rate < 1:
        raise OptionError(f"--replay {what} is no rate of exits; choose one from 0 to below 1, or a file")
    return drawn(rate, 1)


def drawn(rate: float, seed: int) -> list[bool]:
    """Exits that come independently at `rate`."""
    return list(map(bool, np.random.default_rng(seed).random(_DRAWN) < rate))


def _recorded(path: Path, predicted: int) -> list[bool]:
    if not path.exists():
        raise OptionError(f"--replay {path}: there is no such file; give a rate, as 0.8, or a file")
    try:
        lines = [parse_json(line, nan=True) for line in read_text(path).split("\n") if line.strip()]
        exits = [bool(flag) for line in lines for flag in line.get("exited", [])[predicted:]]
    except (ValueError, AttributeError, TypeError) as error:
        raise OptionError(f"--replay {path} cannot be read ({error}); give what `generate --output` wrote") from None
    if not exits:
        raise OptionError(f"--replay {path} holds no token that could exit; give what `generate --output` wrote")
    return exits


class Script(Decisions):
    """Shallow predictions are as confident as in the trace; None: as the model is. Sequences side by side do not exit
    in step. `onward`: a request begins where the one before it in its slot left off, so that many short ones have the
    rate of the trace."""

    def __init__(self, trace: Sequence[bool] | None, onward: bool) -> None:
        self.trace, self.onward = trace, onward
        self._starts: dict[Decoder, int] = {}
        self._rows: dict[Decoder, int] = {}

    def begin(self, decoder: Decoder, prompt: int) -> None:
        start = self._starts.setdefault(decoder, len(self._starts) * STRIDE)
        self._rows[decoder] = self._rows.get(decoder, start) if self.onward else start

    def guess(self, decoder: Decoder, position: int, shallow: Prediction) -> Prediction:
        if self.trace is None:
            return shallow
        row = self._rows[decoder]
        self._rows[decoder] = row + 1
        return shallow._replace(confidence=float(self.trace[row % len(self.trace)]))


class ForcedExitSession(Session):
    """A session in which a token exits where `trace` says so, at any threshold inside (0, 1), unless the stack is full;
    without a trace it is like any other. For modes that take nothing back: "free" without overlap."""

    def __init__(
        self, bundle: Path | str, trace: Sequence[bool] | None = None, onward: bool = False, **options: Any
    ) -> None:
        self._script = Script(trace, onward)
        super().__init__(bundle, decisions=self._script, **{**options, "overlap": False})

    def __enter__(self) -> ForcedExitSession:
        return self

    @contextmanager
    def replaying(self, trace: Sequence[bool]) -> Iterator[None]:
        """Requests meanwhile exit as `trace` says."""
        before, self._script.trace = self._script.trace, trace
        try:
            yield
        finally:
            self._script.trace = before


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
