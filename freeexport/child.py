"""Run a module of this package in a process of its own, so that its memory goes back to the system."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from runtime.errors import FreeExportError


class ChildError(FreeExportError):
    """A child process failed; the text is its own last line."""


def run_child(module: str, *arguments: str, variables: Mapping[str, str] | None = None) -> str:
    """The standard output of `python -m module arguments`, with `variables` in its environment besides this process's.
    Raises ChildError with its error line."""
    # The packages may stand in a source tree that only this process's path knows.
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **(variables or {})},
        check=False,
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].removeprefix("error: ") if lines else f"{module} ended with exit code {done.returncode}"
        raise ChildError(reason)
    return done.stdout
