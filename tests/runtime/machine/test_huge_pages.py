from __future__ import annotations

import ctypes
import mmap
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import CASES
from conftest import Bundles
from hypothesis import given
from hypothesis import strategies as st

from runtime import OptionError, Session
from runtime.machine import huge_pages as module
from runtime.machine.huge_pages import PAGE, HugePages, Region, added, anonymous, whole_pages

MAPS = """\
55d0c0a00000-55d0c0c00000 r-xp 00000000 fd:00 1234                       /usr/bin/python3.11
55d0c1a00000-55d0c1c21000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000400000 rw-p 00000000 00:00 0\x20
7f0000400000-7f0004000000 ---p 00000000 00:00 0\x20
7f1000000000-7f1000800000 rw-p 00000000 fd:00 99                         /models/a b/weights.data
7f2000000000-7f2000800000 rw-s 00000000 00:01 99                         /dev/zero (deleted)
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
"""

places = st.integers(0, 60)
spans = st.lists(st.tuples(places, places).filter(lambda span: span[0] < span[1]), max_size=6)


def units(regions: list[Region]) -> set[int]:
    return {unit for start, end in regions for unit in range(start, end)}


def disjoint(spans: list[Region]) -> list[Region]:
    """In order, without overlaps, as the kernel lists them."""
    marks, found = sorted(units(spans)), list[Region]()
    for unit in marks:
        if found and found[-1][1] == unit:
            found[-1] = (found[-1][0], unit + 1)
        else:
            found.append((unit, unit + 1))
    return found


def test_private_memory_without_a_file_is_found() -> None:
    assert anonymous(MAPS) == [(0x55D0C1A00000, 0x55D0C1C21000), (0x7F0000000000, 0x7F0000400000)]


@given(spans, spans)
def test_what_was_there_before_is_not_touched(after: list[Region], before: list[Region]) -> None:
    found = added(disjoint(after), disjoint(before))
    assert units(found) == units(after) - units(before)
    assert sum(end - start for start, end in found) == len(units(found))


def test_only_whole_pages_are_moved() -> None:
    assert whole_pages([(1, 3 * PAGE + 5), (4 * PAGE, 5 * PAGE), (7 * PAGE + 1, 8 * PAGE)]) == [
        (PAGE, 3 * PAGE),
        (4 * PAGE, 5 * PAGE),
    ]


def huge_bytes(address: int) -> int:
    """Of the region that `address` is in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            start, _, end = first.partition("-")
            inside = int(start, 16) <= address < int(end, 16)
        elif inside and first == "AnonHugePages:":
            return int(line.split()[1]) << 10
    return 0


@pytest.mark.skipif(not module.available(), reason="this system uses no huge pages")
def test_memory_that_came_up_is_moved_and_keeps_what_it_holds() -> None:
    pages = HugePages()
    memory = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(memory, np.uint32)
    array[:] = np.arange(len(array), dtype=np.uint32)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    pages.begin()
    pages.wait()
    # A kernel before 6.1 leaves it to khugepaged, and a full machine may have none.
    if not huge_bytes(address + (32 << 20)):
        pytest.skip("the kernel gave no huge pages")
    np.testing.assert_array_equal(array, np.arange(len(array), dtype=np.uint32))


def test_a_system_that_must_not_use_them_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    monkeypatch.setattr(module, "_ENABLED", tmp_path / "enabled")
    monkeypatch.setattr(module, "_regions", lambda: pytest.fail("looked at the memory"))
    pages = HugePages()
    pages.begin()
    pages.close()


def test_little_memory_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available", lambda: True)
    found = [[(0, PAGE)], [(0, PAGE), (4 * PAGE, 4 * PAGE + module.LEAST - PAGE)]]
    monkeypatch.setattr(module, "_regions", lambda: found.pop(0))
    monkeypatch.setattr(HugePages, "_move", lambda self, regions: pytest.fail("moved"))
    HugePages().begin()
    assert found == []


def test_closing_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a page, not at the end: the memory may be gone by then."""
    reached, go_on, calls = threading.Event(), threading.Event(), list[tuple[int, ...]]()

    def madvise(*arguments: int) -> int:
        calls.append(arguments)
        reached.set()
        go_on.wait(10)
        return 0

    monkeypatch.setattr(module, "available", lambda: True)
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: SimpleNamespace(madvise=madvise))
    found = [list[Region](), [(PAGE, PAGE + 2 * module.LEAST)]]
    monkeypatch.setattr(module, "_regions", lambda: found.pop(0))
    pages = HugePages()
    pages.begin()
    assert reached.wait(10)
    pages._stop.set()
    go_on.set()
    pages.close()
    assert len(calls) == 1


def test_tokens_are_the_same_with_and_without(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle(CASES[0])
    monkeypatch.setattr(module, "LEAST", 0)
    with Session(path, threads=1, slots=1) as session, Session(path, threads=1, slots=1, huge_pages=False) as plain:
        session.settle()
        tokens = [s.generate([5, 6, 7], max_new_tokens=12, mode="full").token_ids for s in (session, plain)]
    assert tokens[0] == tokens[1]
    assert not [thread for thread in threading.enumerate() if thread.name == "huge pages"]


def test_another_value_is_refused(bundle: Bundles) -> None:
    with pytest.raises(OptionError, match="huge_pages is 'yes'; choose True or False"):
        Session(bundle(CASES[0]), huge_pages="yes")
