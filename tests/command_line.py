"""Runs the command line in the test process."""

from __future__ import annotations

from typing import Any

from click.testing import CliRunner, Result

from freeexport.cli import main


def invoke(*arguments: object, **given: Any) -> Result:
    """Run a command. `given` is passed to CliRunner."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **given)


def succeed(*arguments: object, **given: Any) -> Result:
    """Run a command that must succeed."""
    result = invoke(*arguments, **given)
    assert result.exit_code == 0, result.output
    return result


def error(result: Result) -> str:
    """Return the error line of a failed command. Asserts that there is one, besides warnings, and no crash."""
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("warning")]
    assert line.startswith("error: ")
    assert "bug" not in line
    return line
