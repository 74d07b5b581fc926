"""Requests and results of `generate` as JSON lines: broken lines are reported, interrupted runs go on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from runtime.errors import FreeExportError, OptionError
from runtime.result import GenerationResult

# Bytes of a line: a million tokens with room to spare.
MAX_LINE = 16 << 20
# A longer line is passed over, up to this many bytes: a device may never end its line.
MAX_SKIPPED = 1 << 30
# What others call an input.
_OTHER_NAMES = ("text", "prompt", "messages", "instruction", "source")


@dataclass(frozen=True)
class Request:
    """A line of the input file: `input` is text or messages; `line_number` counts from 1, blank lines included."""

    line_number: int
    input: str | list[dict[str, str]]
    target: str | None = None
    id: str | int | None = None


@dataclass(frozen=True)
class BrokenLine:
    """A line that is not a request, and why; `id` where it could be read."""

    line_number: int
    reason: str
    id: str | int | None = None


def read_requests(path: Path) -> Iterator[Request | BrokenLine]:
    """The lines of a JSONL file in order, one at a time; blank ones are left out, broken ones do not end the reading.
    A line of more than MAX_LINE bytes is a broken one. It may be a pipe.

    Raises OptionError, at the call, when the file cannot be opened, and later where reading it fails or a line does not
    end within MAX_SKIPPED bytes.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise OptionError(f"{path} cannot be read ({error.strerror}); name a JSONL file") from None

    def lines() -> Iterator[Request | BrokenLine]:
        with file:
            for number in count(1):
                line = _read_line(file, path, number)
                if line is None:
                    yield BrokenLine(number, f"longer than {MAX_LINE >> 20} MiB")
                elif not line:
                    return
                elif line.strip():
                    yield _parse(number, line.rstrip(b"\r\n").removeprefix(b"\xef\xbb\xbf" if number == 1 else b""))

    return lines()


def _read_line(file: BinaryIO, path: Path, number: int) -> bytes | None:
    """With its end, empty at the end of the file, None where it is too long: the next call reads the line after it."""
    try:
        line = file.readline(MAX_LINE + 1)
        if len(line) <= MAX_LINE:
            return line
        skipped = 0
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE)
            skipped += len(line)
            if skipped > MAX_SKIPPED:
                raise OptionError(f"{path}, line {number} has no end in {MAX_SKIPPED >> 20} MiB; name a JSONL file")
    except OSError as error:
        raise OptionError(f"{path} cannot be read ({error.strerror}); name a JSONL file") from None
    return None


def fields_of(result: GenerationResult, *others: GenerationResult) -> dict[str, Any]:
    """A result as JSON can hold it, with the texts of the `others` of its prompt."""
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "exited": list(result.exited),
        "finish_reason": result.finish_reason,
        **({} if result.logprobs is None else {"logprobs": list(result.logprobs)}),
        **({"others": [other.text for other in others]} if others else {}),
    }


def _parse(number: int, line: bytes) -> Request | BrokenLine:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BrokenLine(number, f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start}")
    except json.JSONDecodeError as error:
        return BrokenLine(number, f"not JSON: {error.msg} at position {error.pos}")
    except (ValueError, RecursionError) as error:
        return BrokenLine(number, f"not JSON that can be read: {str(error)[:100]}")
    if not isinstance(record, dict):
        return BrokenLine(number, f"{type(record).__name__} instead of an object with 'input'")
    identity, target = record.get("id"), record.get("target")
    if not isinstance(identity, (str, int, type(None))) or isinstance(identity, bool):
        return BrokenLine(number, f"'id' is {type(identity).__name__}, not a string or an integer")
    problem = _input_problem(record)
    if problem is None and not isinstance(target, (str, type(None))):
        problem = f"'target' is {type(target).__name__}, not a string"
    if problem is not None:
        return BrokenLine(number, problem, identity)
    return Request(number, record["input"], target, identity)


def _input_problem(record: dict[str, Any]) -> str | None:
    if "input" not in record:
        other = next((name for name in _OTHER_NAMES if name in record), None)
        return "'input' is missing" if other is None else f"'input' is missing, it has {other!r}; rename it to 'input'"
    value = record["input"]
    if not isinstance(value, (str, list)):
        return f"'input' is {type(value).__name__}, not a string or a list of messages"
    if not value:
        return "'input' is empty"
    if isinstance(value, str):
        return None
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            return f"message {index} of 'input' is {type(message).__name__}, not an object with 'role' and 'content'"
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                return f"message {index} of 'input' has no string {name!r}"
    return None


