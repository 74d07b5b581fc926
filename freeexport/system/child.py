"""Run a module of this package in a process of its own, so that its memory goes back to the system.

The child ends when its parent does, even by SIGKILL: its standard input is a pipe that the parent alone holds open.
Linux could send a signal instead (PR_SET_PDEATHSIG), but when the thread that started the child ends, not the process.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import freeexport
from runtime.errors import FreeExportError

# The folder to import the packages from; they may stand in a source tree that only this process knows.
PACKAGES = str(Path(freeexport.__file__).resolve().parents[1])
# The number of the open file that a child writes its error line to, instead of stderr.
ERRORS_TO = "FREEEXPORT_ERRORS_TO"
# stderr is the parent's, for progress and warnings; what libraries say there is not for its user.
_QUIET = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}


class ChildError(FreeExportError):
    """A child process failed; the text is its own error line."""


def run_child(
    module: str,
    *arguments: str,
    variables: Mapping[str, str] | None = None,
    show: Callable[[str], object] | None = None,
) -> str:
    """The standard output of `python -m module arguments`, with `variables` in its environment besides this process's,
    and nothing to read. It shows its progress itself, or `show` gets each line of it. Raises ChildError with its error
    line."""
    path = os.pathsep.join(filter(None, [PACKAGES, os.environ.get("PYTHONPATH")]))
    errors, told = os.pipe()
    environment = {
        **os.environ,
        **_QUIET,
        "PYTHONPATH": path,
        ERRORS_TO: str(told),
        **(variables or {}),
    }
    command = [sys.executable, "-m", f"{__package__}.{Path(__file__).stem}", module, *arguments]
    pipe = subprocess.PIPE
    pipes: dict[str, Any] = {
        "stdin": pipe,
        "stdout": pipe,
        "stderr": None if show is None else pipe,
    }
    with open(errors, encoding="utf-8") as lines:
        try:
            process = subprocess.Popen(
                command, **pipes, text=True, pass_fds=(told,), env=environment
            )
        finally:
            os.close(told)
        with process:
            assert process.stdout is not None
            reader = threading.Thread(
                target=_show_lines, args=(process.stderr or (), show), daemon=True
            )
            reader.start()
            try:
                output = process.stdout.read()
                code = process.wait()
                reader.join(1.0)  # its own children may keep stderr open
            except BaseException:
                process.kill()
                raise
        if code != 0:
            raise ChildError(lines.read().strip() or f"{module} ended with exit code {code}")
        return output


def _show_lines(lines: Iterable[str], show: Callable[[str], object] | None) -> None:
    with suppress(ValueError):  # the file was closed
        for line in lines:
            if show is not None:
                show(line.rstrip())


def tell_parent(reason: str) -> bool:
    """Give the error line to the parent process; False where this process is no child."""
    descriptor = os.environ.get(ERRORS_TO)
    if descriptor is None:
        return False
    os.write(int(descriptor), reason.encode(errors="backslashreplace"))
    return True


def main(arguments: Sequence[str]) -> None:
    """Run the module named first with the other arguments, as `python -m` does, for as long as the parent lives."""
    watched = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=_end_with_parent, args=(watched,), daemon=True).start()
    sys.argv = list(arguments)
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except (FreeExportError, ImportError) as error:
        tell_parent(str(error))
        sys.exit(1)


def _end_with_parent(watched: int) -> None:
    os.read(watched, 1)  # nothing is ever written
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
