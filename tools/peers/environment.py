"""Environments of peers: made once with venv and pip in the user's cache, so that no peer is a dependency."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from freeexport.system.output import output_directory
from freeexport.system.progress import progress
from runtime.errors import FreeExportError
from runtime.machine.machine import user_cache

MARKER = "environment.json"
# Seconds for all of an environment: the slowest peer is compiled, on one core.
LIMIT = 3600.0


class PeerError(FreeExportError):
    """A peer cannot be installed, converted, loaded or run; the text is for its row of the table."""


def environment_key(requirements: Sequence[str], variables: Mapping[str, str]) -> str:
    """Names an environment: the same for the same requirements, build variables, Python version and processor type."""
    python = ".".join(platform.python_version_tuple()[:2])
    what = [sorted(requirements), sorted(variables.items()), python, platform.machine()]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def peer_interpreter(
    name: str, requirements: Sequence[str], variables: Mapping[str, str], limit: float = LIMIT
) -> Path:
    """The Python of the environment that has `requirements`, built now unless it is in the cache: beside its place, and
    renamed when complete. pip is the user's own, with its configuration, and `variables` in its environment.

    Raises PeerError with pip's last error; all that pip said is kept in the cache under logs.
    """
    place = user_cache("peers", "environments", environment_key(requirements, variables))
    if not (place / MARKER).is_file():
        log = user_cache("peers", "logs", f"{name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with progress(f"installing {name}"), output_directory(place, MARKER, overwrite=True, sync=False) as partial:
            _build(name, partial, requirements, variables, log, limit)
            content = {"requirements": list(requirements), "python": platform.python_version()}
            (partial / MARKER).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return _interpreter(place)


def _build(
    name: str, place: Path, requirements: Sequence[str], variables: Mapping[str, str], log: Path, limit: float
) -> None:
    # output_directory made it, and venv fills what is there.
    install = [str(_interpreter(place)), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    with log.open("w", encoding="utf-8") as file:
        for command in ([sys.executable, "-m", "venv", str(place)], [*install, *requirements]):
            try:
                subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **variables},
                    timeout=limit,
                    check=True,
                )
            except subprocess.TimeoutExpired:
                raise PeerError(f"its environment was not built within {limit:.0f} s; see {log}") from None
            except subprocess.CalledProcessError:
                raise PeerError(f"its environment cannot be built ({_reason(log)}); see {log}") from None


def _interpreter(place: Path) -> Path:
    return place / "bin" / "python"


def _reason(log: Path) -> str:
    """pip's last error line, else the last line there is."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no output"])[-1].removeprefix("ERROR: ")[:200]
