"""Run a module of this package in a process of its own, so that its memory goes back to the system."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from freeexport.progress import VARIABLE, ChildProgress
from runtime.errors import FreeExportError


class ChildError(FreeExportError):
    """A child process failed; the text is its own last line."""


def run_child(module: str, *arguments: str, variables: Mapping[str, str] | None = None) -> str:
    """The standard output of `python -m module arguments`, with `variables` in its environment besides this process's.
    Its progress is shown as this process's own. Raises ChildError with its error line."""
    # The packages may stand in a source tree that only this process's path knows.
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")]))
    with (
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, VARIABLE: "1", **(variables or {})},
        ) as process,
        ThreadPoolExecutor(1) as reader,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            output = reader.submit(process.stdout.read)
            reason = _last_line(process.stderr)
            code = process.wait()
        except BaseException:
            process.kill()
            raise
    if code != 0:
        raise ChildError(reason.removeprefix("error: ") or f"{module} ended with exit code {code}")
    return output.result()


def _last_line(stderr: Iterable[str]) -> str:
    """The last line with text, or "", after all were read; progress is shown and does not count."""
    last = ""
    with ChildProgress() as shown:
        for line in stderr:
            if not shown.read(line) and line.strip():
                last = line.strip()
    return last
