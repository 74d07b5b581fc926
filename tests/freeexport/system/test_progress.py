from __future__ import annotations

import io
import os
import sys
import threading
from pathlib import Path
from time import sleep

import pytest

from freeexport.system import progress as progress_module
from freeexport.system.child import ChildError, run_child
from freeexport.system.progress import duration, plain_progress, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Halves:
    """A clock and a timer in one: half a minute passes when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self._over, self._go, self._waiting = False, threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self) -> float:
        return self.now

    def wait(self, timeout: float) -> bool:
        self._waiting.release()
        assert self._go.acquire(timeout=10)
        self.now += timeout
        return self._over

    def set(self) -> None:
        self._over = True
        self._go.release()

    def pass_one(self) -> None:
        """Returns after what is written at its end was written."""
        assert self._waiting.acquire(timeout=10)
        self._go.release()
        assert self._waiting.acquire(timeout=10)
        self._waiting.release()


def test_a_plain_line_every_half_minute_says_what_how_far_and_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    time = Halves()
    with plain_progress("decoding", 200, clock=time, timer=time) as advance:
        time.pass_one()
        advance(40)
        time.pass_one()
        advance()
        for _ in range(3):
            time.pass_one()
    assert capsys.readouterr() == (
        "",
        "decoding: 0 of 200 (0%), 30 s so far\n"
        "decoding: 40 of 200 (20%), 60 s so far, about 4 min left\n"
        "decoding: 41 of 200 (20%), 90 s so far, about 6 min left\n"
        "decoding: 41 of 200 (20%), 2 min so far, about 8 min left\n"
        "decoding: 41 of 200 (20%), 2 min so far, about 10 min left\n",
    )


def test_work_done_before_does_not_make_the_rest_look_short(capsys: pytest.CaptureFixture[str]) -> None:
    time = Halves()
    with plain_progress("decoding", 200, 100, clock=time, timer=time) as advance:
        time.pass_one()
        advance(10)
        time.pass_one()
    assert capsys.readouterr().err.splitlines() == [
        "decoding: 100 of 200 (50%), 30 s so far",
        "decoding: 110 of 200 (55%), 60 s so far, about 9 min left",
    ]


def test_work_without_an_end_says_for_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    time = Halves()
    with plain_progress("reference", None, clock=time, timer=time) as advance:
        time.pass_one()
        advance(3)
        time.pass_one()
    assert capsys.readouterr().err == "reference: 30 s so far\nreference: 3 done, 60 s so far\n"


def test_a_reader_that_is_gone_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    monkeypatch.setattr(progress_module, "EVERY", 0.01)
    with progress("work", 2) as advance:
        sleep(0.05)
        advance()
    monkeypatch.setattr(sys, "stderr", None)
    with progress("work", 2) as advance:
        sleep(0.05)
        advance()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5999, "1 h 40 min"), (90000, "25 h 0 min")]
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


CHILD = """
import sys, time
from freeexport.system.progress import progress
with progress("counting", 4) as advance:
    advance(3)
    time.sleep(1)
with progress("more", None):
    time.sleep(0.5)
print("x" * 200_000)
print("warning: hot", file=sys.stderr)
if len(sys.argv) > 1:
    print("error: " + sys.argv[1], file=sys.stderr)
    sys.exit(1)
"""


def test_a_childs_progress_is_its_parents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "counting_child.py").write_text(CHILD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(progress_module, "EVERY", 0.2)
    assert run_child("counting_child") == "x" * 200_000 + "\n"
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("counting: 3 of 4 (75%), ") for line in lines)
    assert any(line.startswith("more: ") for line in lines)
    assert all(line.startswith(("counting: ", "more: ")) for line in lines)
    with pytest.raises(ChildError, match=r"^no luck$"):
        run_child("counting_child", "no luck")
    with pytest.raises(ChildError, match="No module named no_such_child"):
        run_child("no_such_child")


def test_silent_where_stderr_is_not_a_terminal_and_work_is_short(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress("shallow.onnx", total=2) as advance:
        advance()
        advance(1)
    assert capsys.readouterr() == ("", "")


def test_shows_the_count_on_a_terminal_and_leaves_piped_output_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, pipe = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", pipe)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with progress("deep.onnx [fp32]", total=3) as advance:
        print("a result")
        advance(2)
        advance()
    assert pipe.getvalue() == "a result\n"
    assert "deep.onnx [fp32]" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()
    assert "a result" not in terminal.getvalue()


def test_an_error_in_the_block_is_passed_on() -> None:
    with pytest.raises(MemoryError), progress("work"):
        raise MemoryError
