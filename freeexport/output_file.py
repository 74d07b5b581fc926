"""A file that appears complete or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from runtime.errors import OptionError


def write_whole(path: Path, text: str) -> None:
    """Replace the file at `path`: it is the old one until it is the new one."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: Path | None, option: str) -> None:
    """Before long work. Raises OptionError where `option` names a file in no directory."""
    if path is not None and not path.parent.is_dir():
        raise OptionError(f"{option}: there is no directory {path.parent}; make it first")
