"""Checks of option values.

The check of a field follows from its type, or is part of its annotation (generation_options.py).
"""

from __future__ import annotations

import json
import math
import numbers
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from numbers import Integral
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from runtime.errors import OptionError, one_line, shown
from runtime.text.sampler import LogitsProcessor

# Maximum of counts: the largest int64, which numpy can hold and every message can print.
MOST = 2**63 - 1
ABOVE_ZERO = math.ulp(0.0)
MAX_BIAS = 1e20  # nats, as logits are float32
LONGEST_SALT = 256  # maximum number of characters of a cache salt
MAX_GRAMMAR = 256 << 10  # maximum number of characters in a constraint
# Maximum number of keys per object of a schema. Compile time grows with their square.
MAX_PROPERTIES = 1000
MAX_DEPTH = 100  # maximum nesting depth of a schema

# Checks an option, given its name and value, and returns the value to store. Raises OptionError.
Check = Callable[[str, Any], Any]


def check_fields(options: Any) -> None:
    """Check every field of a frozen dataclass of options, and store what the checks return."""
    for name, check in _checks_of(options.__class__).items():
        value = getattr(options, name)
        checked = check(name, value)
        if checked is not value:
            object.__setattr__(options, name, checked)


@cache
def _checks_of(kind: Any) -> dict[str, Check]:
    """Return the check of each field of a dataclass of options."""
    return {
        name: _check_of(hint) for name, hint in get_type_hints(kind, include_extras=True).items()
    }


def _check_of(hint: Any) -> Check:
    """Return the check in a field's annotation, or else the one that follows from its type."""
    kind, *annotated = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    optional = NoneType in kinds
    if annotated:
        check = annotated[0]
    elif str in kinds:
        check = text
    else:
        allowed = [
            value for each in kinds for value in ((True, False) if each is bool else get_args(each))
        ]
        check = OneOf((*allowed, None) if optional and bool in kinds else tuple(allowed))

    def checked(name: str, value: Any) -> Any:
        return value if value is None and optional else check(name, value)

    return checked


def path(name: str, value: Any) -> Any:
    """Check for the path of a file."""
    if isinstance(value, (str, Path)) and str(value):
        return value
    raise OptionError(f"{name} is {shown(value)}; give the path of a file")


@dataclass(frozen=True)
class Whole:
    """Check for whole numbers from `low` to `high`."""

    low: int
    high: int = MOST

    def __str__(self) -> str:
        return f"from {self.low}" + (f" to {self.high}" if self.high < MOST else "")

    def __call__(self, name: str, value: Any) -> Any:
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if whole and self.low <= value <= self.high:
            return value
        # The maximum count is mentioned only if it is exceeded.
        allowed = f"from {self.low} to {self.high}" if whole and value > self.high else str(self)
        raise OptionError(f"{name} is {shown(value)}; choose an integer {allowed}")


@dataclass(frozen=True)
class Real:
    """Check for finite numbers from `low` to `high`, and the value `also`.

    `text` describes them in messages, after "a number".
    """

    low: float
    high: float = sys.float_info.max
    text: str = ""
    also: str | float | None = None

    def __str__(self) -> str:
        return self.text or f"from {self.low:g} to {self.high:g}"

    def __call__(self, name: str, value: Any) -> Any:
        given = value if isinstance(value, str) else number(value)
        if given == self.also or (not isinstance(given, str) and self.low <= given <= self.high):
            return value
        raise OptionError(f"{name} is {shown(value)}; choose a number {self}")


@dataclass(frozen=True)
class OneOf:
    """Check for one of several strings, True, False or None."""

    values: tuple[str | bool | None, ...]

    def __call__(self, name: str, value: Any) -> Any:
        simple = value is None or isinstance(value, (str, bool, np.bool_))
        if simple and value in self.values:
            return value
        *most, last = map(repr, self.values)
        raise OptionError(f"{name} is {shown(value)}; choose {', '.join(most)} or {last}")


