"""A directory that appears complete or not at all, and never in place of something that is not ours."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from freeexport.system.output_file import naming
from runtime.errors import FreeExportError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows: nothing is ever held, and nothing taken
    fcntl = None

# The file system has no locks: then nobody can tell whether a file is held.
_WITHOUT_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EBADF)
# A kernel, a C library or a file system that cannot exchange: ENOTSUP on some network file systems, EXDEV for a
# directory that an overlay has from a layer below.
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EPERM)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class OutputError(FreeExportError):
    """Something stands where a command wants to write."""


@contextmanager
def output_directory(out: Path, marker: str, overwrite: bool, sync: bool = True) -> Iterator[Path]:
    """Yield an empty directory beside `out` that takes its name when the block ends without an error.

    What stands at `out` is replaced only with `overwrite`, and only if it holds the file `marker`. The two change
    places in one step, so that there is always the old one or the new one, whole; where the system cannot do that
    there is none for a moment, and a process that is killed in it leaves the old one beside, which the next call puts
    back. `sync`: everything is on the disk before. Raises OutputError.

    A process holds a lock file while its directory stands beside `out`: what nobody holds was left by one that was
    killed, on whatever machine or in whatever container, and is removed by the next call.
    """
    out = Path(os.path.abspath(out))
    _remove_abandoned(out)
    check_output(out, marker, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _held(out) as token:
        partial = _beside(out, "partial", token)
        try:
            partial.mkdir()
            with naming(out):
                yield partial
            check_output(out, marker, overwrite)
            if sync:
                for place, _, names in os.walk(partial):
                    for path in (*names, ""):
                        _sync(Path(place, path))
            _swap(partial, out, marker, token)
            _sync(out.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_output(out: Path, marker: str, overwrite: bool) -> None:
    """Before long work: raises OutputError where `output_directory` would."""
    out = Path(os.path.abspath(out))
    if not os.path.lexists(out) or _is_empty(out):
        return
    if not _is_ours(out, marker):
        raise _not_ours(out, marker)
    if not overwrite:
        raise OutputError(f"{out} exists; choose another path, or replace it with --overwrite")


def _is_empty(out: Path) -> bool:
    return out.is_dir() and not out.is_symlink() and not any(out.iterdir())


def _is_ours(directory: Path, marker: str) -> bool:
    return not directory.is_symlink() and (directory / marker).is_file()


def _not_ours(out: Path, marker: str) -> OutputError:
    return OutputError(f"{out} exists and is not what this command writes (no {marker}); choose another path")


def _swap(partial: Path, out: Path, marker: str, token: str) -> None:
    """Give `out` to the new directory; what came there since it was looked at, and is not ours, is put back."""
    if not os.path.lexists(out) or _is_empty(out):
        partial.rename(out)  # over an empty directory too
    elif exchange(partial, out):
        if not _is_ours(partial, marker):
            exchange(partial, out)
            raise _not_ours(out, marker)
    else:
        old = _beside(out, "old", token)
        out.rename(old)
        try:
            if not _is_ours(old, marker):
                raise _not_ours(out, marker)
            partial.rename(out)
        except (OSError, OutputError):
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Whether they changed places; False where the system cannot do it, and nothing has changed. Raises OSError."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # no such function; TypeError: not a POSIX system
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _beside(out: Path, kind: str, token: str) -> Path:
    return out.parent / f".{out.name}.{kind}-{token}"


@contextmanager
def _held(out: Path) -> Iterator[str]:
    """A name for what stands beside `out` that no other process has, while its lock file is held.

    Process ids say nothing among containers that share a volume. A lock (flock) belongs to the open file: it is gone
    when its process is, however that ends, and it is seen by all that share the volume, over NFS too.
    """
    descriptor = None
    while descriptor is None:  # another process may take the file away before it is held
        token = secrets.token_hex(8)
        lock = _beside(out, "lock", token)
        descriptor = _locked(lock, os.O_CREAT | os.O_EXCL, without=True)
    try:
        yield token
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path, flags: int, without: bool) -> int | None:
    """The open file whose lock is now held; None where another process holds it or has removed it. `without`: count it
    as held where there are no locks."""
    descriptor = os.open(path, os.O_RDWR | flags, 0o666)
    held = without
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
    except OSError as error:
        held = without and error.errno in _WITHOUT_LOCKS
    with suppress(FileNotFoundError):
        if held and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    os.close(descriptor)
    return None


def _remove_abandoned(out: Path) -> None:
    """Clear away what killed processes left; put back an old directory whose replacement never came."""
    for lock in out.parent.glob(f".{glob.escape(out.name)}.lock-*"):
        token = lock.name.rpartition("-")[2]
        if not re.fullmatch(r"[0-9a-f]{16}", token):
            continue
        descriptor = None
        with suppress(OSError):
            descriptor = _locked(lock, getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), without=False)
        if descriptor is None:
            continue
        old = _beside(out, "old", token)
        if old.exists() and not os.path.lexists(out):
            old.rename(out)
        for left in (old, _beside(out, "partial", token)):
            shutil.rmtree(left, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _sync(path: Path) -> None:
    """On the disk. Without it a crash of the machine can leave the name and no content."""
    if path.is_symlink() or not (path.is_dir() or path.is_file()):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # of directories not every file system knows
            raise
    finally:
        os.close(descriptor)
