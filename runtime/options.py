"""What a caller may ask for, checked where it enters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args

from runtime.errors import OptionError

Mode = Literal["free", "full", "shallow"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How a session runs. OptionError names a value that is out of range.

    threads: CPU threads of an engine call; None is one per physical core this process may use.
    slots: sequences that can be decoded at once; further requests wait. Default 4.
    capacity: valid positions of a slot's KV cache; None is what the bundle was converted for, more is refused.
    """

    threads: int | None = None
    slots: int = 4
    capacity: int | None = None
    verify: Literal["sizes", "full"] = "sizes"
    device: str = "cpu"

    def __post_init__(self) -> None:
        _in_range("threads", self.threads, 1, 1024)
        _in_range("slots", self.slots, 1, 4096)
        _in_range("capacity", self.capacity, 1, None)
        if self.verify not in ("sizes", "full"):
            raise OptionError(f"verify is {self.verify!r}; choose 'sizes' or 'full'")
        if self.device != "cpu":
            raise OptionError(f"device is {self.device!r}; this version runs on 'cpu' only")


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How one request is decoded. OptionError names a value that is out of range.

    max_new_tokens: most tokens to generate, end of sequence included; clipped to the KV cache. Default 256.
    mode: "free" exits early; "full" never does and runs no shallow head; "shallow" always does and runs the deep
        decoder on the prompt alone (static exiting, to compare with).
    threshold: a token exits if its confidence is greater; in [0, 1], 1 never exits. None is the bundle's.
    max_pending: most rows of a sync pass; None is the bundle's.
    stop: generation ends before the first of these strings appears in the text.
    ignore_eos: go on after an end-of-sequence token (to measure).
    """

    max_new_tokens: int = 256
    mode: Mode = "free"
    threshold: float | None = None
    max_pending: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _in_range("max_new_tokens", self.max_new_tokens, 1, None)
        _in_range("max_pending", self.max_pending, 1, None)
        if self.mode not in MODES:
            raise OptionError(f"mode is {self.mode!r}; choose one of {', '.join(MODES)}")
        if self.threshold is not None and not (isinstance(self.threshold, Real) and 0.0 <= self.threshold <= 1.0):
            raise OptionError(f"threshold is {self.threshold!r}; choose a number from 0 (exit always) to 1 (never)")
        single = isinstance(self.stop, str) or not isinstance(self.stop, Iterable)
        stop = (self.stop,) if single else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise OptionError(f"stop is {self.stop!r}; give strings that are not empty")
        object.__setattr__(self, "stop", stop)


def _in_range(name: str, value: int | None, low: int, high: int | None) -> None:
    if value is None:
        return
    if not isinstance(value, Integral) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise OptionError(f"{name} is {value!r}; choose a whole number from {low}" + (f" to {high}" if high else ""))
