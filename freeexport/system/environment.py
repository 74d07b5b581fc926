"""Describes the machine, versions and commit of a measurement."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from freeexport import __version__
from freeexport.system.machine import detect_machine, kernel_instructions
from runtime.engines import kernels


def environment() -> dict[str, Any]:
    """Return the time, machine, versions and commit of a measurement, for JSON."""
    import onnxruntime

    machine = detect_machine()
    instructions = kernel_instructions()
    return {
        "made": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": {
            "processor": machine.cpu,
            "features": list(machine.features),
            "kernels": instructions,
            "cores": machine.cores,
            "memory": machine.memory,
        },
        "versions": {
            "freeexport": __version__,
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
            **({"kernels": str(kernels.VERSION)} if instructions else {}),
        },
        "commit": commit_of(Path(__file__).resolve().parents[2]),
    }


def commit_of(root: Path) -> str | None:
    """Return the commit of the git checkout at `root`.

    Ends in "-dirty" if tracked files have changes. None if `root` is not a checkout, such as the
    directory of an installed package.
    """
    if not (root / ".git").exists():
        return None
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--exclude=*",
        "--abbrev=40",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def about(environment: Mapping[str, Any], threads: int) -> list[tuple[str, str]]:
    """Return names and texts that describe an `environment`."""
    machine = environment["machine"]
    versions = environment["versions"]
    return [
        (
            "processor",
            f"{machine['processor']} ({' '.join(machine['features'])}), {threads} thread(s)",
        ),
        ("kernels", machine["kernels"] or "none for this machine"),
        ("versions", ", ".join(f"{name} {value}" for name, value in versions.items())),
    ]
