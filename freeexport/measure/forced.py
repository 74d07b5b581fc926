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
class Script:
    """Replays exits, `trace`, or drafts, which are taken from `tokens`, the output of mode full: the draft of place i
    is confident, and right where `right[i]`. With neither, predictions are the model's own."""

    trace: Sequence[bool] | None = None
    tokens: Sequence[int] | None = None
    right: Sequence[bool] = (True,)


class ReplayDecoder(Decoder):
    """All engines run as ever, so what is measured is what such exits and drafts would cost. While drafts are replayed,
    the deep prediction is the output, as with quantized weights it might stray from it over several rows."""

    def __init__(self, script: Script, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._script, self._prompt, self._decided = script, 0, 0

    def begun(self, prompt: int) -> None:
        self._prompt, self._decided = prompt, 0

    def prediction(self) -> Prediction:
        shallow, script = super().prediction(), self._script
        if script.trace is not None:
            self._decided += 1
            return shallow._replace(confidence=float(script.trace[(self._decided - 1) % len(script.trace)]))
        if script.tokens is None:
            return shallow
        # Places are counted from the first token, which comes after the prompt's last row.
        place = self.lengths()[0] - self._prompt
        if place >= len(script.tokens):
            return shallow._replace(confidence=0.0)
        wrong = 0 if script.right[place % len(script.right)] else 1
        return shallow._replace(token=(script.tokens[place] + wrong) % self.vocab_size, confidence=1.0)

    def answers(self) -> list[Prediction]:
        return self._answered(super().answers())

    def full_step(self, token: int) -> int:
        return self._answered([Prediction(super().full_step(token))])[0].token

    def _answered(self, deep: list[Prediction]) -> list[Prediction]:
        tokens = self._script.tokens
        if tokens is None:
            return deep
        places = enumerate(deep, self.lengths()[1] - len(deep) + 1 - self._prompt)
        return [one._replace(token=tokens[place]) if place < len(tokens) else one for place, one in places]


class ReplaySession(Session):
    """A session of one slot, without overlap, that can replay exits in mode "free" and drafts in mode "lossless", at
    any threshold inside (0, 1)."""

    def __init__(self, bundle: Path | str, **options: Any) -> None:
        self._script = Script()
        decoder = partial(ReplayDecoder, self._script)
        super().__init__(bundle, decoder_type=decoder, **{**options, "overlap": False, "slots": 1})

    def __enter__(self) -> ReplaySession:
        return self

    @contextmanager
    def replaying(self, trace: Sequence[bool]) -> Iterator[None]:
        """Requests meanwhile exit as `trace` says, unless the stack is full."""
        self._script.trace = trace
        try:
            yield
        finally:
            self._script.trace = None

    @contextmanager
    def drafting(self, tokens: Sequence[int], rate: float) -> Iterator[None]:
        """Requests meanwhile draft the `tokens` that mode full gives for their prompt, except that they take another
        in place of one minus `rate` of them, the same each time."""
        self._script.tokens, self._script.right = tokens, drawn(rate, 2)
        try:
            yield
        finally:
            self._script.tokens = None
