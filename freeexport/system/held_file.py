"""A file that says by a lock on it that the process which made it is alive, wherever it runs.

Process ids say nothing among containers that share a volume. A lock (flock) belongs to the open file: it is gone when
its process is, however that ends, and it is seen by all that share the volume, over NFS too.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows: nothing is ever held, and nothing taken
    fcntl = None

# The file system has no locks: then nobody can tell whether a file is held.
_WITHOUT_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EBADF)


class HeldFile:
    """An empty file whose lock this process holds until it removes it, or ends."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor

    @classmethod
    def create(cls, path: Path) -> HeldFile | None:
        """A new file, held. None where another process took it away before it was: try another name. Where the file
        system has no locks the file is made all the same, and none takes it."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if _lock(descriptor) is False or not _is_at(descriptor, path):
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
        if _lock(descriptor) is not True or not _is_at(descriptor, path):
            os.close(descriptor)
            return None
        return cls(path, descriptor)

    def remove(self) -> None:
        """Remove the file and let go of the lock."""
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


def _lock(descriptor: int) -> bool | None:
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
