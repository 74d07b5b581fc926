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
from contextlib import contextmanager
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

_TEMPORARY = re.compile(r"(partial|old)-([0-9a-f]{16})")


class OutputError(FreeExportError):
    """Something stands where a command wants to write."""


@contextmanager
def output_directory(out: Path, marker: str, overwrite: bool, sync: bool = True) -> Iterator[Path]:
    """Yield an empty directory beside `out` that takes its name when the block ends without an error.

    What stands at `out` is replaced only with `overwrite`, and only if it holds the file `marker`. The two change
    places in one step, so that there is always the old one or the new one, whole; where the system cannot do that
    (see `exchange`) there is none for a moment, and a process that is killed in it leaves the old one beside, which the
    next call puts back. `sync`: everything is on the disk before. Raises OutputError.

    A process holds a lock while its directory stands beside `out`: what nobody holds was left by one that was killed,
    on whatever machine or in whatever container, and is removed by the next call.
    """
    out = Path(os.path.abspath(out))
    _remove_abandoned(out)
    _check_free(out, marker, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _held(out) as token:
        partial = _beside(out, "partial", token)
        try:
            partial.mkdir()
            with naming(out):
                yield partial
            _check_free(out, marker, overwrite)
            if sync:
                _sync_all(partial)
            _swap(partial, out, marker, token)
            _sync(out.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_output(out: Path, marker: str, overwrite: bool) -> None:
    """Before long work: raises OutputError where `output_directory` would."""
    _check_free(Path(os.path.abspath(out)), marker, overwrite)


def _check_free(out: Path, marker: str, overwrite: bool) -> None:
    if not os.path.lexists(out) or _is_empty(out):
        return
    if not _is_ours(out, marker):
        raise _not_ours(out, marker)
    if not overwrite:
        raise OutputError(f"{out} exists; choose another path, or replace it with --overwrite")


def _is_empty(out: Path) -> bool:
    return out.is_dir() and not out.is_symlink() and not any(out.iterdir())


def _swap(partial: Path, out: Path, marker: str, token: str) -> None:
    if not os.path.lexists(out) or _is_empty(out):
        partial.rename(out)  # over an empty directory too
        return
    if not exchange(partial, out):
        _swap_in_two_steps(partial, out, marker, token)
    elif not _is_ours(partial, marker):
        # It came to `out` since that was looked at.
        if not _exchanged(partial, out):
            partial.rename(out.with_name(f"{out.name}.found-{token}"))
        raise _not_ours(out, marker)


def _swap_in_two_steps(partial: Path, out: Path, marker: str, token: str) -> None:
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


def _exchanged(one: Path, other: Path) -> bool:
    try:
        return exchange(one, other)
    except OSError:
        return False


def _is_ours(directory: Path, marker: str) -> bool:
    return not directory.is_symlink() and (directory / marker).is_file()


def _not_ours(out: Path, marker: str) -> OutputError:
    return OutputError(f"{out} exists and is not what this command writes (no {marker}); choose another path")


def _beside(out: Path, kind: str, token: str) -> Path:
    return out.parent / f".{out.name}.{kind}-{token}"


def _lock(out: Path, token: str) -> Path:
    return out.parent / f".{out.name}.lock-{token}"


@contextmanager
def _held(out: Path) -> Iterator[str]:
    """A name for what stands beside `out` that no other process has, while the lock for it is held."""
    while True:
        token = secrets.token_hex(8)
        held = HeldFile.create(_lock(out, token))
        if held is not None:
            break
    try:
        yield token
    finally:
        held.remove()


def _remove_abandoned(out: Path) -> None:
    """Clear away what killed processes left; put back an old directory whose replacement never came."""
    beside = f".{glob.escape(out.name)}."
    for lock in out.parent.glob(f"{beside}lock-*"):
        token = lock.name.rpartition("-")[2]
        if _TEMPORARY.fullmatch(f"partial-{token}") is None:
            continue
        held = HeldFile.take(lock)
        if held is None:
            continue
        old = _beside(out, "old", token)
        if old.exists() and not os.path.lexists(out):
            old.rename(out)
        for left in (old, _beside(out, "partial", token)):
            shutil.rmtree(left, ignore_errors=True)
        held.remove()


def _sync_all(directory: Path) -> None:
    """Everything in a directory is on the disk. Without it a crash of the machine can leave the name and no content."""
    for place, _, names in os.walk(directory):
        for name in names:
            _sync(Path(place, name))
        _sync(Path(place))


def _sync(path: Path) -> None:
    if not path.is_symlink() and (path.is_dir() or path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if not path.is_dir():  # of directories not every file system knows
                raise
        finally:
            os.close(descriptor)


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# A kernel, a C library or a file system that cannot: ENOTSUP on some network file systems, EXDEV for a directory that
# an overlay has from a layer below.
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EPERM)


def exchange(one: Path, other: Path) -> bool:
    """Whether they changed places; False where the system cannot do it, and nothing has changed. Raises OSError."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # no such function; TypeError: not a POSIX system
        return False
    renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


class HeldFile:
    """An empty file whose lock says that the process which made it is alive, wherever it runs.

    Process ids say nothing among containers that share a volume. A lock (flock) belongs to the open file: it is gone
    when its process is, however that ends, and it is seen by all that share the volume, over NFS too.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor

    @classmethod
    def create(cls, path: Path) -> HeldFile | None:
        """A new file, held. None where another process took it away before it was: try another name. Where the file
        system has no locks the file is made all the same, and none takes it."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if _locked(descriptor) is False or not _is_at(descriptor, path):
            os.close(descriptor)
            return None
        return cls(path, descriptor)

    @classmethod
    def take(cls, path: Path) -> HeldFile | None:
        """The file of a process that has ended, now held here; None where it is held, gone, or there are no locks."""
        try:
            descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        except OSError:
            return None
        if _locked(descriptor) is not True or not _is_at(descriptor, path):
            os.close(descriptor)
            return None
        return cls(path, descriptor)

    def remove(self) -> None:
        """Remove the file and let go of the lock."""
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


def _locked(descriptor: int) -> bool | None:
    """Whether this process has the lock; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _WITHOUT_LOCKS:
            return None
        raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that has this name: another process may have removed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
