"""Whether this process is the one that opened a session. A fork has none of its threads, and may have locks that nobody
opens."""

from __future__ import annotations

import os

from runtime.errors import OptionError

_forks = 0


class Process:
    """The process in which it was made."""

    def __init__(self) -> None:
        self._forks = _forks

    @property
    def left(self) -> bool:
        """Whether this is another, a fork of it."""
        return self._forks != _forks

    def check(self) -> None:
        """Raises OptionError in a fork."""
        if self.left:
            raise OptionError(
                f"the session was opened before process {os.getpid()} was forked; open one in this process, "
                "or start it with multiprocessing's 'spawn'"
            )


def _in_child() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
