"""The command line in this process."""

from __future__ import annotations

from typing import Any

from click.testing import CliRunner, Result

from freeexport.cli import main


def invoke(*arguments: object, **given: Any) -> Result:
    """Run a verb; `given` are CliRunner's."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **given)


def succeed(*arguments: object, **given: Any) -> Result:
    """Run a verb that must not fail."""
    result = invoke(*arguments, **given)
    assert result.exit_code == 0, result.output
    return result


def error(result: Result) -> str:
    """The one error line of a command that failed, warnings aside; a crash is not one."""
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("warning")]
    assert line.startswith("error: ")
    assert "bug" not in line
    return line
