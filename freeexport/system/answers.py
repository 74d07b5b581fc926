"""Lines of a file as requests: several are in flight at once, answered in the order of the file. The file of results
holds whole lines however a run ends, so that an interrupted one can go on."""

from __future__ import annotations

import json
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from freeexport.system.jsonl import BrokenLine, Request, read_requests
from freeexport.system.progress import progress
from runtime import FreeExportError, GenerationResult, OptionError, PromptError

Line = Request | BrokenLine
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
    lines = list(read_requests(source))
    with (
        ResultWriter(target, resume=resume, overwrite=overwrite) as writer,
        ExitStack() as stack,
    ):
        left = [line for line in lines if not writer.skip(line)]
        advance = stack.enter_context(progress("generating", len(lines), len(lines) - len(left)))
        with closing(answers(ask, left, batch)) as answered:
            for line, answer in answered:
                _write(writer, line, answer)
                advance()
        failures = writer.failures
    if failures:
        raise FreeExportError(f"{failures} of {len(lines)} lines of {source} failed; {target} says why")


def _write(writer: ResultWriter, line: Line, answer: Answer) -> None:
    if not isinstance(answer, Exception):
        assert isinstance(line, Request)
        writer.write(line, **fields_of(*answer))
        return
    known = isinstance(answer, FreeExportError)
    reason = str(answer) if known else f"{type(answer).__name__}: {' '.join(str(answer).split())}"
    click.echo(f"line {line.line_number}: {reason}", err=True)
    writer.write_error(line, reason)


def answers(ask: Ask, lines: Iterable[Line], batch: int) -> Generator[tuple[Line, Answer], None, None]:
    """Each line with its results, or with what went wrong with it alone, as soon as those before it are answered.

    At most `batch` are in flight. Closing it ends them after their next token. Raises OptionError, which no line could
    do better with.
    """
    cancel = threading.Event()
    pool = ThreadPoolExecutor(batch, thread_name_prefix="answers")
    pending: deque[tuple[Line, Future[list[GenerationResult]]]] = deque()
    try:
        for line in lines:
            if len(pending) >= AHEAD * batch:
                yield _oldest(pending)
            pending.append((line, pool.submit(_answer, ask, line, cancel)))
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
    """Appends one line for each request to the output file, whole and at once.

    A line begins with the request's `id`, or with `line`, its number, where it has none; then `text`, `token_ids`,
    `exited`, `finish_reason`, `seconds` from prompt to last token, `exit_rate` of the tokens that could exit, and the
    request's `target` where it has one; or `error`. However a run ends, the file holds whole lines and at most one
    partial last line, which `resume` removes. A run that fails before its first result leaves no new file.

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
                raise OptionError(f"{path} exists; continue with --resume, replace with --overwrite, or name another")
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

    def write(self, request: Request, **result: Any) -> None:
        """Append a result, its fields in this order (see `fields_of`).

        Raises FreeExportError where the line cannot be written, as on a full disk.
        """
        target = {} if request.target is None else {"target": request.target}
        self._append(request, {**result, **target})

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
                f"{self._path} cannot be written ({error.strerror}); make room, then continue with --resume"
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