def number(value: Any) -> float:
    """Convert a value to float. Returns NaN, which is in no range, if it is not a real number.

    Numbers beyond float64 are NaN, too.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, (bool, np.bool_)):
        return math.nan
    try:
        return float(value)
    except (OverflowError, ValueError, TypeError):
        return math.nan


def text(name: str, value: Any) -> str:
    """Check for a text that is not empty."""
    if not (isinstance(value, str) and value):
        raise OptionError(f"{name} is {shown(value)}; give a text that is not empty")
    return value


def salt(name: str, value: Any) -> str:
    """Check for a text of 1 to LONGEST_SALT characters."""
    if len(text(name, value)) > LONGEST_SALT:
        raise OptionError(f"{name} has {len(value)} characters; give at most {LONGEST_SALT}")
    return str(value)


def adaptive_state(name: str, value: Any) -> Mapping[str, Any]:
    """Check for the state of an adaptive threshold, a mapping."""
    if not isinstance(value, Mapping):
        raise OptionError(
            f"{name} is {shown(value)}; give the state that Session.adaptive_state() returned"
        )
    return value


def draft_source(name: str, value: Any) -> Callable[..., Any]:
    """Check for a callable."""
    if not callable(value):
        raise OptionError(f"{name} is {shown(value)}; give a callable")
    return value


def expected_output(name: str, value: Any) -> str | Sequence[int] | np.ndarray:
    """Check for text or a sequence of token ids."""
    if isinstance(value, (bytes, bytearray)) or not isinstance(value, (str, Sequence, np.ndarray)):
        raise OptionError(f"{name} is {shown(value)}; give text or a list of token ids")
    return value


def temperatures(low: float, high: float) -> Check:
    """Return a check for a list of temperatures from `low` to `high`."""

    def check(name: str, value: Any) -> tuple[float, ...]:
        given = listed(value)
        if given is None or not all(low <= number(each) <= high for each in given):
            raise OptionError(f"{name} is {shown(value)}; give temperatures above 0, or ()")
        return given

    return check


def listed(given: Any) -> tuple[Any, ...] | None:
    """Return the items of a finite collection, None for anything else.

    Iterators are not accepted, because checking an endless one would not terminate.
    """
    if not isinstance(given, Collection) or not isinstance(given, Iterable):
        return None
    try:
        return tuple(given)
    except Exception:  # a foreign class that cannot be read. The caller reports the option
        return None


def stop_strings(name: str, value: Any) -> tuple[str, ...]:
    """Check for strings that are not empty. Returns a tuple."""
    strings = (value,) if isinstance(value, str) else listed(value)
    if strings is None or not all(isinstance(each, str) and each for each in strings):
        raise OptionError(f"{name} is {shown(value)}; give strings that are not empty")
    return strings


class _Checked(str):
    """A checked schema as JSON, so that `dataclasses.replace` does not check it again."""


def json_schema(name: str, value: Any) -> _Checked:
    """Check for a JSON schema, as a mapping or as text. Returns text."""
    if isinstance(value, _Checked):
        return value
    problem = f"{name} is {shown(value)}"
    if not isinstance(value, (str, Mapping)):
        raise OptionError(f"{problem}; give a JSON schema as a mapping, or its text")
    try:
        source = value if isinstance(value, str) else json.dumps(value)
        if len(source) > MAX_GRAMMAR:
            raise OptionError(
                f"{name} has {len(source)} characters, at most {MAX_GRAMMAR} are read; shorten it"
            )
        schema = json.loads(source)
    except (ValueError, TypeError, RecursionError) as error:
        raise OptionError(
            f"{problem}, no JSON ({one_line(error)}); give a mapping or its text"
        ) from None
    if not isinstance(schema, dict):
        raise OptionError(f"{problem}; give a JSON object")
    check_schema(name, schema)
    return _Checked(source)


def check_schema(name: str, schema: Any) -> None:
    """Check that a JSON schema, the value of option `name`, is small enough to compile quickly.

    Raises:
        OptionError: If it is too deep or too wide.
    """
    inner: list[tuple[Any, int]] = [(schema, 0)]
    while inner:
        value, depth = inner.pop()
        if isinstance(value, dict) and len(value) > MAX_PROPERTIES:
            most = f"at most {MAX_PROPERTIES} are read"
            raise OptionError(f"{name} has an object of {len(value)} keys, {most}; split it")
        if depth > MAX_DEPTH:
            raise OptionError(
                f"{name} is nested deeper than {MAX_DEPTH} levels; name parts of it in $defs"
            )
        below = (
            value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        )
        inner.extend((part, depth + 1) for part in below)


def grammar(name: str, value: Any) -> str:
    """Check for a regular expression or a grammar, including its embedded JSON schemas."""
    source = text(name, value)
    if len(source) > MAX_GRAMMAR:
        raise OptionError(
            f"{name} has {len(source)} characters, at most {MAX_GRAMMAR} are read; shorten it"
        )
    for match in re.finditer(r"%json\s*", source if name == "grammar" else ""):
        with suppress(ValueError, RecursionError):  # llguidance reports the error
            check_schema(name, json.JSONDecoder().raw_decode(source, match.end())[0])
    return source


def choices(name: str, value: Any) -> tuple[str, ...]:
    """Check for a list of strings that are not empty. Returns a tuple."""
    given = None if isinstance(value, str) else listed(value)
    if not given or not all(isinstance(each, str) and each for each in given):
        raise OptionError(f"{name} is {shown(value)}; give a list of strings that are not empty")
    if sum(map(len, given)) > MAX_GRAMMAR:
        raise OptionError(f"{name} has more than {MAX_GRAMMAR} characters; give fewer")
    return given


class _Biases(dict[tuple[int, ...], float]):
    """Checked biases, so that `dataclasses.replace` does not check a thousand of them again."""


def token_biases(name: str, value: Any) -> _Biases:
    """Check for a mapping from tokens, or tuples of tokens, to biases."""
    if isinstance(value, _Biases):
        return value
    items = listed(value.items()) if isinstance(value, Mapping) else None
    biases = _Biases({key if isinstance(key, tuple) else (key,): bias for key, bias in items or ()})
    fit = all(map(_is_sequence, biases)) and all(
        abs(number(bias)) <= MAX_BIAS for bias in biases.values()
    )
    if items is None or not fit:
        raise OptionError(
            f"{name} is {shown(value)}; "
            f"give {{token: bias}} or {{(token, token): bias}}, biases of at most {MAX_BIAS:.0e} "
            "nats"
        )
    return biases


def _is_sequence(tokens: tuple[Any, ...]) -> bool:
    """Return True for a tuple of at least one token id."""
    whole = all(isinstance(token, Integral) and not isinstance(token, bool) for token in tokens)
    return bool(tokens) and whole and all(0 <= token <= MOST for token in tokens)


def logits_processors(name: str, value: Any) -> tuple[LogitsProcessor, ...]:
    """Check for a callable or a list of callables. Returns a tuple."""
    processors = (value,) if callable(value) else listed(value)
    if processors is None or not all(callable(processor) for processor in processors):
        raise OptionError(f"{name} is {shown(value)}; give a callable, or a list of them")
    return processors
