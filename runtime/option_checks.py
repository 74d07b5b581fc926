"""Checks that options share: each raises OptionError with the option's name, its value, and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from numbers import Integral, Real
from typing import Any

import numpy as np

from runtime.errors import OptionError

# Counts end where int64 ends: numpy holds them, and every message can print them.
MOST = 2**63 - 1


def shown(value: Any) -> str:
    """A value for a message: one line of at most 80 characters, whatever its repr does."""
    try:
        text = repr(value)
    except Exception:  # an int of more digits than Python prints, or a foreign class
        return f"of type {type(value).__name__}, which cannot be printed"
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def number(value: Any) -> float:
    """NaN, which is in no range, for what is no real number or beyond float64."""
    if not isinstance(value, Real) or isinstance(value, (bool, np.bool_)):
        return math.nan
    try:
        return float(value)
    except (OverflowError, ValueError, TypeError):
        return math.nan


def check_number(name: str, value: Any, low: float, high: float, allowed: str, *, optional: bool = True) -> None:
    """`value` is a finite number with low <= value <= high; None passes where `optional`."""
    if value is None and optional:
        return
    given = number(value)
    if not (math.isfinite(given) and low <= given <= high):
        raise OptionError(f"{name} is {shown(value)}; choose a number {allowed}")


def check_whole(name: str, value: Any, low: int, high: int = MOST, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not low <= value <= high:
        # The largest count is no choice that anybody would read about.
        upper = f" to {high}" if high < MOST or (whole and value > high) else ""
        raise OptionError(f"{name} is {shown(value)}; choose a whole number from {low}{upper}")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        *most, last = map(repr, choices)
        raise OptionError(f"{name} is {shown(value)}; choose {', '.join(most)} or {last}")


def check_bool(name: str, value: Any, *, none: str = "") -> None:
    """True or False, of numpy too; `none` says what None stands for, where it may be given."""
    if isinstance(value, (bool, np.bool_)) or (value is None and none):
        return
    raise OptionError(f"{name} is {shown(value)}; choose True{', False or None ' + none if none else ' or False'}")


def listed(given: Any) -> tuple[Any, ...] | None:
    """The items of a finite collection; None for anything else, as an endless iterator would never be checked."""
    if not isinstance(given, Collection) or not isinstance(given, Iterable):
        return None
    try:
        return tuple(given)
    except Exception:  # a foreign class that cannot be read; the caller names the option
        return None
