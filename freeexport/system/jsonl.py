"""Read requests from JSON lines. A broken line is reported and the others are still read."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import click

from runtime.errors import FreeExportError, OptionError, PromptError

# Maximum length of a line in bytes. A million tokens fit.
MAX_LINE = 16 << 20
# A longer line is skipped, up to this many bytes: a device may never end its line.
MAX_SKIPPED = 1 << 30
# Name of standard input and output, and how long to wait for a process at the other end of a named
# pipe.
STANDARD = "-"
PIPE_SECONDS = 60.0
# Names of the input field in other formats.
_OTHER_NAMES = ("text", "prompt", "messages", "instruction", "source")


@dataclass(frozen=True)
class InputLine:
    """A line of an input file.

    Attributes:
        line_number: Number of the line, from 1. Blank lines count.
        input: Text, messages, or the path given as `audio`, relative to the file.
        target: Expected output.
        id: Identifier chosen by the user.
        references: Value of the field of this name, not checked.
        language: Code of the language spoken in the audio.
    """

    line_number: int
    input: str | list[dict[str, str]] | Path
    target: str | None = None
    id: str | int | None = None
    references: Any = None
    language: str | None = None

    @property
    def text(self) -> str | list[dict[str, str]]:
        """Return the input."""
        if isinstance(self.input, Path):
            raise PromptError("'audio' is given, but the model accepts only text; give 'input'")
        return self.input


@dataclass(frozen=True)
class BrokenLine:
    """A line that is not a request, with the reason, and its `id` if it could be read."""

    line_number: int
    reason: str
    id: str | int | None = None


def read_requests(path: Path) -> Iterator[InputLine | BrokenLine]:
    """Yield the lines of a JSONL file, a pipe, or standard input (`-`), in order.

    Blank lines are skipped.

    Raises:
        OptionError: At the call, if the file cannot be opened. Later, if reading fails or a line
            does not end within MAX_SKIPPED bytes.
    """
    try:
        if str(path) == STANDARD:
            file: Any = sys.stdin.buffer
        else:
            file = open_pipe(path, "rb") if path.is_fifo() else path.open("rb")
    except OSError as error:
        raise _unreadable(path, error) from None

    def lines() -> Iterator[InputLine | BrokenLine]:
        with file:
            for number in count(1):
                line = _read_line(file, path, number)
                if line is None:
                    yield BrokenLine(number, f"longer than {MAX_LINE >> 20} MiB")
                elif not line:
                    return
                elif line.strip():
                    text = line.rstrip(b"\r\n").removeprefix(
                        b"\xef\xbb\xbf" if number == 1 else b""
                    )
                    yield _parse(number, text, path.parent)

    return lines()


def open_pipe(path: Path, mode: str) -> Any:
    """Open a named pipe once another process has opened its other end. Writing is unbuffered."""
    opened: list[Any] = []
    reads = mode == "rb"
    # The system call has no timeout. If the thread never returns from it, it ends with the process.
    thread = threading.Thread(
        target=lambda: opened.append(path.open(mode, -1 if reads else 0)), daemon=True
    )
    thread.start()
    thread.join(min(1.0, PIPE_SECONDS))
    if thread.is_alive():
        click.echo(
            f"waiting for a process that {'writes to' if reads else 'reads'} {path}", err=True
        )
        thread.join(PIPE_SECONDS)
    if not opened:
        nobody = "nothing writes to" if reads else "nothing reads"
        raise OptionError(f"{nobody} the pipe {path}; start the other process, or give a file")
    return opened[0]


def whole_lines(path: Path) -> list[bytes]:
    """Return the lines of a file that grows by whole lines. A missing file has none.

    A partial last line, left by a run that was killed, is removed from the file.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.splitlines()


def _unreadable(path: Path, error: OSError) -> OptionError:
    return OptionError(f"{path} cannot be read ({error.strerror}); give a JSONL file")


