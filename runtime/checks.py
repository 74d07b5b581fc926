"""Checks of the values of options: numbers and choices, and what is read into another form. All raise OptionError."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from numbers import Integral, Real
from typing import Any

import numpy as np

from runtime.errors import OptionError, one_line, shown
from runtime.text.sampler import LogitsProcessor

# Counts end where int64 ends: numpy holds them, and every message can print them.
MOST = 2**63 - 1
MOST_BIAS = 1e20  # nats: logits are float32
# Characters of a constraint; in a schema, keys of an object, as compiling takes time that grows with their square, and
# levels.
MOST_GRAMMAR, MOST_PROPERTIES, MOST_DEPTH = 256 << 10, 1000, 100


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


def is_text(value: Any, text: str) -> bool:
    """Equal, where comparing with an array would give an array."""
    return isinstance(value, str) and value == text


def stop_strings(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else listed(stop)
    if strings is None or not all(isinstance(text, str) and text for text in strings):
        raise OptionError(f"stop is {shown(stop)}; give strings that are not empty")
    return strings


class _Checked(str):
    """A checked schema as JSON: `replace` does not check it again."""


def json_schema(given: Any) -> _Checked | None:
    if given is None or isinstance(given, _Checked):
        return given
    problem = f"json_schema is {shown(given)}"
    if not isinstance(given, (str, Mapping)):
        raise OptionError(f"{problem}; give a JSON schema as a mapping, or its text")
    try:
        text = given if isinstance(given, str) else json.dumps(given)
        if len(text) > MOST_GRAMMAR:
            raise OptionError(f"json_schema has {len(text)} characters, at most {MOST_GRAMMAR} are read; shorten it")
        schema = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise OptionError(f"{problem}, no JSON ({one_line(error)}); give a mapping or its text") from None
    if not isinstance(schema, dict):
        raise OptionError(f"{problem}; give a JSON object")
    check_schema("json_schema", schema)
    return _Checked(text)


def check_schema(name: str, schema: Any) -> None:
    """Raise OptionError for a JSON schema, the value of `name`, that is too deep or too wide to be compiled soon."""
    inner: list[tuple[Any, int]] = [(schema, 0)]
    while inner:
        value, depth = inner.pop()
        if isinstance(value, dict) and len(value) > MOST_PROPERTIES:
            most = f"at most {MOST_PROPERTIES} are read"
            raise OptionError(f"{name} has an object of {len(value)} keys, {most}; split it")
        if depth > MOST_DEPTH:
            raise OptionError(f"{name} is nested deeper than {MOST_DEPTH} levels; name parts of it in $defs")
        below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        inner.extend((part, depth + 1) for part in below)


def check_grammar(name: str, text: Any) -> None:
    """Raise OptionError for a regular expression or a grammar, the value of `name`, that is no text, too long, or has a
    JSON schema which `check_schema` refuses; None passes."""
    if text is None:
        return
    if not (isinstance(text, str) and text):
        raise OptionError(f"{name} is {shown(text)}; give a text that is not empty")
    if len(text) > MOST_GRAMMAR:
        raise OptionError(f"{name} has {len(text)} characters, at most {MOST_GRAMMAR} are read; shorten it")
    for found in re.finditer(r"%json\s*", text if name == "grammar" else ""):
        with suppress(ValueError, RecursionError):  # llguidance refuses it
            check_schema(name, json.JSONDecoder().raw_decode(text, found.end())[0])


def output_choices(given: Any) -> tuple[str, ...] | None:
    if given is None:
        return None
    choices = None if isinstance(given, str) else listed(given)
    if not choices or not all(isinstance(text, str) and text for text in choices):
        raise OptionError(f"choice is {shown(given)}; give a list of strings that are not empty")
    if sum(map(len, choices)) > MOST_GRAMMAR:
        raise OptionError(f"choice has more than {MOST_GRAMMAR} characters; give fewer")
    return choices


class _Biases(dict[tuple[int, ...], float]):
    """Checked biases: `replace` does not check a thousand of them again."""


def token_biases(given: Any) -> _Biases | None:
    if given is None or isinstance(given, _Biases):
        return given
    items = listed(given.items()) if isinstance(given, Mapping) else None
    biases = _Biases({key if isinstance(key, tuple) else (key,): bias for key, bias in items or ()})
    fit = all(map(_is_sequence, biases)) and all(abs(number(bias)) <= MOST_BIAS for bias in biases.values())
    if items is None or not fit:
        raise OptionError(
            f"sequence_bias is {shown(given)}; "
            f"give {{token: bias}} or {{(token, token): bias}}, biases of at most {MOST_BIAS:.0e} nats"
        )
    return biases


def _is_sequence(tokens: tuple[Any, ...]) -> bool:
    whole = all(isinstance(token, Integral) and not isinstance(token, bool) for token in tokens)
    return bool(tokens) and whole and all(0 <= token <= MOST for token in tokens)


def logits_processors(given: Any) -> tuple[LogitsProcessor, ...]:
    processors = (given,) if callable(given) else listed(given)
    if processors is None or not all(callable(processor) for processor in processors):
        raise OptionError(f"logits_processor is {shown(given)}; give a callable, or a list of them")
    return processors
