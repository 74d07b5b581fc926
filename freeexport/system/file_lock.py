"""Lock an open file against other processes: flock, or msvcrt's locks on Windows."""

from __future__ import annotations

import os
import sys

if sys.platform == "win32":
    import msvcrt

    # Locked bytes cannot be read by others, so the lock is on a byte after the content.
    _LOCKED_BYTE = 1 << 20

    def lock_file(descriptor: int) -> None:
        """Lock a file until its descriptor is closed."""
        at = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(error.errno, error.strerror) from None
        finally:
            os.lseek(descriptor, at, os.SEEK_SET)

else:
    import fcntl

    def lock_file(descriptor: int) -> None:
        """Lock a file until its descriptor is closed.

        Raises:
            BlockingIOError: If another process holds the lock.
            OSError: If the file system has no locks.
        """
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
