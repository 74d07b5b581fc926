"""Lines of a file as requests: several are in flight at once, answered in the order of the file. The file of results
holds whole lines however a run ends, so that an interrupted one can go on."""

from __future__ import annotations

import json
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from freeexport.system.jsonl import (
    STANDARD,
    BrokenLine,
    Request,
    append_lines,
    asked,
    encoded,
    open_pipe,
    read_requests,
    whole_lines,
)
from freeexport.system.output import check_writable
from freeexport.system.progress import progress
from runtime import FreeExportError, GenerationResult, OptionError, PromptError

Line = Request | BrokenLine
Answer = list[GenerationResult] | Exception
# A prompt's results, best first; the event ends it.
Ask = Callable[[Any, threading.Event], list[GenerationResult]]
# Lines that may be answered ahead of one that takes long, for each in flight: a killed run loses what waits for it.
AHEAD = 8


def answer_file(
    ask: Ask, source: Path, target: Path, batch: int, resume: bool, overwrite: bool
) -> None:
    """Answer the lines of `source` in `target`, each written as soon as those before it are: a line that fails is
    reported, there and on stderr, and the others go on. Raises FreeExportError at the end where any failed."""
    lines: Iterable[Line] = read_requests(source)
    total = None
    if source.is_file():
        lines = list(lines)
        total = len(lines)
    with ResultFile(target) as results:
        lines = results.resume(list(lines)) if resume else results.begin(lines, overwrite)
        with (
            progress("generating", total, results.count) as advance,
            closing(answers(ask, lines, batch)) as answered,
        ):
            for line, answer in answered:
                if isinstance(answer, Exception):
                    known = isinstance(answer, FreeExportError)
                    reason = (
                        str(answer)
                        if known
                        else f"{type(answer).__name__}: {' '.join(str(answer).split())}"
                    )
                    click.echo(f"line {line.line_number}: {reason}", err=True)
                    results.write(line, error=reason)
                else:
                    results.write(line, **fields_of(*answer))
                advance()
    if results.failures:
        raise FreeExportError(
            f"{results.failures} of {results.count} lines of {source} failed; {target} says why"
        )


def answers(
    ask: Ask, lines: Iterable[Line], batch: int
) -> Generator[tuple[Line, Answer], None, None]:
    """Yield each line with its results, or with its own error, as soon as those before it are answered.

    At most `batch` are in flight. Closing it ends them after their next token. An OptionError is raised: no line could
    be answered with such options.
    """
    cancel = threading.Event()
    pool = ThreadPoolExecutor(batch, thread_name_prefix="answers")
    pending: deque[tuple[Line, Future[list[GenerationResult]]]] = deque()

    def answer(line: Line) -> list[GenerationResult]:
        if isinstance(line, BrokenLine):
            raise PromptError(line.reason)
        results = ask(line.input, cancel)
        if not results or results[0].interrupted:
            tokens = len(results[0].token_ids) if results else 0
            raise FreeExportError(
                f"the deadline passed after {tokens} tokens; allow more with -o deadline=SECONDS"
            )
        return results

    def oldest() -> tuple[Line, Answer]:
        line, future = pending.popleft()
        error = future.exception()
        if error is None:
            return line, future.result()
        if isinstance(error, OptionError) or not isinstance(error, Exception):
            raise error
        return line, error

    try:
        for line in lines:
            pending.append((line, pool.submit(answer, line)))
            while pending and (len(pending) >= AHEAD * batch or pending[0][1].done()):
                yield oldest()
        while pending:
            yield oldest()
    finally:
        cancel.set()
        pool.shutdown(cancel_futures=True)


