"""Steps of a long run. Each finished step is a JSON file, which a resumed run does not repeat."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from freeexport.system.output import write_whole
from runtime.bundle.json_file import read_object
from runtime.errors import OptionError

STEPS = "steps"
UNREADABLE = "remove it, to do this step again"


class Steps:
    """Steps of a run in a directory. Nothing is written before the first step begins.

    Args:
        output: The directory.
        file: Name of the file in it that marks the run.
        run: Everything that results depend on, for JSON.
        announce: Called with the name of each step that begins.
        remedy: What to do about a run with other options, for the error.

    Raises:
        OptionError: If the directory holds other files, or a run with other options.
    """

    def __init__(
        self,
        output: Path,
        file: str,
        run: Mapping[str, Any],
        announce: Callable[[str], object] = lambda name: None,
        remedy: str = "repeat its options, or choose another --output",
    ) -> None:
        self.output = output
        self._file = output / file
        self._announce = announce
        self._run = run
        check_run(self._file, run, remedy)

    def begin(self) -> None:
        """Mark the directory as this run's."""
        if not self._file.is_file():
            self.output.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self._run, indent=2, sort_keys=True, default=str)
            write_whole(self._file, text + "\n")

    def run(
        self, name: str, work: Callable[..., Mapping[str, Any]], *arguments: Any
    ) -> dict[str, Any]:
        """Return the result of a step, which is worked out unless the step is finished.

        Args:
            name: Name of the step, unique in the run.
            work: Does the step and returns its result, for JSON.
            arguments: Arguments of `work`.
        """
        if not self.finished(name):
            self._announce(name)
            self.begin()
            result = json.dumps(work(*arguments), indent=2, default=str)
            path = self._path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, result + "\n")
        return self.read(name)

    def finished(self, name: str) -> bool:
        """Return True if the step has a result."""
        return self._path(name).is_file()

    def read(self, name: str) -> dict[str, Any]:
        """Return the result of a finished step."""
        return read_object(self._path(name), UNREADABLE, OptionError)

    def forget(self, name: str) -> None:
        """Remove the result of a step, if there is one."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.output / STEPS / f"{name}.json"


def check_run(file: Path, run: Mapping[str, Any], remedy: str, overwrite: bool = False) -> None:
    """Check that a directory is missing, empty, or holds this run, which its `file` describes."""
    output = file.parent
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not file.is_file():
        raise OptionError(
            f"{output} exists and is no output of this command (no {file.name}); choose another "
            "directory"
        )
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        before = None
    before = before if isinstance(before, dict) else {}
    same = json.loads(json.dumps(run, default=str))
    names = sorted(name for name in {*before, *run} if before.get(name) != same.get(name))
    if names and not overwrite:
        raise OptionError(f"{output} holds another run, with other {', '.join(names)}; {remedy}")
