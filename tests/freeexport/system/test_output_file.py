from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from freeexport import cli
from freeexport.system.output_directory import output_directory
from freeexport.system.output_file import naming, replacing

NO_ROOM = (errno.EFBIG, errno.ENOSPC, errno.EDQUOT)


def in_directory(out: Path) -> None:
    with output_directory(out, "marker", overwrite=False):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


def in_file(out: Path) -> None:
    with replacing(out):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


@pytest.mark.parametrize("write", [in_directory, in_file])
def test_a_file_that_grows_too_large_is_named(tmp_path: Path, write: Callable[[Path], None]) -> None:
    with pytest.raises(OSError, match="File too large") as caught:
        write(tmp_path / "out")
    assert cli.describe(caught.value) == (
        f"{tmp_path}/out: a file grew too large for ulimit -f or the file system; raise the limit, or write elsewhere"
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("number", NO_ROOM)
def test_errors_of_safetensors_are_those_of_the_disk(number: int) -> None:
    text = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
    with pytest.raises(OSError, match=os.strerror(number)) as caught, naming(Path("out")):
        raise SafetensorError(text)
    assert (caught.value.errno, caught.value.filename) == (number, "out")


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "full", "other"), OSError(errno.ENOENT, "none"), ValueError("no (os error 2)"), KeyError()],
)
def test_other_errors_are_left_as_they_are(error: Exception) -> None:
    before = str(error)
    with pytest.raises(type(error)) as caught, naming(Path("out")):
        raise error
    assert caught.value is error
    assert str(error) == before
