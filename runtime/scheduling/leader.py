"""Which of the threads that wait drives: one at a time, the others sleep until what they wait for is there, or it is
theirs to drive."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from runtime.errors import OptionError
from runtime.scheduling.patience import patience

REENTRY = "a callback of a request asked its own session, which waits for the callback; open another session"


class Awaited(Protocol):
    def ready(self, whole: bool) -> bool: ...


class Follower(NamedTuple):
    """A thread that sleeps while another drives. `own`: it is the session's."""

    awaited: Awaited
    whole: bool
    own: bool
    awake: threading.Event


class Leader:
    """`lock` guards who drives, and whatever else its owner guards with it. `clock` counts the seconds in which anyone
    drove: what a reader does between tokens does not count."""

    def __init__(self, lock: threading.Lock) -> None:
        self.followers: deque[Follower] = deque()
        self._lock = lock
        self._driver: int | None = None
        self._seconds, self._began = 0.0, 0.0

    @property
    def taken(self) -> bool:
        return self._driver is not None

    @property
    def here(self) -> bool:
        """Whether this thread drives: then it must not wait."""
        return self._driver == threading.get_ident()

    def clock(self) -> float:
        return self._seconds + (time.perf_counter() - self._began if self._driver is not None else 0.0)

    def take(self, awaited: Awaited, whole: bool, drives: bool = True, own: bool = False) -> Follower | None:
        """None where this thread is the driver now; else, and where it never `drives`, what it is to sleep on."""
        with self._lock:
            if self._driver is None and drives:
                # In this order: another thread may ask for the time.
                self._began = time.perf_counter()
                self._driver = threading.get_ident()
                return None
            if self.here:
                raise OptionError(REENTRY)
            follower = Follower(awaited, whole, own, threading.Event())
            if awaited.ready(whole):
                follower.awake.set()
            else:
                self.followers.append(follower)
            return follower

    def sleep(self, follower: Follower, until: float = math.inf) -> bool:
        """Until it is woken, or shortly after `until`, a time of the monotonic clock: whether it was woken."""
        with self.followed(follower):
            woken = follower.awake.wait(patience(until))
        if not woken:
            self._give_up(follower)
        return woken

    @contextmanager
    def followed(self, follower: Follower) -> Iterator[None]:
        """What it does before it sleeps: it gives up where that raises."""
        try:
            yield
        except BaseException:
            self._give_up(follower)
            raise

    def leave(self, own: bool = False) -> None:
        """Let another drive: one that still waits, as one that has what it waited for would go without driving. `own`:
        the session's thread, where it is among them."""
        with self._lock:
            seconds = self.clock()
            self._driver = None
            self._seconds = seconds
            if self.followers:
                self._pass_on(own)

    def relay(self) -> None:
        """Where nobody drives, let one drive that waits."""
        with self._lock:
            if self._driver is None:
                self._pass_on(own=False)

    def leave_to_own(self) -> None:
        """Where nobody drives, let the session's thread, if it waits: for one that was to drive and must not any
        more."""
        with self._lock:
            if self._driver is None and any(follower.own for follower in self.followers):
                self._pass_on(own=True)

    def wake(self) -> None:
        """Those who need not wait any more."""
        with self._lock:
            self._wake()

    def _pass_on(self, own: bool) -> None:
        self._wake()
        heirs = [follower for follower in self.followers if follower.own] if own else []
        heir = next(iter(heirs or self.followers), None)
        if heir is not None:
            self.followers.remove(heir)
            heir.awake.set()

    def _wake(self) -> None:
        asleep = deque[Follower]()
        for follower in self.followers:
            if follower.awaited.ready(follower.whole):
                follower.awake.set()
            else:
                asleep.append(follower)
        self.followers = asleep

    def _give_up(self, follower: Follower) -> None:
        with self._lock:
            if follower in self.followers:
                self.followers.remove(follower)
            elif self._driver is None:
                self._pass_on(own=False)  # it was this one's turn to drive
