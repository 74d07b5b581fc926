"""Progress of long work on stderr: a bar on a terminal, elsewhere a plain line every half minute."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

# Seconds between plain lines, and until the first, so that short work says nothing.
EVERY = 30.0

Left = Callable[[], "float | None"]


class Advance(Protocol):
    """Report that `n` more units of the total are done."""

    def __call__(self, n: float = 1) -> None: ...


@contextmanager
def progress(
    description: str, total: float | None = None, done: float = 0, left: Left | None = None
) -> Iterator[Advance]:
    """Show how far the work named `description` is while the block runs, and yield the function that advances it.

    `total` is in the units of `advance(n)`, and None where nobody knows it; `done` of them were done before. `left`
    tells the seconds left (None: unknown), where the work knows better than its speed so far.
    """
    terminal = sys.stderr is not None and sys.stderr.isatty()
    with (_bar if terminal else _lines)(Work(description, total, done, left)) as advance:
        yield advance


@contextmanager
def _lines(work: Work) -> Iterator[Advance]:
    over = threading.Event()

    def write() -> None:
        while not over.wait(EVERY):
            try:
                print(work.line(), file=sys.stderr, flush=True)
            except (OSError, ValueError):  # nobody reads it any more
                return

    # A thread, as one unit of the work may take long.
    thread = threading.Thread(target=write, name="progress", daemon=True)
    thread.start()
    try:
        yield work.advance
    finally:
        over.set()
        thread.join()


class Work:
    """How far the work is, by the clock's seconds."""

    def __init__(
        self,
        description: str,
        total: float | None,
        done: float = 0,
        left: Left | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description, self.total, self.done = description, total, done
        self._start, self._left, self._clock, self._began = done, left, clock, clock()

    def advance(self, n: float = 1) -> None:
        self.done += n

    @property
    def elapsed(self) -> float:
        return self._clock() - self._began

    @property
    def left(self) -> float | None:
        """Seconds, by the speed so far where nothing knows better; None is unknown."""
        if self._left is not None:
            return self._left()
        gained = self.done - self._start
        if not self.total or gained <= 0:
            return None
        return max(0.0, self.total - self.done) * self.elapsed / gained

    def line(self) -> str:
        if not self.total:
            count = f"{self.done:.0f} done, " if self.done else ""
            return f"{self.description}: {count}{duration(self.elapsed)} so far"
        share, left = min(1.0, self.done / self.total), self.left
        text = f"{self.description}: {self.done:.0f} of {self.total:.0f} ({share:.0%}), {duration(self.elapsed)} so far"
        return text if left is None else f"{text}, about {duration(left)} left"


def duration(seconds: float) -> str:
    """As people say it, from seconds to hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def _bar(work: Work) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed
    from rich.text import Text

    class Left(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if work.left is None else f"{duration(work.left)} left")

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), Elapsed(), Left())
    # rich would send what the block prints to stdout to this console: wrong where stdout is a file or a pipe.
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task(work.description, total=work.total, completed=int(work.done))

        def advance(n: float = 1) -> None:
            work.advance(n)
            bar.update(task, completed=work.done)

        yield advance
