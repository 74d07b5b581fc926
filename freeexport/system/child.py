"""Run a module of this package in a process of its own, so that its memory goes back to the system.

The child ends when its parent does, even by SIGKILL: it watches a pipe that the parent alone holds open. Linux could
send a signal instead (PR_SET_PDEATHSIG), but when the thread that started the child ends, not the process.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import freeexport
from freeexport.system.progress import VARIABLE, ChildProgress
from runtime.errors import FreeExportError

# The folder to import the packages from; they may stand in a source tree that only this process knows.
PACKAGES = str(Path(freeexport.__file__).resolve().parents[1])


class ChildError(FreeExportError):
    """A child process failed; the text is its own last line."""


def run_child(module: str, *arguments: str, variables: Mapping[str, str] | None = None) -> str:
    """The standard output of `python -m module arguments`, with `variables` in its environment besides this process's,
    and nothing to read. Its progress is shown as this process's own. Raises ChildError with its error line."""
    path = os.pathsep.join(filter(None, [PACKAGES, os.environ.get("PYTHONPATH")]))
    watched, held = os.pipe()
    try:
        return _output(module, arguments, watched, {"PYTHONPATH": path, VARIABLE: "1", **(variables or {})})
    finally:
        os.close(watched)
        os.close(held)


def _output(module: str, arguments: Sequence[str], watched: int, variables: Mapping[str, str]) -> str:
    with (
        subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.{Path(__file__).stem}", module, *arguments],
            stdin=watched,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **variables},
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


def main(arguments: Sequence[str]) -> None:
    """Run the module named first with the other arguments, as `python -m` does, for as long as the parent lives."""
    watched = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=_end_with_parent, args=(watched,), daemon=True).start()
    module, *_ = sys.argv = list(arguments)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with_parent(watched: int) -> None:
    os.read(watched, 1)  # nothing is ever written
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
