"""Files and directories that appear whole or not at all, and what is never replaced."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from killed_process import killed_before

from freeexport.system.output import OutputError, output_directory

MARKER = "marker.json"
STEPS = {Path: ("rename", "mkdir", "unlink"), os: ("open", "write", "fsync", "unlink", "rmdir")}
Writer = Callable[[str], subprocess.Popen[str]]


def write(out: Path, text: str, overwrite: bool = False, then: Callable[[], None] = lambda: None) -> None:
    with output_directory(out, MARKER, overwrite) as directory:
        (directory / MARKER).write_text(text)
        then()


def listing(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# Begins to write the directory, and waits.
WRITER = """
import sys, time
from pathlib import Path
from freeexport.system.output import output_directory
with output_directory(Path(sys.argv[1]), "marker.json", True) as directory:
    (directory / "marker.json").write_text("half")
    print("begun", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    """A process that is writing a directory."""
    processes = []

    def begin(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WRITER, str(tmp_path / name)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def test_directory_appears_when_the_block_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with output_directory(Path("a/out"), MARKER, overwrite=False) as directory:
        assert directory.parent == tmp_path / "a"
        (directory / MARKER).write_text("x")
        assert not (tmp_path / "a" / "out").exists()
        monkeypatch.chdir("/")
    assert (tmp_path / "a" / "out" / MARKER).read_text() == "x"
    assert listing(tmp_path / "a") == {"out"}


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [True, False])
def test_error_leaves_the_old_output_unchanged(old: bool, error: BaseException, tmp_path: Path) -> None:
    def fail() -> None:
        raise error

    if old:
        write(tmp_path / "out", "old")
    with pytest.raises(type(error)):
        write(tmp_path / "out", "new", overwrite=True, then=fail)
    assert listing(tmp_path) == ({"out"} if old else set())
    assert not old or (tmp_path / "out" / MARKER).read_text() == "old"


def test_older_output_is_replaced_only_on_request_and_an_empty_directory_always(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "more").write_text("x")
    with pytest.raises(OutputError, match="--overwrite"):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out" / MARKER).read_text() == "old"
    write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / MARKER).read_text() == "new"
    assert listing(tmp_path) == {"out"}
    assert listing(tmp_path / "out") == {MARKER}


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
def test_foreign_files_are_never_replaced(put: Callable[[Path], None], overwrite: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    put(out)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="choose another path"):
        write(out, "new", overwrite)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_output_created_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        write(tmp_path / "out", "new", overwrite=True, then=lambda: put_directory(tmp_path / "out"))
    assert listing(tmp_path / "out") == {"thesis.txt"}
    assert listing(tmp_path) == {"out"}
    with pytest.raises(OSError, match=r"thesis\.txt"):
        write(tmp_path / "out" / "thesis.txt" / "out", "x")


def test_only_one_process_writes_and_leftovers_of_a_killed_one_are_removed(writer: Writer, tmp_path: Path) -> None:
    write(tmp_path / "out[1]*?", "old")
    process = writer("out[1]*?")
    with pytest.raises(OutputError, match=r"another process writes to .*out\[1\]\*\?; wait for it, or choose another"):
        write(tmp_path / "out[1]*?", "x", overwrite=True)
    assert process.poll() is None
    assert len(listing(tmp_path)) == 3
    process.kill()
    process.wait()
    assert (tmp_path / "out[1]*?" / MARKER).read_text() == "old"
    write(tmp_path / "out[1]*?", "x", overwrite=True)
    assert listing(tmp_path) == {"out[1]*?"}
    assert (tmp_path / "out[1]*?" / MARKER).read_text() == "x"


def test_kill_at_any_step_leaves_the_old_or_new_output_for_the_next_run(tmp_path: Path) -> None:
    seen, killed, step = set(), True, 0
    while killed:
        write(tmp_path / "out", "old", overwrite=True)
        killed = killed_before(step, STEPS, lambda: write(tmp_path / "out", "new", overwrite=True))
        with pytest.raises(OutputError, match="--overwrite"):
            write(tmp_path / "out", "next")
        seen.add((tmp_path / "out" / MARKER).read_text())
        assert listing(tmp_path) == {"out"}
        step += 1
    assert seen == {"old", "new"}
    assert step > 10


def test_failed_rename_restores_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "old")
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(5, "no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"):
        write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / MARKER).read_text() == "old"
    assert listing(tmp_path) == {"out"}


def test_directory_replaced_at_the_last_moment_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write(out, "old")
    rename = Path.rename

    def late(path: Path, target: Path) -> Path:
        if path == out and target.name == ".out.old":
            shutil.rmtree(out)
            put_directory(out)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(OutputError, match="was not written by this command"):
        write(out, "new", overwrite=True)
    assert listing(out) == {"thesis.txt"}
    assert listing(tmp_path) == {"out"}


def test_files_are_synced_before_they_are_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_ino), fsync(descriptor)))
    with output_directory(tmp_path / "out", MARKER, overwrite=False) as directory:
        (directory / "folder").mkdir()
        (directory / "folder" / "file").write_text("x")
        inodes = [path.stat().st_ino for path in (directory, *directory.rglob("*"), tmp_path)]
    assert set(inodes) == set(synced)
    assert synced[-1] == tmp_path.stat().st_ino


def test_leftover_lock_file_is_named_if_locks_are_unsupported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("freeexport.system.output.lock_file", refuse)
    with output_directory(tmp_path / "out", MARKER, overwrite=False) as directory:
        (directory / MARKER).write_text("x")
        with pytest.raises(OutputError, match=r"remove .*\.out\.lock if none does"):
            write(tmp_path / "out", "y")
    assert listing(tmp_path) == {"out"}
