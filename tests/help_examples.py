"""The examples in the help of every verb."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click

from freeexport import cli


def examples() -> Iterator[str]:
    """Yield the lines of all examples, with continued lines joined."""
    context = click.Context(cli.main)
    for command in (cli.main, *(cli.main.get_command(context, verb) for verb in cli.main.list_commands(context))):
        assert command is not None
        _, found, block = re.sub(r"\\\n *", "", command.help or "").partition("Example")
        assert found, command.name
        yield from (line.strip() for line in block.splitlines()[1:] if line.strip())
