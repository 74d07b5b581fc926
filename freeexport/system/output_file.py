"""A file that appears complete or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import OptionError

# What a full disk, a quota, or a limit of file sizes gives; libraries in Rust tell the number in their text.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an error of writing that names no file this one's name: that of what the user asked for."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in _NO_ROOM:
            error.filename = str(path)
        raise
    except Exception as error:
        found = _RUST_ERROR.search(str(error))
        if found is None or int(found[1]) not in _NO_ROOM:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives where to write what then replaces the file at `path`: the old one until it is the new one, which is on
    the disk before."""
    # Process ids alone are not unique among containers that share a volume.
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with naming(path):
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
