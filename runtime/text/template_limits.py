"""What a chat template may spend: time is counted in steps, memory in characters, so the same messages always do.

A bundle's template is a program from anywhere. The sandbox keeps it from files and modules; this keeps it from loops,
and from texts and lists that grow without end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence, Set, ValuesView
from typing import Any

from jinja2.exceptions import TemplateRuntimeError
from jinja2.utils import Namespace

# A step is about a node of the template's syntax tree, 0.1 to 0.5 microseconds. Published templates take some hundred
# for a message.
STEPS, STEPS_PER_MESSAGE = 500_000, 5_000
SIZE, SIZE_PER_CHARACTER = 1 << 20, 8
ITEM = 8  # characters that an item of a list counts as
CHARACTERS_PER_STEP = 50
DEPTH = 64
# Larger numbers can be chosen to have one hash, and a set of them takes the square of its size.
BITS = 60
PRECISION = 300

# Methods and filters whose result is no longer than a few times what they are given.
_NEVER_LONGER = (
    "abs attr capitalize casefold count d default dictsort e encode endswith escape find first float forceescape get "
    "groupby index int isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace "
    "istitle isupper items keys last length list lower lstrip map max min partition reject rejectattr removeprefix "
    "removesuffix reverse rfind rindex rpartition rsplit rstrip safe select selectattr sort split splitlines "
    "startswith string strip sum swapcase title trim truncate unique upper urlencode values wordcount"
)
# Those of them that do not look at what a list holds: templates ask for the length of all messages at each message.
_AT_ONCE = "attr count d default first get items keys last length list values"
STRIPS = ("strip", "lstrip", "rstrip", "trim")  # each character is looked for among those given
BY_ATTRIBUTE = ("groupby", "join", "map", "max", "min", "rejectattr", "selectattr", "sort", "sum", "unique")
NEVER_LONGER, AT_ONCE = (frozenset(names.split()) for names in (_NEVER_LONGER, _AT_ONCE))
# A width or precision of a format with %: what stands behind it begins with one of these.
_WIDTH = re.compile(r"(?<!\d)\d++(?=[.hlLdiouxXeEfFgGcrsab%])")


class TemplateLimitError(TemplateRuntimeError):
    """A template spends more than it may."""


class Budget:
    """Of one rendering of `messages`."""

    def __init__(self, messages: Sequence[Mapping[str, Any]] = ()) -> None:
        self.steps = self.most_steps = self.size = 1 << 62  # for the messages themselves
        given = self.measure(list(messages))
        self.steps = self.most_steps = STEPS + STEPS_PER_MESSAGE * len(messages) + given
        self.size = SIZE + SIZE_PER_CHARACTER * given

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise TemplateLimitError(f"takes more than {self.most_steps} steps")

    def allow(self, size: int) -> None:
        if size > self.size:
            raise TemplateLimitError(f"makes a text or list of {size} characters, at most {self.size} are allowed")

    def measure(self, value: Any, depth: int = 0) -> int:
        """Characters of a text, or of all that a container holds; costs what looking at them costs."""
        if isinstance(value, (str, bytes)):
            self.spend(1 + len(value) // CHARACTERS_PER_STEP)
            return len(value)
        if isinstance(value, range):
            self.spend(1)
            _allow_bits(max(value.start, value.stop, key=abs).bit_length())
            return ITEM * len(value)
        if isinstance(value, int):
            _allow_bits(value.bit_length())
        items = _items(value)
        if items is None:
            return ITEM
        if depth > DEPTH:
            raise TemplateLimitError(f"nests lists more than {DEPTH} deep")
        size = ITEM
        for item in items:
            self.spend(2)
            size += ITEM + self.measure(item, depth + 1)
            self.allow(size)
        return size

    def touch(self, value: Any) -> None:
        """Pay for a copy of a text or list, whatever the list holds."""
        self.spend(1 + (len(value) // CHARACTERS_PER_STEP if isinstance(value, (str, bytes, list, tuple)) else 0))

    def made(self, value: Any) -> Any:
        """The value, if what an expression gave is small enough."""
        self.allow(self.measure(value))
        return value

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        total = 0
        for value in values:
            self.spend(2)
            total += ITEM + self.measure(value)
            self.allow(total)
            yield value

    def joined(self, texts: Iterable[str]) -> str:
        return "".join(self.counted(texts))

    def before(self, name: str, value: Any, args: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Refuse a method or filter `name` of `value` whose result would be too large."""
        self.spend(5)
        given = [*args, *named.values()]
        for argument in given:
            if isinstance(argument, str):
                self.spend(len(argument) // CHARACTERS_PER_STEP)
                if name in BY_ATTRIBUTE:  # a path of names, followed for each item
                    self.spend((argument.count(".") + argument.count(",")) * _extent(value))
        if name == "round":
            if any(_extent(argument) > PRECISION for argument in given):
                raise TemplateLimitError(f"rounds to more than {PRECISION} digits")
        elif name == "sum":
            if isinstance(named.get("start", args[1] if len(args) > 1 else 0), (list, tuple)):
                raise TemplateLimitError("adds up lists with sum")
        elif name in STRIPS:
            self.spend(self.measure(value) * sum(map(_extent, given)) // CHARACTERS_PER_STEP)
        elif name == "title":  # the filter takes words apart one by one
            self.spend(self.measure(value) // 2)
        elif name in AT_ONCE:
            self.touch(value)
        elif name in NEVER_LONGER:
            self.measure(value)
        else:
            self.allow(self._predicted(name, value, given))

    def binary(self, operator: str, left: Any, right: Any) -> None:
        """Refuse an operation whose result would be too large."""
        self.spend(1)
        if operator == "*":
            for values, count in ((left, right), (right, left)):
                if isinstance(values, (str, bytes, list, tuple)) and isinstance(count, int):
                    self.allow(max(count, 0) * self.measure(values))
        if isinstance(left, int) and isinstance(right, int):
            if operator == "*":
                _allow_bits(left.bit_length() + right.bit_length())
            elif operator == "**":
                _allow_bits(left.bit_length() * max(right, 1))
        elif operator == "%" and isinstance(left, (str, bytes)):
            self.allow(self._product(left, list(right) if isinstance(right, tuple) else [right]) * _width(left))

    def _predicted(self, name: str, value: Any, given: Sequence[Any]) -> int:
        if name == "replace" and isinstance(value, str) and all(isinstance(text, str) for text in given[:2]):
            old, new = (*given, "", "")[:2]
            return self.measure(value) + value.count(old) * len(new)
        if name == "join":
            texts, separator = (value, given[0] if given else "") if not isinstance(value, str) else (given[0], value)
            count = len(texts) if hasattr(texts, "__len__") else 1
            return self.measure(texts) + count * _extent(separator)
        if name in ("center", "ljust", "rjust", "zfill"):
            return self.measure(value) + max(map(_extent, given), default=0)
        if name == "indent" and isinstance(value, str):
            return self.measure(value) + (value.count("\n") + 1) * max(map(_extent, given), default=4)
        if name == "format" and isinstance(value, str):
            return self._product(value, given) * _width(value)
        return self._product(value, given)

    def _product(self, value: Any, given: Iterable[Any]) -> int:
        factors = [_extent(argument) if isinstance(argument, int) else self.measure(argument) for argument in given]
        return (1 + self.measure(value)) * max(1, *factors) if factors else self.measure(value)


def _items(value: Any) -> Iterable[Any] | None:
    if isinstance(value, Namespace):
        value = object.__getattribute__(value, "_Namespace__attrs")  # it has no other way to all of them
    if isinstance(value, Mapping):
        return (part for item in value.items() for part in item)
    if isinstance(value, (list, tuple, Set, ValuesView, KeysView)):
        return value
    return None


def _extent(argument: Any) -> int:
    if isinstance(argument, int):
        return abs(argument)
    return len(argument) if hasattr(argument, "__len__") else 1


def _width(text: str | bytes) -> int:
    """The largest width or precision of a format with %."""
    found = _WIDTH.findall(text if isinstance(text, str) else text.decode("latin-1"))
    return max((int(digits[:18]) for digits in found), default=0) or 1


def _allow_bits(bits: int) -> None:
    if bits > BITS:
        raise TemplateLimitError(f"makes a number of {bits} bits, at most {BITS} are allowed")
