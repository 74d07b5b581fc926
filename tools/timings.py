"""The file of a measurement of processor time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from freeexport.system.environment import environment
from freeexport.system.output import write_whole


def save_timings(
    path: Path,
    command: str,
    busy_cores: float,
    rows: Sequence[Mapping[str, Any]],
    clock: str = "processor time",
) -> None:
    """Write measured rows as JSON, with the command, the commit and the processor.

    Args:
        path: File to write.
        command: Command that repeats the measurement.
        busy_cores: Mean number of cores that other processes used meanwhile.
        rows: Results, in milliseconds.
        clock: What was measured: processor time of a thread, or wall-clock time.
    """
    content = {
        "command": command,
        "environment": environment(),
        "busy_cores": round(busy_cores, 2),
        "unit": f"milliseconds of {clock}",
        "rows": rows,
    }
    write_whole(path, json.dumps(content, indent=1) + "\n")
