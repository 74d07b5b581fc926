from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from freeexport.output_directory import OutputError, output_directory

MARKER = "marker.json"


def write(out: Path, text: str, overwrite: bool = False, then: Callable[[], None] = lambda: None) -> None:
    with output_directory(out, MARKER, overwrite) as directory:
        (directory / MARKER).write_text(text)
        then()


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def listing(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.fixture(scope="module")
def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    with output_directory(tmp_path / "out", MARKER, overwrite=False) as directory:
        assert directory.parent == tmp_path
        (directory / MARKER).write_text("x")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / MARKER).read_text() == "x"
    assert listing(tmp_path) == {"out"}


def test_parents_are_made(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "out", "x")
    assert (tmp_path / "a" / "b" / "out" / MARKER).read_text() == "x"


def test_a_relative_path_is_meant_where_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with output_directory(Path("out"), MARKER, overwrite=False) as directory:
        (directory / MARKER).write_text("x")
        monkeypatch.chdir("/")
    assert (tmp_path / "out" / MARKER).is_file()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [True, False])
def test_an_error_leaves_what_was_there(old: bool, error: type[BaseException], tmp_path: Path) -> None:
    if old:
        write(tmp_path / "out", "old")
    with pytest.raises(error):
        write(tmp_path / "out", "new", overwrite=True, then=raising(error()))
    assert listing(tmp_path) == ({"out"} if old else set())
    assert not old or (tmp_path / "out" / MARKER).read_text() == "old"


def test_an_older_output_is_replaced_only_when_asked(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "more").write_text("x")
    with pytest.raises(OutputError, match="--overwrite"):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out" / MARKER).read_text() == "old"
    write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / MARKER).read_text() == "new"
    assert listing(tmp_path) == {"out"}
    assert listing(tmp_path / "out") == {MARKER}


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "x")
    assert (tmp_path / "out" / MARKER).read_text() == "x"
    assert listing(tmp_path) == {"out"}


def put_directory(out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")


def put_file(out: Path) -> None:
    out.write_text("years of work")


def put_link(out: Path) -> None:
    write(out.parent / "target", "years of work")
    out.symlink_to(out.parent / "target")


def put_broken_link(out: Path) -> None:
    out.symlink_to(out.parent / "nowhere")


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("put", [put_directory, put_file, put_link, put_broken_link])
def test_what_is_not_ours_is_never_replaced(put: Callable[[Path], None], overwrite: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    put(out)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="choose another path"):
        write(out, "new", overwrite)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        write(tmp_path / "out", "new", overwrite=True, then=lambda: put_directory(tmp_path / "out"))
    assert listing(tmp_path / "out") == {"thesis.txt"}
    assert listing(tmp_path) == {"out"}


def test_a_parent_that_is_a_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    put_file(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        write(tmp_path / "file" / "out", "x")
    assert listing(tmp_path) == {"file"}


@pytest.mark.parametrize("name", ["out", "out[1]*?"])
def test_what_a_killed_process_left_is_cleared_away(name: str, tmp_path: Path, dead: int) -> None:
    left = tmp_path / f".{name}.partial-{dead}"
    put_directory(left)
    write(tmp_path / name, "x")
    assert listing(tmp_path) == {name}


def test_what_a_process_of_the_same_id_left_is_cleared_away(tmp_path: Path) -> None:
    # In a container every run may have the same id.
    put_directory(tmp_path / f".out.partial-{os.getpid()}")
    write(tmp_path / "out", "x")
    assert listing(tmp_path) == {"out"}
    assert listing(tmp_path / "out") == {MARKER}


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".out.partial-{os.getppid()}"
    put_directory(other)
    write(tmp_path / "out", "x")
    assert listing(other) == {"thesis.txt"}


def test_an_old_output_whose_replacement_never_came_is_put_back(tmp_path: Path, dead: int) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / f".out.old-{dead}")
    # It counts as standing there from the beginning, not only after hours of work.
    with pytest.raises(OutputError, match="--overwrite"):
        write(tmp_path / "out", "new", then=raising(AssertionError("begun")))
    assert (tmp_path / "out" / MARKER).read_text() == "old"
    assert listing(tmp_path) == {"out"}


def test_an_old_output_whose_replacement_came_is_cleared_away(tmp_path: Path, dead: int) -> None:
    write(tmp_path / "out", "newer")
    put_directory(tmp_path / f".out.old-{dead}")
    write(tmp_path / "out", "newest", overwrite=True)
    assert listing(tmp_path) == {"out"}


@pytest.mark.parametrize("name", [".out.partial-abc", ".out.backup-1", ".other.partial-1", "out.partial-1", ".out.x"])
def test_names_that_only_look_alike_are_left_alone(name: str, tmp_path: Path) -> None:
    put_directory(tmp_path / name)
    write(tmp_path / "out", "x")
    assert listing(tmp_path) == {"out", name}
