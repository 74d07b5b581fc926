"""Traces collected so far, in a file of JSON lines: a run that was stopped, or killed, goes on where it was."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from freeexport.traces.trace import Trace
from runtime.errors import FreeExportError, OptionError
from runtime.json_file import parse_json

_KIND = "freeexport traces"
# Of what a line holds: traces of another format are dropped as those of another key are.
_FORMAT = 3
_START = json.dumps({"kind": _KIND})[:-1].encode()


@dataclass(frozen=True)
class TraceKey:
    """What traces depend on. `model` and `data` are hashes."""

    model: str
    data: str
    exit_layer: int
    confidence: str
    max_new_tokens: int


class TraceCache:
    """Each `add` appends a whole line. Traces under another key are dropped at the first `add`, not before.

    Raises OptionError where `path` is a file of another kind, which is left as it is.
    """

    def __init__(self, path: Path, key: TraceKey) -> None:
        self._path, self._header = path, {"kind": _KIND, "format": _FORMAT, **asdict(key)}
        self._traces: dict[int, Trace] = {}
        self._fits = self._read()

    def get(self, line: int) -> Trace | None:
        return self._traces.get(line)

    def add(self, trace: Trace) -> None:
        """Raises FreeExportError where the line cannot be written, as on a full disk."""
        lines = [_record(trace)] if self._fits else [self._header, _record(trace)]
        try:
            with self._path.open("ab" if self._fits else "wb") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        except OSError as error:
            raise FreeExportError(f"{self._path} cannot be written ({error.strerror}); make room, run again") from None
        self._fits = True
        self._traces[trace.line] = trace

    def _read(self) -> bool:
        """Whether the file is one to append to."""
        if not self._path.exists():
            return False
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            header, *records = [parse_json(line, nan=True) for line in whole.splitlines()]
            if header.get("kind") != _KIND:
                raise ValueError
            if header != self._header:
                return False
            self._traces = {record["line"]: _trace(record) for record in records}
        except (ValueError, KeyError, TypeError, AttributeError):
            if not whole and content[: len(_START)] == _START[: len(content)]:
                return False  # a run killed in its first line
            raise OptionError(
                f"{self._path} exists and holds no traces that can be read; move it, or name another --output"
            ) from None
        if len(whole) < len(content):  # a killed run's last line
            with self._path.open("r+b") as file:
                file.truncate(len(whole))
        return True


def _record(trace: Trace) -> dict[str, Any]:
    return {
        "line": trace.line,
        "confidence": _numbers(trace.confidence),
        "agrees": [int(agrees) for agrees in trace.agrees],
        "nll": _numbers(trace.nll),
        "token": trace.token.tolist(),
    }


def _numbers(values: np.ndarray) -> list[float]:
    # Nine digits are all of a float32.
    return [float(f"{value:.9g}") for value in values]


def _trace(record: dict[str, Any]) -> Trace:
    confidence, agrees, nll, token = (record[name] for name in ("confidence", "agrees", "nll", "token"))
    if not isinstance(record["line"], int) or not len(confidence) == len(agrees) == len(nll) == len(token):
        raise ValueError
    return Trace.of(record["line"], confidence, agrees, nll, token)
