from __future__ import annotations

import io
import sys
from time import sleep

import pytest

from freeexport.system import progress as progress_module
from freeexport.system.progress import progress, progress_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ((0, 200, 30, None), "decoding: 0 of 200 (0%), 30 s so far"),
        ((40, 200, 60, 240), "decoding: 40 of 200 (20%), 60 s so far, about 4 min left"),
        ((0, None, 30, None), "decoding: 30 s so far"),
        ((3, None, 150, None), "decoding: 3 done, 2 min so far"),
    ],
)
def test_progress_line_shows_task_share_and_time(
    given: tuple[float, float | None, float, float | None], line: str
) -> None:
    assert progress_line("decoding", *given) == line


def test_estimate_of_remaining_time_ignores_work_done_before(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "EVERY", 0.05)
    now = [1000.0]
    monkeypatch.setattr("freeexport.system.progress.time.monotonic", lambda: now[0])
    with progress("decoding", 200, 100) as advance:
        advance(10)
        now[0] += 60
        sleep(0.2)
    assert "decoding: 110 of 200 (55%), 60 s so far, about 9 min left\n" in capsys.readouterr().err


def test_closed_output_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "EVERY", 0.01)
    for stderr in (Gone(), None):
        monkeypatch.setattr(sys, "stderr", stderr)
        with progress("work", 2) as advance:
            sleep(0.05)
            advance()


def test_short_work_is_silent_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress("shallow.onnx", total=2) as advance:
        advance()
    with pytest.raises(MemoryError), progress("work"):
        raise MemoryError
    assert capsys.readouterr() == ("", "")


def test_count_is_shown_on_a_terminal_and_piped_output_is_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
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
