"""The line that a command that failed must print."""

from __future__ import annotations

from click.testing import Result


def error(result: Result) -> str:
    """The one error line of a command that failed, warnings aside; a crash is not one."""
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("warning")]
    assert line.startswith("error: ")
    assert "bug" not in line
    return line
