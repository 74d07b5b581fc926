"""Exits and drafts that are replayed, not decided: what a rate of them costs, whatever the model has learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from runtime import Session
from runtime.decoding.calls import Prediction
from runtime.decoding.decoder import Decoder
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


@dataclass
class ExitScript:
    """Shallow predictions are as confident as in the trace; None: as the model is. `onward`: a request begins where the
    one before it in its slot left off, so that many short ones have the rate of the trace."""

    trace: Sequence[bool] | None
    onward: bool


class ExitReplay(Decoder):
    """All engines run as ever, so what is measured is what such exits would cost. Sequences side by side do not exit in
    step."""

    def __init__(self, script: ExitScript, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._script = script
        self._row = self._start = self.slot * STRIDE

    def begun(self, prompt: int) -> None:
        self._row = self._row if self._script.onward else self._start

    def prediction(self) -> Prediction:
        shallow, trace = super().prediction(), self._script.trace
        if trace is None:
            return shallow
        self._row += 1
        return shallow._replace(confidence=float(trace[(self._row - 1) % len(trace)]))


class ForcedExitSession(Session):
    """A session in which a token exits where `trace` says so, at any threshold inside (0, 1), unless the stack is full;
    without a trace it is like any other. For modes that take nothing back: "free" without overlap."""

    def __init__(
        self, bundle: Path | str, trace: Sequence[bool] | None = None, onward: bool = False, **options: Any
    ) -> None:
        self._script = ExitScript(trace, onward)
        super().__init__(bundle, decoder_type=partial(ExitReplay, self._script), **{**options, "overlap": False})

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


@dataclass
class Answer:
    """The output of mode full for a prompt, for drafts to be taken from; None: the shallow decoder drafts. The draft of
    place i is sure, and right where `right[i]`."""

    tokens: Sequence[int] | None = None
    right: Sequence[bool] = (True,)


class DraftReplay(Decoder):
    """Drafts are taken from an answer. The deep prediction is the answer, as with quantized weights it might stray from
    it over several rows."""

    def __init__(self, answer: Answer, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._given, self._prompt = answer, 0

    def begun(self, prompt: int) -> None:
        self._prompt = prompt

    def prediction(self) -> Prediction:
        shallow, tokens, right = super().prediction(), self._given.tokens, self._given.right
        if tokens is None:
            return shallow
        # Places are counted from the first token, which comes after the prompt's last row.
        place = self.lengths()[0] - self._prompt
        if place >= len(tokens):
            return shallow._replace(confidence=0.0)
        wrong = 0 if right[place % len(right)] else 1
        return shallow._replace(token=(tokens[place] + wrong) % self.vocab_size, confidence=1.0)

    def answers(self) -> list[Prediction]:
        return self._answered(super().answers())

    def full_step(self, token: int) -> int:
        return self._answered([Prediction(super().full_step(token))])[0].token

    def _answered(self, deep: list[Prediction]) -> list[Prediction]:
        tokens = self._given.tokens
        if tokens is None:
            return deep
        places = enumerate(deep, self.lengths()[1] - len(deep) + 1 - self._prompt)
        return [one._replace(token=tokens[place]) if place < len(tokens) else one for place, one in places]


class ForcedDraftSession(Session):
    """A session of one slot, without overlap, that can replay drafts in mode "lossless"."""

    def __init__(self, bundle: Path | str, **options: Any) -> None:
        self._answer = Answer()
        super().__init__(
            bundle, decoder_type=partial(DraftReplay, self._answer), **{**options, "overlap": False, "slots": 1}
        )

    @contextmanager
    def drafting(self, tokens: Sequence[int], rate: float) -> Iterator[None]:
        """Requests meanwhile draft the `tokens` that mode full gives for their prompt, except that they take another
        in place of one minus `rate` of them, the same each time."""
        self._answer.tokens, self._answer.right = tokens, drawn(rate, 2)
        try:
            yield
        finally:
            self._answer.tokens = None
