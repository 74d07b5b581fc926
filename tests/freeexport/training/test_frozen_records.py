"""The records of a frozen teacher, on disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from freeexport.training.frozen import _records

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system reserves no room")


def test_disk_space_of_records_is_reserved_before_writing(tmp_path: Path) -> None:
    mapped = _records(path := tmp_path / "states.npy", np.dtype([("states", np.float32, 100)]), 1000)
    assert len(mapped) == 1000
    assert path.stat().st_blocks * 512 >= mapped.nbytes  # not a hole, which the disk may have no room for


def test_full_disk_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space") as caught:
        _records(path := tmp_path / "states.npy", np.dtype(np.float32), 1000)
    assert caught.value.filename == str(path)
