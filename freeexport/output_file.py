"""A file that appears complete or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import OptionError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives where to write what then replaces the file at `path`: the old one until it is the new one, which is on
    the disk before."""
    # Process ids alone are not unique among containers that share a volume.
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Replace the file at `path` by this text."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_writable(path: Path | None, option: str) -> None:
    """Before long work. Raises OptionError where `option` names a file in no directory."""
    if path is not None and not path.parent.is_dir():
        raise OptionError(f"{option}: there is no directory {path.parent}; make it first")