def fields_of(result: GenerationResult, *others: GenerationResult) -> dict[str, Any]:
    """A result as JSON can hold it, with the texts of the `others` of its prompt."""
    drafts = {
        source: {name: getattr(counts, name) for name in ("drafts", "proposed", "accepted")}
        for source, counts in result.stats.drafts.items()
    }
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "exited": list(result.exited),
        "finish_reason": result.finish_reason,
        "seconds": round(result.stats.seconds, 6),
        "exit_rate": round(result.stats.exit_rate, 6),
        **({"drafts": drafts} if drafts else {}),
        **({} if result.logprobs is None else {"logprobs": list(result.logprobs)}),
        **({} if result.top_logprobs is None else {"top_logprobs": list(result.top_logprobs)}),
        **({"others": [other.text for other in others]} if others else {}),
    }


class ResultFile:
    """A line for each request, written whole and at once to a file, to standard output (`-`), a pipe or a device.

    A line begins with the request's `id`, or with `line`, its number, where it has none; then `input`, the fields of
    its result or its `error`, and the request's `target` where it has one. However a run ends, a file holds whole lines
    and at most one partial last line, which resuming removes. A run that fails before its first result leaves no new
    file, and an old one as it was.

    `count` is the number of lines that have a result, `failures` those with an error.
    """

    def __init__(self, path: Path) -> None:
        self.count = self.failures = 0
        self._path, self._stale = path, False
        self._stream: Any = None
        try:
            if str(path) == STANDARD:
                self._stream = sys.stdout.buffer
            elif path.is_fifo():
                self._stream = open_pipe(path, "wb")
            elif not path.exists():
                check_writable(path, "--output")
            elif path.is_file():
                path.open("ab").close()
            else:
                self._stream = path.open("wb", buffering=0)
        except OSError as error:
            raise OptionError(
                f"{path} cannot be written ({error.strerror}); name another output"
            ) from None

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream not in (None, sys.stdout.buffer):
            self._stream.close()

    def begin(self, lines: Iterable[Line], overwrite: bool = False) -> Iterable[Line]:
        """All lines, for an output without content, or with `overwrite`; else OptionError, and it stays as it is."""
        self._stale = self._stream is None and self._path.exists() and self._path.stat().st_size > 0
        if self._stale and not overwrite:
            raise OptionError(
                f"{self._path} exists; continue with --resume, replace with --overwrite, or name another"
            )
        return lines

    def resume(self, lines: list[Line]) -> list[Line]:
        """The lines after those that have a result. Raises OptionError where the output holds something else than the
        results of the first lines, in their order, and leaves it as it is."""
        if self._stream is not None:
            raise OptionError(
                f"{self._path} is no file, so there is nothing to resume; leave out --resume"
            )
        content = self._path.read_bytes() if self._path.exists() else b""
        for number, record in enumerate(content.splitlines(keepends=True), start=1):
            whole = record.endswith(b"\n")
            start = (
                encoded(_name(lines[number - 1]))[:-1] + b", "
                if number <= len(lines)
                else b"nothing"
            )
            if record[: len(start)] != start[: len(record)] or (whole and not _is_result(record)):
                raise OptionError(
                    f"{self._path} line {number} is not the result of that line of the input; name another output"
                )
            if whole:
                self.count = number
                self.failures += "error" in json.loads(record)
        whole_lines(self._path)  # cuts off a partial last one
        return lines[self.count :]

    def write(self, line: Line, **result: Any) -> None:
        """Append a result, its fields in this order. Raises FreeExportError where the line cannot be written, as on a
        full disk."""
        question = asked(line) if isinstance(line, Request) else {}
        target = (
            {"target": line.target} if isinstance(line, Request) and line.target is not None else {}
        )
        record = {**_name(line), **question, **result, **target}
        if self._stream is not None:
            self._stream.write(encoded(record) + b"\n")
            self._stream.flush()
        else:
            if self._stale:
                self._path.write_bytes(b"")
                self._stale = False
            append_lines(self._path, [record], "continue with --resume")
        self.count += 1
        self.failures += "error" in result


def _name(line: Line) -> dict[str, Any]:
    return {"line": line.line_number} if line.id is None else {"id": line.id}


def _is_result(record: bytes) -> bool:
    try:
        found = json.loads(record)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and ("error" in found or "token_ids" in found)
