"""Steps of a long run. Each finished step is a JSON file, which a resumed run does not repeat."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from freeexport.evaluate.records import check_run
from freeexport.system.output import write_whole
from runtime.errors import OptionError
from runtime.json_file import read_object

RUN = "compare.json"
STEPS = "steps"
UNREADABLE = "remove it, to do this step again"


class Steps:
    """Steps of a run in a directory. Nothing is written before the first step begins.

    Args:
        output: The directory.
        run: Everything that results depend on, for JSON.
        announce: Called with the name of each step that begins.

    Raises:
        OptionError: If the directory holds other files, or a run with other options.
    """

    def __init__(
        self,
        output: Path,
        run: Mapping[str, Any],
        announce: Callable[[str], object] = lambda name: None,
    ) -> None:
        self.output = output
        self._announce = announce
        self._run = json.loads(json.dumps(run, default=str))
        check_run(output / RUN, run, "repeat its options, or choose another --output")

    def run(
        self, name: str, work: Callable[..., Mapping[str, Any]], *arguments: Any
    ) -> dict[str, Any]:
        """Return the result of a step, which is worked out unless the step is finished."""
        path = self.output / STEPS / f"{name}.json"
        if path.is_file():
            return read_object(path, UNREADABLE, OptionError)
        self._announce(name)
        if not (self.output / RUN).is_file():
            self.output.mkdir(parents=True, exist_ok=True)
            write_whole(self.output / RUN, json.dumps(self._run, indent=2, sort_keys=True) + "\n")
        result = json.dumps(work(*arguments), indent=2, default=str)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, result + "\n")
        found: dict[str, Any] = json.loads(result)
        return found
