"""Child processes of the test process."""

from __future__ import annotations

from types import ModuleType

import psutil


def processes_of(module: ModuleType) -> set[int]:
    """Return the ids of running child processes that run a module as their program."""
    running = (child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE)
    return {child.pid for child in running if module.__name__ in child.cmdline()}
