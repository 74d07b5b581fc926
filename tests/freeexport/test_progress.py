from __future__ import annotations

import io
import sys

import pytest

from freeexport.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_silent_where_stderr_is_not_a_terminal(
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
