"""Exits that are replayed, not decided: what a rate of exits costs, whatever the model has learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from runtime import Session
from runtime.decoding.decoder import Decoder
from runtime.decoding.prediction import Prediction
from runtime.decoding.slot_call import Waits
from runtime.engines.runner import Runner
from runtime.errors import OptionError
from runtime.json_file import parse_json, read_text

# Between the two confidences that a replayed decision is given.
THRESHOLD = 0.5
_DRAWN = 4096
# Rows of the trace between where two slots begin.
STRIDE = 257


def exit_trace(what: str) -> list[bool]:
    """Whether each token after the first exits: independently at a rate in [0, 1) ("0.8", the same draw each time), or
    as in a JSONL file that `freeexport generate --output` wrote. Raises OptionError."""
    try:
        rate = float(what)
    except ValueError:
        return _recorded(Path(what))
    if not 0 <= rate < 1:
        raise OptionError(f"--replay {what} is no rate of exits; choose one from 0 to below 1, or a file")
    return drawn(rate, 1)


def drawn(rate: float, seed: int) -> list[bool]:
    """Exits that come independently at `rate`."""
    return list(map(bool, np.random.default_rng(seed).random(_DRAWN) < rate))


def _recorded(path: Path) -> list[bool]:
    if not path.exists():
        raise OptionError(f"--replay {path}: there is no such file; give a rate, as 0.8, or a file")
    try:
        lines = [parse_json(line, nan=True) for line in read_text(path).split("\n") if line.strip()]
        exits = [bool(flag) for line in lines for flag in line.get("exited", [])[1:]]
    except (ValueError, AttributeError, TypeError) as error:
        raise OptionError(f"--replay {path} cannot be read ({error}); give what `generate --output` wrote") from None
    if not exits:
        raise OptionError(f"--replay {path} holds no token that could exit; give what `generate --output` wrote")
    return exits


class Script:
    """Which tokens of the next requests exit; None: as the model says. `onward`: a request begins where the one before
    it in its slot left off, so that many short ones have the rate of the trace."""

    def __init__(self, trace: Sequence[bool] | None, onward: bool) -> None:
        self.trace, self.onward = trace, onward


class ReplayDecoder(Decoder):
    """A decoder whose shallow predictions are as sure as the script says, from row `start` of it at each request, if it
    does not go onward."""

    def __init__(self, script: Script, start: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._script, self._start, self._row = script, start, start

    def reset(self) -> None:
        super().reset()
        if not self._script.onward:
            self._row = self._start

    def stepping(self, token: int, head: bool) -> Waits[Prediction]:
        said = yield from super().stepping(token, head)
        trace = self._script.trace
        if trace is None or not head:
            return said
        exits = trace[self._row % len(trace)]
        self._row += 1
        return said._replace(confidence=float(exits))


class ForcedExitSession(Session):
    """A session in which a token exits where `trace` says so, at any threshold inside (0, 1), unless the stack is full;
    without a trace it is like any other. For modes that take nothing back: "free" without overlap."""

    def __init__(
        self, bundle: Path | str, trace: Sequence[bool] | None = None, onward: bool = False, **options: Any
    ) -> None:
        self._script = Script(trace, onward)
        super().__init__(bundle, **{**options, "overlap": False})
        # It is there to be measured.
        self.settle()

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

    def _decoder(self, shallow: Runner, deep: Runner, slot: int) -> Decoder:
        # Sequences side by side must not exit in step.
        return ReplayDecoder(self._script, slot * STRIDE, shallow, deep, slot, *self._sizes)
