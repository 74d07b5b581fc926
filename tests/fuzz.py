"""Readers given what is almost right: a valid input with its bytes or its structure changed.

`fuzz(strategy, allowed)` makes a test of a reader: a function of one input that must return, or raise one of `allowed`
in one line. It tries a few hundred inputs, which takes a second or two. An input that fails is made small and printed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from profiles import tries

EXAMPLES = 200
# Seconds for one input: far more than any takes, on a machine that is busy with other things.
LONGEST = 20
LONGEST_MESSAGE = 2000

Input = TypeVar("Input")
Way = tuple[Any, ...]

# What readers stumble over.
TOKENS = (
    b"", b"\0", b"\xff", b"\xed\xa0\x80", b"NaN", b"-Infinity", b"1e999", b"-1", b"9" * 5000, b"1" + b"0" * 400,
    str(2**31).encode(), str(2**63).encode(), str(2**64).encode(), b"null", b"true", b"{}", b"[]", b'""', b'"\\ud800"',
    b"[" * 2000, b'{"a":' * 2000, b",", b":", b'"', b"\\", b"../", b"\r\n",
)  # fmt: skip
NUMBERS = (0, 1, 2, 127, 255, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, (1 << 64) - 1)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, float("nan"),
    float("inf"), "", "x", "0", "\0", "\ud800", "a\nb", "../x", "/etc/passwd", "y" * 10_000, [], {}, [None], [[[]]],
    {"": None}, {"a": {"b": {}}}, [0] * 20_000,
)  # fmt: skip


def mutated_bytes(valid: bytes) -> st.SearchStrategy[bytes]:
    """`valid` with up to four changes: a bit, a number, a piece left out, doubled or replaced, or an end cut off."""

    @st.composite
    def mutated(draw: st.DrawFn) -> bytes:
        content = valid
        for _ in range(draw(st.integers(1, 4))):
            first, second = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
            second = min(second, first + draw(st.sampled_from([1, 2, 8, 64, len(content)])))
            kind = draw(st.sampled_from(["bit", "number", "drop", "double", "token", "noise", "cut"]))
            if kind == "number":
                width = draw(st.sampled_from([4, 8]))
                number = draw(st.sampled_from(NUMBERS)) % (1 << 8 * width)
                content = content[:first] + number.to_bytes(width, "little") + content[first + width :]
            elif kind == "bit" and first < len(content):
                flipped = bytes([content[first] ^ (1 << draw(st.integers(0, 7)))])
                content = content[:first] + flipped + content[first + 1 :]
            elif kind == "double":
                content = content[:second] + content[first:]
            elif kind == "token":
                content = content[:first] + draw(st.sampled_from(TOKENS)) + content[second:]
            elif kind == "noise":
                content = content[:first] + draw(st.binary(max_size=16)) + content[second:]
            elif kind == "cut":
                content = content[:first]
            else:
                content = content[:first] + content[second:]
        return content

    return mutated()


def mutated_json(valid: Any) -> st.SearchStrategy[Any]:
    """`valid`, parsed JSON, with up to three values replaced, left out, moved or added."""

    @st.composite
    def mutated(draw: st.DrawFn) -> Any:
        root = {"": copy.deepcopy(valid)}
        for _ in range(draw(st.integers(1, 3))):
            places = list(_places(root))
            *way, last = draw(st.sampled_from(places))
            holder: Any = root
            for key in way:
                holder = holder[key]
            kind = draw(st.sampled_from(["replace", "other", "wrap", "drop", "add"]))
            if kind == "wrap":
                holder[last] = draw(st.sampled_from([[holder[last]], {"a": holder[last]}]))
            elif kind == "drop" and way:
                del holder[last]
            elif kind == "add" and isinstance(holder, dict) and way:
                holder[draw(st.text(max_size=8))] = copy.deepcopy(draw(st.sampled_from(VALUES)))
            elif kind == "other":
                holder[last] = copy.deepcopy(_value(root, draw(st.sampled_from(places))))
            else:
                holder[last] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        return root[""]

    return mutated()


def fuzz(
    strategy: st.SearchStrategy[Input], *allowed: type[Exception], examples: int = EXAMPLES
) -> Callable[[Callable[[Input], object]], Callable[[], None]]:
    """Decorates a reader: see above."""

    def of(reader: Callable[[Input], object]) -> Callable[[], None]:
        @tries(examples, suppress_health_check=list(HealthCheck))
        @given(strategy)
        def test(case: Input) -> None:
            began = time.monotonic()
            try:
                reader(case)
            except allowed as error:
                text = str(error)
                assert "\n" not in text, text
                assert len(text) <= LONGEST_MESSAGE, text[:100]
            assert time.monotonic() - began < LONGEST

        test.__name__, test.__doc__ = reader.__name__, reader.__doc__
        return test

    return of


def _places(value: Any, way: Way = ()) -> Iterator[Way]:
    """The ways to every value in `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items)[:50]:
        yield (*way, key)
        yield from _places(item, (*way, key))


def _value(root: Any, way: Way) -> Any:
    for key in way:
        root = root[key]
    return root
