"""Progress of long work on stderr: a bar on a terminal, otherwise a line every half minute."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

# Seconds between plain lines. The first appears after the same time, so short work prints nothing.
EVERY = 30.0


class Advance(Protocol):
    """Report that `n` more units are done."""

    def __call__(self, n: float = 1) -> None: ...


@contextmanager
def progress(
    description: str,
    total: float | None = None,
    done: float = 0,
    left: Callable[[], float | None] | None = None,
) -> Iterator[Advance]:
    """Show the progress of a block, and yield the function that advances it.

    Args:
        total: Number of units, or None if unknown.
        done: Units that are already done.
        left: Estimates the remaining seconds, or None if unknown. Default: from the speed so far.
    """
    began = time.monotonic()
    start = done

    def seconds_left() -> float | None:
        if left is not None:
            return left()
        if not total or done <= start:
            return None
        return max(0.0, total - done) * (time.monotonic() - began) / (done - start)

    def advance(n: float = 1) -> None:
        nonlocal done
        done += n
        if bar is not None:
            bar.update(task, completed=done)

    bar: Any = None

    def write_lines() -> None:
        while not over.wait(EVERY):
            try:
                line = progress_line(
                    description, done, total, elapsed=time.monotonic() - began, left=seconds_left()
                )
                print(line, file=sys.stderr, flush=True)
            except (OSError, ValueError):  # stderr was closed
                return

    if sys.stderr is not None and sys.stderr.isatty():
        bar = _bar(seconds_left)
        task = bar.add_task(description, total=total, completed=done)
        with bar:
            yield advance
        return
    over = threading.Event()
    # A thread, because a single unit may take long.
    thread = threading.Thread(target=write_lines, name="progress", daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        over.set()
        thread.join()


def progress_line(
    description: str, done: float, total: float | None, elapsed: float, left: float | None
) -> str:
    """Format a progress line: name, units done, time elapsed, and time left if known."""
    if not total:
        count = f"{done:.0f} done, " if done else ""
        return f"{description}: {count}{duration(elapsed)} so far"
    text = (
        f"{description}: {done:.0f} of {total:.0f} ({min(1.0, done / total):.0%}), "
        f"{duration(elapsed)} so far"
    )
    return text if left is None else f"{text}, about {duration(left)} left"


def duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _bar(seconds_left: Callable[[], float | None]) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.text import Text

    class Left(ProgressColumn):
        def render(self, task: Any) -> Text:
            seconds = seconds_left()
            return Text("" if seconds is None else f"{duration(seconds)} left")

    name = TextColumn("{task.description}", markup=False)
    elapsed = TimeElapsedColumn()
    columns = (name, BarColumn(), TaskProgressColumn(), elapsed, Left())
    # Otherwise rich redirects what the block prints on stdout to this console, even to a file or
    # pipe.
    return Progress(*columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty())
