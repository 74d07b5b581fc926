"""Write files and directories completely or not at all, and never replace foreign ones."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from freeexport.system.file_lock import lock_file
from runtime.errors import FreeExportError, OptionError

# A full disk, a quota, a file size limit, or a read-only file system. Libraries written in Rust
# have the number in their message.
_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
_NUMPY_ERROR = re.compile(r"\d+ requested and \d+ written")
_LOCKED = b"freeexport writes beside this file\n"


class OutputError(FreeExportError):
    """The output path is occupied, or another process writes to it."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to write errors that name no file."""
    try:
        yield
    except Exception as error:
        named = writing_error(error)
        if named is None:
            raise
        if named.filename is None:
            named.filename = str(path)
        if named is error:
            raise
        raise named from error


def writing_error(error: BaseException) -> OSError | None:
    """Find the system error that caused an exception of any library, if a file was not written."""
    cause: BaseException | None = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) else None
        if number is None and (message := _RUST_ERROR.search(str(cause))) is not None:
            number = int(message[1])
        if number is None and _NUMPY_ERROR.fullmatch(str(cause)):
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if number in _NOT_WRITTEN:
            return cause if isinstance(cause, OSError) else OSError(number, os.strerror(number))
        cause = cause.__cause__ or cause.__context__
    return None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path. Its file is flushed to disk and then replaces `path` atomically."""
    # Process ids alone are not unique among containers that share a volume.
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with naming(path):
            yield partial
        _sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Replace the file at `path` by a text, atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Hard-link a file, or copy it if the file system cannot."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def check_writable(path: Path | None, option: str) -> None:
    """Check the path given for `option`, before long work."""
    if path is not None and not path.parent.is_dir():
        raise OptionError(f"{option}: directory {path.parent} does not exist; create it first")


@contextmanager
def output_directory(out: Path, marker: str, overwrite: bool, sync: bool = True) -> Iterator[Path]:
    """Yield an empty directory beside `out`, which is renamed to `out` if the block succeeds.

    An existing directory is replaced only with `overwrite`, and only if it contains the file
    `marker`. It is renamed first. If the process is killed between the two renames, the next call
    restores it. With `sync` all files are flushed to disk before the rename.

    Raises:
        OutputError: If `out` may not be replaced, or another process writes to it.
    """
    out = Path(os.path.abspath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    with _held(out):
        check_output(out, marker, overwrite)
        partial = _beside(out, "partial")
        partial.mkdir()
        try:
            with naming(out):
                yield partial
            check_output(out, marker, overwrite)
            if sync:
                for place, _, names in os.walk(partial):
                    for name in (*names, ""):
                        _sync(Path(place, name))
            _swap(partial, out, marker)
            _sync(out.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_output(out: Path, marker: str, overwrite: bool) -> None:
    """Check, before long work, that `output_directory` will accept `out`."""
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
    return OutputError(
        f"{out} exists and was not written by this command (no {marker}); choose another path"
    )


def _beside(out: Path, kind: str) -> Path:
    return out.parent / f".{out.name}.{kind}"


def _swap(partial: Path, out: Path, marker: str) -> None:
    """Rename the new directory to `out`.

    A foreign directory that appeared there meanwhile is restored.
    """
    if not os.path.lexists(out) or _is_empty(out):
        partial.rename(out)  # also replaces an empty directory
        return
    old = _beside(out, "old")
    out.rename(old)
    try:
        if not _is_ours(old, marker):
            raise _not_ours(out, marker)
        partial.rename(out)
    except (OSError, OutputError):
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Hold the lock file beside `out`, and remove what a killed process left.

    A lock belongs to the open file, so it is released however its process ends. It is
    visible to all processes that share the volume, including containers and NFS clients, where
    process ids are meaningless.
    """
    lock, partial, old = (_beside(out, kind) for kind in ("lock", "partial", "old"))
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(lock, flags, 0o666)
    try:
        left = os.read(descriptor, len(_LOCKED))
        if left not in (b"", _LOCKED):
            raise OutputError(
                f"{lock} exists and is not a lock of this command; move it, or choose another path"
            )
        _lock(descriptor, lock, bool(left))
        if left:
            if old.exists() and not os.path.lexists(out):
                old.rename(out)
            for path in (partial, old):
                shutil.rmtree(path, ignore_errors=True)
        else:
            os.write(descriptor, _LOCKED)
        try:
            yield
        finally:
            with suppress(PermissionError):  # Windows removes only closed files
                lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
        if os.name == "nt":
            with suppress(PermissionError):  # another process has opened it
                lock.unlink(missing_ok=True)


def _lock(descriptor: int, lock: Path, left: bool) -> None:
    out = lock.with_name(lock.name[1:].removesuffix(".lock"))
    try:
        lock_file(descriptor)
        held = os.path.samestat(os.fstat(descriptor), os.stat(lock))
    except (BlockingIOError, FileNotFoundError):
        held = False
    except OSError:
        # Without locks a running process cannot be distinguished from one that was killed.
        if left:
            raise OutputError(
                f"another process writes to {out}, or was killed: remove {lock} if none does"
            ) from None
        return
    if not held:
        raise OutputError(f"another process writes to {out}; wait for it, or choose another path")


def _sync(path: Path) -> None:
    """Flush a file or directory to disk.

    Otherwise a system crash may leave its name without content.
    """
    if path.is_symlink() or not (path.is_dir() or path.is_file()):
        return
    if os.name == "nt" and path.is_dir():  # Windows opens no directories
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot flush directories
            raise
    finally:
        os.close(descriptor)
