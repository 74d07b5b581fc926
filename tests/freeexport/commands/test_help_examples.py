"""Every example of `--help` is one that its verb takes, and names exits and metrics that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from help_examples import examples

from freeexport import cli
from freeexport.checkpoints.ready_made import find_exit

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("line", [line for line in examples() if not line.startswith("curl ")])
def test_help_examples_are_accepted_by_their_command(line: str) -> None:
    _, _, given = line.partition("freeexport ")
    verb, *arguments = shlex.split(given)
    command = cli.main.get_command(click.Context(cli.main), verb)
    assert command is not None, line
    # Unknown options and choices, missing arguments and values of a wrong kind are usage errors.
    with command.make_context(verb, arguments) as context:
        if context.params.get("exit_") is not None:
            find_exit(context.params["exit_"])


def test_every_exit_named_in_a_page_is_included() -> None:
    named = dict[str, str]()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for name in re.findall(r"--exit ([a-z0-9][a-z0-9-]*)\b(?![./])", path.read_text(encoding="utf-8")):
            named[name] = path.name
    assert named
    for name in named:
        find_exit(name)
