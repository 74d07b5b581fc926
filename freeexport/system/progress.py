"""Progress of long work on stderr: a bar on a terminal, elsewhere a plain line every half minute."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

# Seconds between plain lines, and until the first, so that short work prints nothing.
EVERY = 30.0
# In the environment of a process whose parent shows how far all of the work is: nothing is shown here.
BY_PARENT = "FREEEXPORT_PROGRESS_BY_PARENT"


class Advance(Protocol):
    """Report that `n` more units of the total are done."""

    def __call__(self, n: float = 1) -> None: ...


@contextmanager
def progress(
    description: str,
    total: float | None = None,
    done: float = 0,
    left: Callable[[], float | None] | None = None,
) -> Iterator[Advance]:
    """Show how far the work named `description` is while the block runs, and yield the function that advances it.

    `total` is in the units of `advance(n)`, and None where nobody knows it; `done` of them were done before. `left`
    tells the seconds left (None: unknown), where the work knows better than its speed so far.
    """
    began, start = time.monotonic(), done

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
    if os.environ.get(BY_PARENT):
        yield advance
        return

    def write_lines() -> None:
        while not over.wait(EVERY):
            try:
                line = progress_line(
                    description, done, total, time.monotonic() - began, seconds_left()
                )
                print(line, file=sys.stderr, flush=True)
            except (OSError, ValueError):  # nobody reads it any more
                return

    if sys.stderr is not None and sys.stderr.isatty():
        bar = _bar(seconds_left)
        task = bar.add_task(description, total=total, completed=done)
        with bar:
            yield advance
        return
    over = threading.Event()
    # A thread, as one unit of the work may take long.
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
    """A line without a terminal: name, how far, how long so far, and how long it still takes where that is known."""
    if not total:
        count = f"{done:.0f} done, " if done else ""
        return f"{description}: {count}{duration(elapsed)} so far"
    text = f"{description}: {done:.0f} of {total:.0f} ({min(1.0, done / total):.0%}), {duration(elapsed)} so far"
    return text if left is None else f"{text}, about {duration(left)} left"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as people write them."""
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

    name, elapsed = TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    columns = (name, BarColumn(), TaskProgressColumn(), elapsed, Left())
    # rich would send what the block prints to stdout to this console: wrong where stdout is a file or a pipe.
    return Progress(*columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty())
