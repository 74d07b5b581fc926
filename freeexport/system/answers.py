"""Answer the lines of a JSONL file, several at once, in the order of the file.

The file of results holds whole lines however a run ends, so an interrupted run can be resumed.
"""

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
    InputLine,
    append_lines,
    encoded,
    input_field,
    open_pipe,
    read_requests,
    whole_lines,
)
from freeexport.system.output import check_writable
from freeexport.system.progress import progress
from runtime import FreeExportError, GenerationResult, OptionError, PromptError

Line = InputLine | BrokenLine
Answer = list[GenerationResult] | Exception
# Returns the results of a prompt, best first. Setting the event cancels it.
Ask = Callable[[Any, threading.Event], list[GenerationResult]]
# Lines in flight, per line of the batch, that may be answered ahead of a slow one. A killed run
# loses the answers that wait.
AHEAD = 8


def answer_file(
    ask: Ask, source: Path, target: Path, batch: int, resume: bool, overwrite: bool
) -> None:
    """Answer the lines of `source` and write the results to `target` in the same order.

    A line that fails is reported in `target` and on stderr. The other lines are still answered.
    """
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
            f"{results.failures} of {results.count} lines of {source} failed; "
            f"see their errors in {target}"
        )


def answers(
    ask: Ask, lines: Iterable[Line], batch: int
) -> Generator[tuple[Line, Answer], None, None]:
    """Yield each line with its results or its error, in order.

    At most `batch` lines are in flight. Closing the generator cancels them after their next token.

    Raises:
        OptionError: If the options are invalid, which no line could be answered with.
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
                f"deadline exceeded after {tokens} tokens; raise it with -o deadline=SECONDS"
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
    """Convert a result to JSON values, with the texts of the `others` of the same prompt."""
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
    """File of results with one JSON line per request.

    Also writes to standard output (`-`), a pipe or a device. Each line begins with the request's
    `id`, or with `line`, its line number, if it has no id. Then follow the `input`, the fields of
    the result or the `error`, and the request's `target` if it has one. However a run ends, the
    file holds whole lines and at most one partial last line, which resuming removes. A run that
    fails before its first result creates no file, and does not change an existing one.

    Attributes:
        count: Number of lines that have a result.
        failures: Number of lines whose result is an error.
    """

    def __init__(self, path: Path) -> None:
        self.count = self.failures = 0
        self._path = path
        self._stale = False
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
                f"{path} cannot be written ({error.strerror}); choose another output"
            ) from None

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream not in (None, sys.stdout.buffer):
            self._stream.close()

    def begin(self, lines: Iterable[Line], overwrite: bool = False) -> Iterable[Line]:
        """Return all lines."""
        self._stale = self._stream is None and self._path.exists() and self._path.stat().st_size > 0
        if self._stale and not overwrite:
            raise OptionError(
                f"{self._path} exists; continue with --resume, replace with --overwrite, or name "
                "another"
            )
        return lines

    def resume(self, lines: list[Line]) -> list[Line]:
        """Return the lines after those that already have a result."""
        if self._stream is not None:
            raise OptionError(
                f"{self._path} is not a file, so there is nothing to resume; omit --resume"
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
                    f"{self._path} line {number} is not the result of that input line; "
                    "choose another output"
                )
            if whole:
                self.count = number
                self.failures += "error" in json.loads(record)
        whole_lines(self._path)  # removes a partial last line
        return lines[self.count :]

    def write(self, line: Line, **result: Any) -> None:
        """Append a result, with its fields in the order given.

        Raises:
            FreeExportError: If the line cannot be written, for instance because the disk is full.
        """
        question = input_field(line) if isinstance(line, InputLine) else {}
        target = (
            {"target": line.target}
            if isinstance(line, InputLine) and line.target is not None
            else {}
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
        parsed = json.loads(record)
    except (ValueError, RecursionError):
        return False
    return isinstance(parsed, dict) and ("error" in parsed or "token_ids" in parsed)