def input_field(request: InputLine) -> dict[str, Any]:
    """Return the input as a JSON field for another file."""
    audio = isinstance(request.input, Path)
    return {"audio": str(request.input)} if audio else {"input": request.input}


def encoded(record: Mapping[str, Any]) -> bytes:
    """Encode a record as JSON in UTF-8. Lone surrogates are escaped."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")


def append_lines(
    path: Path, records: Iterable[Mapping[str, Any]], advice: str = "run the same command again"
) -> None:
    """Append records as lines, either all or none."""
    content = b"".join(encoded(record) + b"\n" for record in records)
    with FileIO(path, "ab") as file:
        end = file.seek(0, 2)
        try:
            while content:
                content = content[file.write(content) :]
        except OSError as error:
            file.truncate(end)
            raise FreeExportError(
                f"{path} cannot be written ({error.strerror}); free some space, and {advice}"
            ) from None


def _read_line(file: BinaryIO, path: Path, number: int) -> bytes | None:
    """Read a line with its line break. Returns b"" at the end of the file.

    A line that is too long is skipped, and the result is None.
    """
    try:
        line = file.readline(MAX_LINE + 1)
        if len(line) <= MAX_LINE:
            return line
        skipped = 0
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE)
            skipped += len(line)
            if skipped > MAX_SKIPPED:
                raise OptionError(
                    f"{path}, line {number} is longer than {MAX_SKIPPED >> 20} MiB; name a JSONL "
                    "file"
                )
    except OSError as error:
        raise _unreadable(path, error) from None
    return None


def _parse(number: int, line: bytes, folder: Path) -> InputLine | BrokenLine:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BrokenLine(
            number, f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start}"
        )
    except json.JSONDecodeError as error:
        return BrokenLine(number, f"not JSON: {error.msg} at position {error.pos}")
    except (ValueError, RecursionError) as error:
        return BrokenLine(number, f"invalid JSON: {str(error)[:100]}")
    if not isinstance(record, dict):
        return BrokenLine(number, f"{type(record).__name__} instead of an object with 'input'")
    identity = record.get("id")
    target = record.get("target")
    if not isinstance(identity, (str, int, type(None))) or isinstance(identity, bool):
        return BrokenLine(number, f"'id' is {type(identity).__name__}, not a string or an integer")
    problem = _input_problem(record)
    if problem is None and not isinstance(target, (str, type(None))):
        problem = f"'target' is {type(target).__name__}, not a string"
    if problem is not None:
        return BrokenLine(number, problem, identity)
    given = folder / record["audio"] if "audio" in record else record["input"]
    return InputLine(
        number,
        given,
        target,
        id=identity,
        references=record.get("references"),
        language=record.get("language"),
    )


def _input_problem(record: dict[str, Any]) -> str | None:
    if "audio" in record:
        audio = record["audio"]
        language = record.get("language")
        if "input" in record:
            return "both 'input' and 'audio' are given; remove one"
        if not isinstance(audio, str) or not audio or "\0" in audio:
            return f"'audio' is {audio!r:.40}, not the path of a WAV file"
        wrong = not isinstance(language, (str, type(None)))
        return (
            f"'language' is {type(language).__name__}, not a code such as \"en\"" if wrong else None
        )
    if "input" not in record:
        other = next((name for name in _OTHER_NAMES if name in record), None)
        return (
            "'input' is missing"
            if other is None
            else f"'input' is missing, it has {other!r}; rename it to 'input'"
        )
    value = record["input"]
    if not isinstance(value, (str, list)):
        return f"'input' is {type(value).__name__}, not a string or a list of messages"
    if not value:
        return "'input' is empty"
    for index, message in enumerate(value if isinstance(value, list) else ()):
        if not isinstance(message, dict):
            return (
                f"message {index} of 'input' is {type(message).__name__}, not an object with "
                "'role' and 'content'"
            )
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                return f"message {index} of 'input' has no string {name!r}"
    return None
