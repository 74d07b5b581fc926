from __future__ import annotations

import io
import sys
from time import sleep

import pytest

from freeexport.system import progress as progress_module
from freeexport.system.progress import Work, duration, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("total", "done", "gained", "seconds", "line"),
    [
        (200, 0, 0, 30, "decoding: 0 of 200 (0%), 30 s so far"),
        (200, 0, 40, 60, "decoding: 40 of 200 (20%), 60 s so far, about 4 min left"),
        (200, 0, 41, 90, "decoding: 41 of 200 (20%), 90 s so far, about 6 min left"),
        # What was done before does not make the rest look short.
        (200, 100, 0, 30, "decoding: 100 of 200 (50%), 30 s so far"),
        (200, 100, 10, 60, "decoding: 110 of 200 (55%), 60 s so far, about 9 min left"),
        (None, 0, 0, 30, "decoding: 30 s so far"),
        (None, 0, 3, 150, "decoding: 3 done, 2 min so far"),
    ],
)
def test_a_line_is_what_how_far_and_how_long(
    total: float | None, done: float, gained: float, seconds: float, line: str
) -> None:
    now = [1000.0]
    work = Work("decoding", total, done, clock=lambda: now[0])
    work.advance(gained)
    now[0] += seconds
    assert work.line() == line


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
    assert "100%" in terminal.getvalue()
    assert "a result" not in terminal.getvalue()


def test_an_error_in_the_block_is_passed_on() -> None:
    with pytest.raises(MemoryError), progress("work"):
        raise MemoryError
