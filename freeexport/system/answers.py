"""Lines of a file as requests: several are in flight at once, answered in the order of the file. The file of results
holds whole lines however a run ends, so that an interrupted one can go on."""

from __future__ import annotations

import json
import stat
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

import click

from freeexport.system.jsonl import STANDARD, BrokenLine, Request, open_pipe, read_requests
from freeexport.system.output import replacing
from freeexport.system.progress import progress
from runtime import FreeExportError, GenerationResult, OptionError, PromptError

Line = Request | BrokenLine
Key = tuple[str, str | int]
Answer = list[GenerationResult] | Exception
# A prompt's results, best first; the event ends it.
Ask = Callable[[Any, threading.Event], list[GenerationResult]]
# Lines that may be answered ahead of one that takes long, for each in flight: a killed run loses what waits for it.
AHEAD = 8


class LateError(FreeExportError):
    """A request's deadline passed."""


def answer_file(ask: Ask, source: Path, target: Path, batch: int, resume: bool, overwrite: bool) -> None:
    """Answer the lines of `source` in `target`, each written as soon as those before it are: a line that fails is
    reported, there and on stderr, and the others go on. Raises FreeExportError at the end where any failed."""
    lines: Iterable[Line] = read_requests(source)
    total = None
    if source.is_file():
        lines = list(lines)
        total = len(lines)
    with ResultWriter(target) as writer:
        lines = writer.resume(list(lines)) if resume else writer.begin(overwrite, lines)
        with (
            progress("generating", total, writer.count) as advance,
            closing(answers(ask, lines, batch)) as answered,
        ):
            for line, answer in answered:
                _write(writer, line, answer)
                advance()
    if writer.failures:
        raise FreeExportError(f"{writer.failures} of {writer.count} lines of {source} failed; {target} says why")


def _write(writer: ResultWriter, line: Line, answer: Answer) -> None:
    if not isinstance(answer, Exception):
        writer.write(line, **fields_of(*answer))
        return
    known = isinstance(answer, FreeExportError)
    reason = str(answer) if known else f"{type(answer).__name__}: {' '.join(str(answer).split())}"
    click.echo(f"line {line.line_number}: {reason}", err=True)
    writer.write(line, error=reason)


def answers(ask: Ask, lines: Iterable[Line], batch: int) -> Generator[tuple[Line, Answer], None, None]:
    """Each line with its results, or with what went wrong with it alone, as soon as those before it are answered.

    At most `batch` are in flight. Closing it ends them after their next token. An OptionError is raised: no line could
    be answered with such options.
    """
    cancel = threading.Event()
    pool = ThreadPoolExecutor(batch, thread_name_prefix="answers")
    pending: deque[tuple[Line, Future[list[GenerationResult]]]] = deque()
    try:
        for line in lines:
            pending.append((line, pool.submit(_answer, ask, line, cancel)))
            while pending and (len(pending) >= AHEAD * batch or pending[0][1].done()):
                yield _oldest(pending)
        while pending:
            yield _oldest(pending)
    finally:
        cancel.set()
        pool.shutdown(cancel_futures=True)


def _oldest(pending: deque[tuple[Line, Future[list[GenerationResult]]]]) -> tuple[Line, Answer]:
    line, future = pending.popleft()
    error = future.exception()
    if error is None:
        return line, future.result()
    if isinstance(error, OptionError) or not isinstance(error, Exception):
        raise error
    return line, error


def _answer(ask: Ask, line: Line, cancel: threading.Event) -> list[GenerationResult]:
    if isinstance(line, BrokenLine):
        raise PromptError(line.reason)
    results = ask(line.input, cancel)
    if not results or not results[0].complete:
        tokens = len(results[0].token_ids) if results else 0
        raise LateError(f"the deadline passed after {tokens} tokens; allow more with --deadline")
    return results


def fields_of(result: GenerationResult, *others: GenerationResult) -> dict[str, Any]:
    """A result as JSON can hold it, with the texts of the `others` of its prompt."""
    drafts = result.stats.drafts
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "exited": list(result.exited),
        "finish_reason": result.finish_reason,
        "seconds": round(result.stats.seconds, 6),
        "exit_rate": round(result.stats.exit_rate, 6),
        **({"drafts": {source: asdict(counts) for source, counts in drafts.items()}} if drafts else {}),
        **({} if result.logprobs is None else {"logprobs": list(result.logprobs)}),
        **({} if result.top_logprobs is None else {"top_logprobs": list(result.top_logprobs)}),
        **({"others": [other.text for other in others]} if others else {}),
    }


