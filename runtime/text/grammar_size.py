"""Estimates how much text a constraint may force at once, before it is compiled.

llguidance walks forced text character by character while it holds the GIL. A few characters of a
regular expression can require gigabytes: `((a{999}){999}){999}`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

_CAP = 1 << 60  # maximum of products
_REPEAT = r"\{\s*(?P<low>\d*)\s*(?P<to>,\s*(?P<high>\d*)\s*)?\}"
_REGEX = re.compile(
    rf"""(?P<run>[^\\()|*+?{{\[]+(?![*+?{{]))|(?P<letter>\\(?:[pPxuU]\{{[^}}]{{0,80}}\}}|[pP].|x..|u....|.)|[^\\()|*+?{{\[])
    |(?P<open>\((?:\?(?:P?<[^>]{{0,80}}>|[a-zA-Z-]*:?))?)|(?P<close>\))|(?P<or>\|)
    |(?P<repeat>(?:{_REPEAT}|[*+?])\??)|(?P<set>\[)|.""",
    re.DOTALL | re.VERBOSE,
)
_VERBOSE = re.compile(r"\(\?[a-zA-Z]*x")
_LARK = re.compile(
    rf"""(?P<skip>(?:\#|//)[^\n]*|[ \t]+|->\s*\w+|\.-?\d+)|(?P<line>(?:\r?\n)+[ \t]*)
    |(?P<text>"(?:\\.|[^"\\\n])*")i?|/(?P<regex>(?:\\.|[^/\\])+)/[imslux]*
    |(?P<json>%json|%regex|%llguidance)|(?P<name>!?[_?]?[a-z][_a-z0-9-]*|_?[A-Z][_A-Z0-9-]*)
    |(?P<repeat>{_REPEAT}|~\s*(?P<least>\d+)(?:\s*\.\.\s*(?P<most>\d+))?|[*+?])
    |(?P<open>[(\[])|(?P<close>[)\]])|(?P<or>\|)|(?P<and>&)|(?P<not>~)|(?P<colon>:)
    |(?P<open_end>["/])|(?P<other><[^<>\s]+>|.)""",
    re.DOTALL | re.VERBOSE,
)


class Size(NamedTuple):
    """Size of an expression in characters.

    Attributes:
        least: Length of its shortest text.
        most: Upper bound of the text forced at once at any place. It is at most the text that must
            still follow there.
    """

    least: int = 0
    most: int = 0

    def times(self, count: int) -> Size:
        """Return the size of `count` repetitions."""
        if not count:
            return Size(0, self.most)
        return Size(min(self.least * count, _CAP), min(self.most + self.least * (count - 1), _CAP))


def _joined(parts: Sequence[Size]) -> Size:
    """Return the size of a sequence of parts."""
    least = most = 0
    for part in reversed(parts):
        most = max(most, part.most + least)
        least += part.least
    return Size(least, most)


def _either(parts: Iterable[Size]) -> Size:
    """Return the size of a choice between parts."""
    listed = list(parts)
    return Size(
        min((part.least for part in listed), default=0),
        max((part.most for part in listed), default=0),
    )


def _both(parts: Sequence[Size]) -> Size:
    """Return the size of a text that matches all parts.

    If their periods have no common factor, it is as long as the product.
    """
    if len(parts) == 1:
        return parts[0]
    length = min(prod(1 + part.most for part in parts), _CAP)
    return Size(length, length)


class _Expression:
    """Computes the size of an expression read from left to right, without recursion."""

    def __init__(self) -> None:
        # For each open group: alternatives, parts that must match together, and the current
        # sequence.
        self._groups: list[tuple[list[Size], list[Size], list[Size]]] = [([], [], [])]

    def add(self, size: Size) -> None:
        """Add a part to the current sequence."""
        self._groups[-1][2].append(size)

    def repeat(self, count: int) -> None:
        """Repeat the last part."""
        if sequence := self._groups[-1][2]:
            sequence.append(sequence.pop().times(count))

    def also(self) -> None:
        """End a part that must match together with the next one."""
        _, together, sequence = self._groups[-1]
        together.append(_joined(sequence))
        sequence.clear()

    def otherwise(self) -> None:
        """End an alternative."""
        self.also()
        alternatives, together, _ = self._groups[-1]
        alternatives.append(_both(together))
        together.clear()

    def open(self) -> None:
        """Start a group."""
        self._groups.append(([], [], []))

    def close(self) -> None:
        """End a group. If none is open, llguidance reports the error."""
        if len(self._groups) > 1:
            self.otherwise()
            alternatives, _, _ = self._groups.pop()
            self.add(_either(alternatives))

    def size(self) -> Size:
        """End all groups and return the size."""
        while len(self._groups) > 1:
            self.close()
        self.otherwise()
        return _either(self._groups[0][0])


def _count(low: str | None, to: str | None, high: str | None, highest: bool) -> int:
    """Return the minimum number of repetitions, or with `highest` the maximum.

    Values are capped.
    """
    text = (high or low if highest and to else low) or "0"
    return min(int(text[:20]), _CAP)


def regex_size(regex: str, highest: bool = False) -> Size:
    """Return the size of a regular expression.

    With `highest`, the upper bounds of repetitions count, as they must if it is negated.
    """
    expression = _Expression()
    place = 0
    crude = _VERBOSE.search(regex) is not None
    repeated = 1
    while place < len(regex):
        match = _REGEX.match(regex, place)
        assert match is not None
        place = match.end()
        kind = match.lastgroup
        if match["run"]:
            expression.add(Size(len(match["run"]), len(match["run"])))
        elif match["letter"]:
            expression.add(Size(1, 1))
        elif match["set"]:
            place = _set_end(regex, place)
            expression.add(Size(1, 1))
        elif match["open"]:
            expression.open()
        elif kind == "close":
            expression.close()
        elif kind == "or":
            expression.otherwise()
        elif match["repeat"]:
            bounded = match["low"] is not None
            count = (
                _count(match["low"], match["to"], match["high"], highest)
                if bounded
                else match[0][0] == "+"
            )
            expression.repeat(int(count))
            repeated = min(repeated * max(1, int(count)), _CAP)
    # Comments in verbose expressions can hide the start of groups.
    return (
        Size(len(regex) * repeated, len(regex) * repeated)
        if crude and repeated > 1
        else expression.size()
    )


def _set_end(regex: str, place: int) -> int:
    """Return the end of a character set that starts before `place`. Sets can be nested."""
    depth = 1
    first = True
    while place < len(regex) and depth:
        letter = regex[place]
        place += 2 if letter == "\\" else 1
        if letter == "^" and first:
            continue
        depth += (letter == "[") - (letter == "]" and not first)
        first = letter == "["
    return place


def schema_size(root: Any) -> Size:
    """Return the size of a JSON schema, or of the largest part that it defines."""
    known: dict[str, Size] = {}

    def size(schema: Any) -> Size:
        if not isinstance(schema, dict):
            return Size(1, 1)
        parts = [Size(1, 1)]
        if "const" in schema:
            parts.append(_text(schema["const"]))
        for name, value in schema.items():
            if isinstance(value, list):
                if name == "enum":
                    parts.append(_either(map(_text, value)))
                elif name in ("anyOf", "oneOf"):
                    parts.append(_either(map(size, value)))
                elif name == "prefixItems":
                    parts += map(size, value)
                elif name == "allOf":
                    patterns = [
                        regex_size(found) for found in map(_pattern, value) if found is not None
                    ]
                    parts += [*map(size, value), *([_both(patterns)] if len(patterns) > 1 else [])]
            elif isinstance(value, dict):
                if name == "properties":
                    needed = schema.get("required")
                    required = set(map(str, needed)) if isinstance(needed, list) else set()
                    for key, part in value.items():
                        whole = _joined([_text(key), size(part)])
                        parts.append(whole if key in required else whole.times(0))
                elif name == "patternProperties":
                    parts += [
                        _joined([regex_size(key), size(part)]).times(0)
                        for key, part in value.items()
                    ]
                elif name in (
                    "items",
                    "additionalProperties",
                    "additionalItems",
                    "unevaluatedProperties",
                ):
                    parts.append(
                        size(value).times(
                            _whole(schema.get("minProperties" if "P" in name else "minItems"))
                        )
                    )
        if (pattern := _pattern(schema)) is not None:
            parts.append(regex_size(pattern))
        if needed := _whole(schema.get("minLength")):
            parts.append(Size(needed, needed))
        if isinstance(reference := schema.get("$ref"), str):
            if reference not in known:
                known[reference] = Size()  # a recursive use is optional, or has no finite text
                known[reference] = size(resolve_reference(root, reference))
            parts.append(known[reference])
        return _joined(parts)

    # References that `resolve_reference` does not support, such as anchors, are at most as large as
    # the largest definition.
    defined = [
        part for name in ("$defs", "definitions") if isinstance(part := root.get(name), dict)
    ]
    return _either([size(root), *(size(part) for parts in defined for part in parts.values())])


def _pattern(schema: Any) -> str | None:
    """Return the pattern of a schema, None if it has none."""
    pattern = schema.get("pattern") if isinstance(schema, dict) else None
    return pattern if isinstance(pattern, str) else None


def _text(value: Any) -> Size:
    """Return the size of a value's JSON."""
    length = len(json.dumps(value, ensure_ascii=False))
    return Size(length, length)


def _whole(value: Any) -> int:
    """Return a value as a count, 0 if it is none."""
    return max(0, int(value)) if isinstance(value, int | float) and abs(value) < _CAP else 0


def resolve_reference(root: Any, reference: str) -> Any:
    """Return the part of a schema that a reference points to, None if it is outside the schema."""
    if not reference.startswith("#"):
        return None
    for name in reference.split("/")[1:]:
        if isinstance(root, list) and name.isdecimal() and int(name[:9]) < len(root):
            root = root[int(name[:9])]
        else:
            root = (
                root.get(name.replace("~1", "/").replace("~0", "~"))
                if isinstance(root, dict)
                else None
            )
    return root


def grammar_size(text: str) -> Size:
    """Return the size of a Lark grammar: that of its largest rule or terminal."""
    definitions, order = _definitions(text)
    highest = any(kind == "not" for body in definitions.values() for kind, _ in body)
    known: dict[str, Size] = {}

    def size(name: str) -> Size:
        if name not in known:
            known[name] = Size()  # a recursive use is optional, or has no finite text
            known[name] = measured(definitions[name]) if name in definitions else Size(1, 1)
        return known[name]

    def measured(body: list[tuple[str, Any]]) -> Size:
        expression = _Expression()
        actions: dict[str, Callable[[], None]] = {
            "open": expression.open,
            "close": expression.close,
            "or": expression.otherwise,
            "and": expression.also,
        }
        for kind, value in body:
            if kind in actions:
                actions[kind]()
                if kind == "close" and value == "]":
                    expression.repeat(0)
            elif kind == "repeat":
                expression.repeat(value[highest])
            elif kind == "name":
                expression.add(size(value))
            elif kind == "regex":
                expression.add(regex_size(value, highest))
            elif kind == "%json":
                expression.add(schema_size(value) if isinstance(value, dict) else Size(1, 1))
            elif kind in ("text", "%regex"):
                expression.add(Size(len(value), len(value)))
        return expression.size()

    return _either(map(size, order))


def _definitions(text: str) -> tuple[dict[str, list[tuple[str, Any]]], list[str]]:
    """Return the parts of each definition of a Lark grammar, and the names in reverse order.

    Later definitions are measured first, to limit the depth of recursion.
    """
    definitions: dict[str, list[tuple[str, Any]]] = {"": []}
    body = definitions[""]
    line = list[tuple[str, Any]]()
    place = 0
    while place < len(text):
        match = _LARK.match(text, place)
        assert match is not None
        place = match.end()
        kind = match.lastgroup
        part = match[0]
        if kind == "open_end":  # llguidance rejects an unterminated text
            break
        if match["line"]:
            body += line
            line = []
        elif kind == "colon" and line and line[0][0] == "name":
            # The rest of the head are attributes, such as a suffix.
            body = definitions.setdefault(line[0][1], [])
            line = line[1:]
        elif match["repeat"]:
            bounded = match["low"] is not None or match["least"] is not None
            low = match["low"] or match["least"]
            high = match["high"] or match["most"]
            counts = [
                _count(low, match["to"] or match["most"], high, highest)
                for highest in (False, True)
            ]
            line.append(("repeat", counts if bounded else [int(part == "+")] * 2))
        elif match["json"]:
            try:
                start = re.compile(r"\s*").match(text, place).end()  # type: ignore[union-attr]
                value, place = json.JSONDecoder().raw_decode(text, start)
                line.append((part, json.dumps(value) if part == "%regex" else value))
            except ValueError:  # llguidance reports the error
                continue
        elif match["regex"]:
            line.append(("regex", match["regex"]))
        elif kind in ("text", "name", "open", "close", "or", "and", "not"):
            line.append((kind, part.lstrip("!?") if kind == "name" else part))
    body += line
    return definitions, list(reversed(definitions))
