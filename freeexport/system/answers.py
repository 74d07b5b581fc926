"""The lines of a file as requests: several are in flight at once, and answered in the file's order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import click

from freeexport.system.jsonl import BrokenLine, Request, ResultWriter, fields_of, read_requests
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
