"""A directory that appears complete or not at all, and never in place of something that is not ours."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import FreeExportError


class OutputError(FreeExportError):
    """Something stands where a command wants to write."""


@contextmanager
def output_directory(out: Path, marker: str, overwrite: bool) -> Iterator[Path]:
    """Yield an empty directory beside `out` that takes its name when the block ends without an error.

    What stands at `out` is replaced only with `overwrite`, and only if it holds the file `marker`. Raises OutputError.
    """
    out = Path(os.path.abspath(out))
    _remove_abandoned(out)
    _check_free(out, marker, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        _check_free(out, marker, overwrite)
        _swap(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_output(out: Path, marker: str, overwrite: bool) -> None:
    """Before long work: raises OutputError where `output_directory` would."""
    _check_free(Path(os.path.abspath(out)), marker, overwrite)


def _check_free(out: Path, marker: str, overwrite: bool) -> None:
    if not os.path.lexists(out) or (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        return
    if out.is_symlink() or not (out / marker).is_file():
        raise OutputError(f"{out} exists and is not what this command writes (no {marker}); choose another path")
    if not overwrite:
        raise OutputError(f"{out} exists; choose another path, or replace it with --overwrite")


def _swap(partial: Path, out: Path) -> None:
    """A killed process leaves the old directory or the new one; between the two renames, the old under another name."""
    if not out.exists():
        partial.rename(out)
        return
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(out: Path) -> None:
    """Clear away what killed processes left; put back an old directory whose replacement never came."""
    for path in out.parent.glob(f".{glob.escape(out.name)}.*-*"):
        kind, _, process = path.name.removeprefix(f".{out.name}.").rpartition("-")
        if kind not in ("partial", "old") or not process.isdigit() or _alive(int(process)):
            continue
        if kind == "old" and not out.exists():
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    """Whether another process has this id; in a container the next run has its predecessor's own."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
