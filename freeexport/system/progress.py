"""Progress of long work on stderr: a bar on a terminal, elsewhere a plain line every half minute."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

# Seconds between plain lines, and until the first, so that short work says nothing.
EVERY = 30.0
# A process with this variable tells its parent, which shows it: lines on stderr that begin with the mark.
VARIABLE, MARK = "FREEEXPORT_PROGRESS_TO_PARENT", "\x1eprogress "

Clock = Callable[[], float]
Left = Callable[[], "float | None"]


class Advance(Protocol):
    """Report that `n` more units of the total are done."""

    def __call__(self, n: float = 1) -> None: ...


class Timer(Protocol):
    """What `threading.Event` is: `wait` is true as soon as it was set."""

    def set(self) -> None: ...
    def wait(self, timeout: float) -> bool: ...


@contextmanager
def progress(
    description: str, total: float | None = None, done: float = 0, left: Left | None = None
) -> Iterator[Advance]:
    """Show how far the work named `description` is while the block runs, and yield the function that advances it.

    `total` is in the units of `advance(n)`, and None where nobody knows it; `done` of them were done before. `left`
    tells the seconds left (None: unknown), where the work knows better than its speed so far.
    """
    with _shown(description, total, done, left) as advance:
        yield advance


def _shown(description: str, total: float | None, done: float, left: Left | None) -> AbstractContextManager[Advance]:
    if VARIABLE in os.environ:
        return _told(description, total, done)
    if sys.stderr is not None and sys.stderr.isatty():
        return _bar(description, total, done, left)
    return plain_progress(description, total, done, left=left)


@contextmanager
def plain_progress(
    description: str,
    total: float | None,
    done: float = 0,
    clock: Clock = time.monotonic,
    timer: Timer | None = None,
    left: Left | None = None,
) -> Iterator[Advance]:
    """As `progress`, in lines: what, how far, and how much time is left. A thread writes them, as one unit of the work
    may take long."""
    over, work = timer or threading.Event(), Work(description, total, done, clock, left)

    def write() -> None:
        while not over.wait(EVERY):
            try:
                print(work.line(), file=sys.stderr, flush=True)
            except (OSError, ValueError):  # nobody reads it any more
                return

    thread = threading.Thread(target=write, name="progress", daemon=True)
    thread.start()
    try:
        yield work.advance
    finally:
        over.set()
        thread.join()


class Work:
    """How far it is, by the clock's seconds."""

    def __init__(
        self, description: str, total: float | None, done: float, clock: Clock, left: Left | None = None
    ) -> None:
        self._description, self._total, self._clock, self._left = description, total, clock, left
        self._start = self._done = done
        self._began = clock()

    def advance(self, n: float = 1) -> None:
        self._done += n

    def line(self) -> str:
        elapsed = self._clock() - self._began
        if not self._total:
            count = f"{self._done:.0f} done, " if self._done else ""
            return f"{self._description}: {count}{duration(elapsed)} so far"
        share = min(1.0, self._done / self._total)
        text = f"{self._description}: {self._done:.0f} of {self._total:.0f} ({share:.0%}), {duration(elapsed)} so far"
        gained = self._done - self._start
        if self._left is not None:
            left = self._left()
        else:
            left = max(0.0, self._total - self._done) * elapsed / gained if gained > 0 else None
        return text if left is None else f"{text}, about {duration(left)} left"


def duration(seconds: float) -> str:
    """As people say it, from seconds to hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def _bar(description: str, total: float | None, done: float, left: Left | None) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class LeftColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            seconds = left() if left is not None else None
            return Text("" if seconds is None else f"{duration(seconds)} left")

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn() if left is None else LeftColumn(),
    )
    # rich would send what the block prints to stdout to this console: wrong where stdout is a file or a pipe.
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task(description, total=total, completed=int(done))

        def advance(n: float = 1) -> None:
            bar.advance(task, n)

        yield advance


@contextmanager
def _told(description: str, total: float | None, done: float) -> Iterator[Advance]:
    """To the parent process."""

    def tell(**news: float | None) -> None:
        print(MARK + json.dumps({"what": description, **news}), file=sys.stderr, flush=True)

    def advance(n: float = 1) -> None:
        nonlocal done
        done += n
        tell(done=done)

    tell(total=total, begin=done)
    try:
        yield advance
    finally:
        tell(end=done)


class ChildProgress:
    """Shows what a child process tells of its work, a line at a time; to be closed."""

    def __init__(self) -> None:
        self._shown = ExitStack()
        self._advance: Advance | None = None
        self._done = 0.0

    def __enter__(self) -> ChildProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.close()

    def read(self, line: str) -> bool:
        """Whether the line was news of progress."""
        if not line.startswith(MARK):
            return False
        news = json.loads(line.removeprefix(MARK))
        if "begin" in news:
            self._shown.close()
            self._done = news["begin"]
            self._advance = self._shown.enter_context(progress(news["what"], news["total"], self._done))
        elif self._advance is not None:
            done = news["end"] if "end" in news else news["done"]
            self._advance(done - self._done)
            self._done = done
        if "end" in news:
            self._shown.close()
            self._advance = None
        return True
