"""Run a module of this package in its own process, so that its memory returns to the system.

The child ends when its parent does, even by SIGKILL: its standard input is a pipe that only the
parent holds open. Linux could send a signal instead (PR_SET_PDEATHSIG), but it does so when the
thread that started the child ends, not the process.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import freeexport
from runtime.errors import FreeExportError

# Folder to import the packages from. They may be in a source tree that is on no other process's
# path.
PACKAGES = str(Path(freeexport.__file__).resolve().parents[1])
# Environment variable with the file to which a child writes its error line, instead of stderr.
ERRORS_TO = "FREEEXPORT_ERRORS_TO"
# stderr is inherited from the parent, for progress and warnings. Messages of libraries are
# silenced.
_QUIET = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}


class ChildError(FreeExportError):
    """A child process failed. The text is its own error line."""


def run_child(
    module: str,
    *arguments: str,
    variables: Mapping[str, str] | None = None,
) -> str:
    """Run `python -m module arguments` in a child process and return its standard output.

    Args:
        variables: Environment variables to add to those of this process.
    """
    path = os.pathsep.join(filter(None, [PACKAGES, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", f"{__package__}.{Path(__file__).stem}", module, *arguments]
    pipe = subprocess.PIPE
    # Only POSIX systems could pass a pipe.
    with TemporaryDirectory(prefix="freeexport-", ignore_cleanup_errors=True) as folder:
        reasons = Path(folder, "error")
        environment = {
            **os.environ,
            **_QUIET,
            "PYTHONPATH": path,
            ERRORS_TO: str(reasons),
            **(variables or {}),
        }
        with subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            try:
                output = process.stdout.read()
                code = process.wait()
            except BaseException:
                process.kill()
                raise
        if code != 0:
            reason = reasons.read_text(encoding="utf-8").strip() if reasons.exists() else ""
            ended = (
                "was killed, probably for lack of memory" if code == -9 else f"exited with {code}"
            )
            raise ChildError(reason or f"{module} {ended}")
        return output


def tell_parent(reason: str) -> bool:
    """Send the error line to the parent process. Return False if this process is not a child."""
    file = os.environ.get(ERRORS_TO)
    if file is None:
        return False
    Path(file).write_text(reason, encoding="utf-8", errors="backslashreplace")
    return True


def main(arguments: Sequence[str]) -> None:
    """Run the module named by the first argument, as `python -m` does, while the parent lives."""
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
    os.read(watched, 1)  # nothing is written: returns when the parent ends
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
