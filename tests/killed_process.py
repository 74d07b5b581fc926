"""Runs work in a process that is killed before a change of the file system."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

KILLED = 9


def killed_before(change: int, places: dict[Any, tuple[str, ...]], work: Callable[[], object]) -> bool:
    """Run `work` in a process that exits, as if killed, after `change` calls of some functions.

    Args:
        change: Number of calls that are completed.
        places: Names of the counted functions, by module or class.
        work: Function to run.

    Returns:
        True if the process exited early.
    """
    process = os.fork()
    if process:
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert code in (0, KILLED)
        return code == KILLED
    try:
        left = change

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                nonlocal left
                if left == 0:
                    os._exit(KILLED)
                left -= 1
                return function(*arguments, **named)

            return call

        for place, names in places.items():
            for name in names:
                setattr(place, name, counted(getattr(place, name)))
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)
