"""Finds the files that an ONNX graph names as its external data, without the package `onnx`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from runtime.errors import BundleError
from runtime.json_file import UnreadableError, read_bytes

# Bytes of a graph, whose weights stand elsewhere; fields that are looked at, and messages within each other, of which
# Protocol Buffers take no more.
LARGEST_GRAPH = 256 << 20
MOST_FIELDS = 1_000_000
DEEPEST = 100

# Of onnx.proto: a message's fields by number that lead to tensors, and the kind of message each holds.
_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2
_LOCATION = b"location"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Span = tuple[int, int]


def external_data(graph: Path) -> set[str]:
    """The names of the files in which a graph's tensors stand. BundleError where it is no ONNX graph."""
    try:
        content = read_bytes(graph, LARGEST_GRAPH)
        return set(_locations(content))
    except UnreadableError as reason:
        raise BundleError(f"{graph.name} cannot be read ({reason}); convert the checkpoint again") from None


def _locations(content: bytes) -> Iterator[str]:
    stack: list[tuple[str, Span, int]] = [("model", (0, len(content)), 0)]
    left = MOST_FIELDS
    while stack:
        kind, span, depth = stack.pop()
        if kind == "entry":
            yield from _location(content, span)
            continue
        fields = list(islice(_fields(content, span), left))
        left -= len(fields)
        if left <= 0 or depth > DEEPEST:
            raise UnreadableError("its graph is too large")
        inner = _MESSAGES[kind]
        # Most nodes and attributes hold no tensor: what does not hold the word is not looked into.
        stack += [
            (inner[number], part, depth + 1)
            for number, part in fields
            if number in inner and content.find(_LOCATION, *part) >= 0
        ]


def _location(content: bytes, span: Span) -> Iterator[str]:
    """The value of an entry of external data, where a key of it is "location"."""
    fields = list(_fields(content, span))
    if any(number == _KEY and content[slice(*part)] == _LOCATION for number, part in fields):
        for number, part in fields:
            if number == _VALUE:
                yield content[slice(*part)].decode("utf-8", "backslashreplace")


def _fields(content: bytes, span: Span) -> Iterator[tuple[int, Span]]:
    """Number and place of each field of a message; numbers have no length."""
    at, end = span
    while at < end:
        tag, at = _varint(content, at, end)
        wire = tag & 7
        if wire == _BYTES:
            size, at = _varint(content, at, end)
            if size > end - at:
                raise UnreadableError("it is no ONNX graph, or cut off")
            yield tag >> 3, (at, at + size)
            at += size
        elif wire == _VARINT:
            _, at = _varint(content, at, end)
            yield tag >> 3, (at, at)
        elif wire in (_FIXED32, _FIXED64):
            at += 4 if wire == _FIXED32 else 8
            yield tag >> 3, (at, at)
        else:
            raise UnreadableError("it is no ONNX graph")


def _varint(content: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise UnreadableError("it is no ONNX graph, or cut off")