class ResultWriter:
    """Appends one line for each request to the output, whole and at once: a file, `-` for standard output, or a pipe.

    A line begins with the request's `id`, or with `line`, its number, where it has none; then `input`, what `fields_of`
    gives, and the request's `target` where it has one; or `error`. However a run ends, a file holds whole lines and at
    most one partial last line, which `resume` removes. A run that fails before its first result leaves no new file.

    `count` is the number of lines that have a result, `failures` those with an error.
    """

    def __init__(self, path: Path) -> None:
        self.count = self.failures = 0
        self._path, self._end, self._stale = path, 0, False
        self._new = str(path) != STANDARD and not path.exists()
        self._file = self._open()
        self._regular = str(path) != STANDARD and path.is_file()

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if str(self._path) != STANDARD:
            self._file.close()
        if kind is not None and self._new and self._end == 0:
            self._path.unlink(missing_ok=True)

    def begin(self, overwrite: bool, lines: Iterable[Line]) -> Iterable[Line]:
        """All lines, for an output without content, or with `overwrite`: it is emptied at the first write, not before.
        Raises OptionError for another."""
        self._end = self._path.stat().st_size if self._regular else 0
        if self._end and not overwrite:
            raise OptionError(f"{self._path} exists; continue with --resume, replace with --overwrite, or name another")
        self._stale = self._end > 0
        return lines

    def resume(self, lines: list[Line]) -> list[Line]:
        """The lines that have no result yet. A result that stands there more often than its line in the input is
        removed. Raises OptionError where the output is no file of results, which is left as it is."""
        if not self._regular:
            raise OptionError(f"{self._path} is no file, so there is nothing to resume; leave out --resume")
        left = Counter(_key(line) for line in lines)
        known, kept, whole = set(left), list[bytes](), self._path.read_bytes()
        for number, record in enumerate(whole.splitlines(keepends=True), start=1):
            if not record.endswith(b"\n"):
                if not _partial(record):
                    raise self._foreign(number)
                continue
            found = _parsed(record)
            key = _result_key(found)
            if key is None:
                raise self._foreign(number)
            if key in known and not left[key]:
                continue
            left[key] -= 1
            kept.append(record)
            self.count += 1
            self.failures += "error" in found
        content = b"".join(kept)
        if content != whole:
            with replacing(self._path) as partial:
                partial.write_bytes(content)
            self._file.close()
            self._file = self._open()
        self._end = len(content)
        return [line for line in reversed(lines) if _take(left, _key(line))][::-1]

    def write(self, line: Line, **result: Any) -> None:
        """Append a result, its fields in this order. Raises FreeExportError where the line cannot be written, as on a
        full disk."""
        name, value = _key(line)
        asked = {"input": line.input} if isinstance(line, Request) else {}
        target = {"target": line.target} if isinstance(line, Request) and line.target is not None else {}
        self._append(_encoded({name: value, **asked, **result, **target}))
        self.count += 1
        self.failures += "error" in result

    def _append(self, line: bytes) -> None:
        try:
            if self._stale:
                self._file.truncate(0)
                self._stale, self._end = False, 0
            written = 0
            while written < len(line):
                written += self._file.write(line[written:]) or 0
            self._file.flush()
        except OSError as error:
            if str(self._path) == STANDARD:
                raise
            self._drop_partial()
            raise FreeExportError(
                f"{self._path} cannot be written ({error.strerror}); make room, then continue with --resume"
            ) from None
        self._end += len(line)

    def _drop_partial(self) -> None:
        try:
            self._file.truncate(self._end)
        except OSError:
            return  # a pipe, or a device that is gone: resuming drops the partial line

    def _open(self) -> RawIOBase | BinaryIO:
        if str(self._path) == STANDARD:
            return sys.stdout.buffer
        try:
            if not self._new and stat.S_ISFIFO(self._path.stat().st_mode):
                return open_pipe(self._path, "wb")
            # Unbuffered: a line is there as soon as it is written. Devices cannot append and seek.
            return open(self._path, "ab" if self._new or self._path.is_file() else "wb", buffering=0)
        except OSError as error:
            raise OptionError(f"{self._path} cannot be written ({error.strerror}); name another output") from None

    def _foreign(self, number: int) -> OptionError:
        return OptionError(f"{self._path} line {number} is not a result of generate; name another output")


def _take(left: Counter[Key], key: Key) -> bool:
    if left[key] <= 0:
        return False
    left[key] -= 1
    return True


def _key(line: Line) -> Key:
    return ("line", line.line_number) if line.id is None else ("id", line.id)


def _parsed(record: bytes) -> Any:
    try:
        return json.loads(record)
    except (ValueError, RecursionError):
        return None


def _result_key(record: Any) -> Key | None:
    if not isinstance(record, dict) or not record or not ("error" in record or "token_ids" in record):
        return None
    name, value = next(iter(record.items()))
    return (name, value) if name in ("id", "line") and isinstance(value, (str, int)) else None


def _partial(line: bytes) -> bool:
    """Whether an unfinished line can be the beginning of a result (what parses was not cut short)."""
    if not any(line[: len(start)] == start[: len(line)] for start in (b'{"id": ', b'{"line": ')):
        return False
    found = _parsed(line)
    return found is None or _result_key(found) is not None


def _encoded(record: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can only hold escaped
        return (json.dumps(record) + "\n").encode("utf-8")
