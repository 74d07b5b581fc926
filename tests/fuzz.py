"""Fuzz tests of readers, with valid inputs whose bytes or structure are changed.

`fuzz(strategy, *allowed)` turns a reader, a function of one input, into a test. The reader must return or raise one of
`allowed` with a message of one line. The test tries a few hundred inputs, which takes a second or two. Hypothesis
shrinks and prints inputs that fail.
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
# Time limit for one input in seconds, far more than any input needs on a busy machine.
LONGEST = 20
LONGEST_MESSAGE = 2000

Input = TypeVar("Input")
Way = tuple[Any, ...]

# Values that often break readers.
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
    """Return a strategy that applies up to four changes to `valid`.

    A change flips a bit, writes a number, drops, doubles or replaces a piece, or cuts off the end.
    """

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
    """Return a strategy that replaces, wraps, drops or adds up to three values of `valid`, parsed JSON."""

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
    """Return a decorator that turns a reader into a test. See the module's docstring."""

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

        test.__name__ = reader.__name__
        test.__doc__ = reader.__doc__
        return test

    return of


def _places(value: Any, way: Way = ()) -> Iterator[Way]:
    """Yield the paths to all values inside `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items)[:50]:
        yield (*way, key)
        yield from _places(item, (*way, key))


def _value(root: Any, way: Way) -> Any:
    for key in way:
        root = root[key]
    return root
