"""Files read in large pages, by the kernel's own account, and arrays that cost the memory of what was written."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import CASES, Bundles

from runtime import Session
from runtime.engines import backend
from runtime.engines.kernels import missing
from runtime.machine.machine import LARGE, lazy_zeros, read_in_large_pages, write_back

SIZE = 8 << 20

resource = pytest.importorskip("resource")  # not on Windows

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")


def mapped_kilobytes(path: Path, name: str) -> int:
    """A figure of /proc/self/smaps for a mapping of the whole file, every page of it touched."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[start] for start in range(0, SIZE, 4096)) >= 0
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        assert any(str(path) in line for line in lines)
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def weights(path: Path) -> bytes:
    content = os.urandom(SIZE)
    with path.open("wb") as file:
        for start in range(0, SIZE, 5000):  # as a file grows that is written in pieces
            file.write(content[start : start + 5000])
            file.flush()
    return content


def test_file_on_disk_is_mapped_in_2_mib_pages(tmp_path: Path) -> None:
    path = tmp_path / "weights.data"
    content = weights(path)
    before = mapped_kilobytes(path, "FilePmdMapped")
    write_back(path)
    read_in_large_pages(path)
    after = mapped_kilobytes(path, "FilePmdMapped")
    assert path.read_bytes() == content
    assert mapped_kilobytes(path, "Rss") == SIZE >> 10
    if after == 0:
        pytest.skip("this file system, or this kernel, has no large pages")
    assert before < after == SIZE >> 10


@pytest.mark.parametrize(
    ("writable", "failed", "reads"),
    [(True, False, 0), (False, False, 1), (True, True, 1)],
    ids=["in memory", "the kernel does not tell", "no mincore"],
)
def test_file_in_memory_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: bool, failed: bool, reads: int
) -> None:
    path = tmp_path / "weights.data"
    path.write_bytes(os.urandom(SIZE))
    libc = ctypes.CDLL(None)
    sizes: list[int] = []
    fake = SimpleNamespace(
        mincore=(lambda *_: -1) if failed else libc.mincore,
        madvise=lambda start, size, advice: sizes.append(size.value),
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
    monkeypatch.setattr(os, "access", lambda path, mode: writable)
    read_in_large_pages(path)
    assert sizes == [SIZE] * reads


def test_unreadable_files_are_ignored(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    for path in (empty, tmp_path, tmp_path / "none"):
        read_in_large_pages(path)
        write_back(path)


@pytest.mark.skipif(missing() is not None, reason="freeexport's kernels are not built")
def test_weights_of_our_kernels_are_read_in_large_pages(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle(CASES[0], 1, precision="int8", kernels="freeexport")
    read: list[Path] = []
    monkeypatch.setattr(backend, "read_in_large_pages", read.append)
    with Session(path, threads=1, slots=1) as session:
        assert read == [path / "weights.data"]
        assert session.generate([5, 6, 7], max_new_tokens=4, mode="full").token_ids


MB = 1 << 20


def test_unwritten_parts_of_an_array_take_no_memory() -> None:
    size = 64 * MB
    assert size > LARGE
    before = resident()
    array = lazy_zeros((64, MB), np.uint8)
    array[:, 0] = 1
    assert resident() - before < 8 * MB
    assert array.sum() == 64


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