class ResultWriter:
    """Appends one line for each request to the output file, whole and at once.

    A line begins with the request's `id`, or with `line`, its number, where it has none; then `text`, `token_ids`,
    `exited` and `finish_reason`, or `error`. However a run ends, the file holds whole lines and at most one partial
    last line, which `resume` removes. A run that fails before its first result leaves no new file.

    An output with content is refused unless `resume` (go on after it) or `overwrite` (it is emptied at the first
    write, not before). Raises OptionError for that, for both options at once, and where `resume` meets a file that
    `generate` did not write, which is left as it is.

    `done` counts the results found by `resume`, `failures` the error lines, found and written.
    """

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        if resume and overwrite:
            raise OptionError("resume and overwrite contradict each other; choose one")
        self.failures = 0
        self._path = path
        self._new = not path.exists()
        self._found: Counter[tuple[str, str | int]] = Counter()
        self._file = self._open()
        try:
            self._end = self._file.seek(0, 2) if self._file.seekable() else 0
            if self._end and resume:
                self._take_up()
            elif self._end and not overwrite:
                raise OptionError(f"{path} exists; go on with --resume, replace it with --overwrite, or name another")
        except BaseException:
            self._file.close()
            raise
        self.done = sum(self._found.values())
        self._stale = overwrite and self._end > 0

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if kind is not None and self._new and self._end == 0:
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        self._file.close()

    def skip(self, request: Request | BrokenLine) -> bool:
        """Whether the output already has this request's result. Ask once for each request, in the input's order:
        of several with one id, as many are skipped as there are results."""
        key = _key(request)
        if self._found[key] == 0:
            return False
        self._found[key] -= 1
        return True

    def write(
        self,
        request: Request,
        *,
        text: str,
        token_ids: Sequence[int],
        exited: Sequence[bool],
        finish_reason: str,
        logprobs: Sequence[float] | None = None,
        others: Sequence[str] = (),
    ) -> None:
        """Append a result, with `logprobs` and the texts of `others` where there are any.

        Raises FreeExportError where the line cannot be written, as on a full disk.
        """
        result = {
            "text": text,
            "token_ids": [int(token) for token in token_ids],
            "exited": [bool(flag) for flag in exited],
            "finish_reason": finish_reason,
            **({} if logprobs is None else {"logprobs": [float(value) for value in logprobs]}),
            **({"others": list(others)} if others else {}),
        }
        self._append(request, result)

    def write_error(self, request: Request | BrokenLine, reason: str) -> None:
        """Append why there is no result. Raises as `write` does."""
        self._append(request, {"error": reason})
        self.failures += 1

    def _open(self) -> FileIO:
        try:
            return FileIO(self._path, "a+")
        except OSError as error:
            raise OptionError(f"{self._path} cannot be written ({error.strerror}); name another output") from None

    def _append(self, request: Request | BrokenLine, result: dict[str, Any]) -> None:
        name, value = _key(request)
        line = _encoded({name: value, **result})
        try:
            if self._stale:
                self._file.truncate(0)
                self._stale, self._end = False, 0
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            self._drop_partial()
            raise FreeExportError(
                f"{self._path} cannot be written ({error.strerror}); make room, then go on with --resume"
            ) from None
        self._end += len(line)

    def _drop_partial(self) -> None:
        try:
            self._file.truncate(self._end)
        except OSError:
            return  # a pipe, or a device that is gone: resuming drops the partial line

    def _take_up(self) -> None:
        self._file.seek(0)
        end = 0
        with open(self._file.fileno(), "rb", closefd=False) as lines:
            for number, line in enumerate(lines, start=1):
                if line.endswith(b"\n"):
                    self._count(number, line)
                    end += len(line)
                elif not _partial(line):
                    raise self._foreign(number)
        if end < self._end:
            self._file.truncate(end)
            self._end = end

    def _count(self, number: int, line: bytes) -> None:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise self._foreign(number) from None
        key = _result_key(record)
        if key is None:
            raise self._foreign(number)
        self._found[key] += 1
        self.failures += "error" in record

    def _foreign(self, number: int) -> OptionError:
        return OptionError(f"{self._path} line {number} is not a result of generate; name another output")


def _key(request: Request | BrokenLine) -> tuple[str, str | int]:
    return ("line", request.line_number) if request.id is None else ("id", request.id)


def _result_key(record: Any) -> tuple[str, str | int] | None:
    if not isinstance(record, dict) or not record or not ("error" in record or "token_ids" in record):
        return None
    name, value = next(iter(record.items()))
    return (name, value) if name in ("id", "line") and isinstance(value, (str, int)) else None


def _partial(line: bytes) -> bool:
    """Whether an unfinished line can be the beginning of a result (what parses was not cut short)."""
    if not any(line[: len(start)] == start[: len(line)] for start in (b'{"id": ', b'{"line": ')):
        return False
    try:
        return _result_key(json.loads(line)) is not None
    except ValueError:
        return True


def _encoded(record: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can only hold escaped
        return (json.dumps(record) + "\n").encode("utf-8")
