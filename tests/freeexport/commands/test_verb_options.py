"""Options of all verbs: one name, one meaning; long helps in sections, rare options apart."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from command_line import invoke

from freeexport import cli
from freeexport.commands.verb_options import REMOVED, REST, SectionedCommand, section

ROOT = Path(__file__).resolve().parents[3]
LONG = ("convert", "calibrate", "train", "generate", "evaluate")


def commands() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(cli.main)
    for verb in cli.main.list_commands(context):
        command = cli.main.get_command(context, verb)
        assert command is not None
        yield verb, command
        for name, inner in getattr(command, "commands", {}).items():
            yield f"{verb} {name}", inner


def options() -> Iterator[tuple[str, click.Option]]:
    for verb, command in commands():
        yield from ((verb, parameter) for parameter in command.params if isinstance(parameter, click.Option))


def kind(option: click.Option) -> Any:
    """Name the values that it takes: a range of numbers is a number."""
    return "flag" if option.is_flag else option.type.name.removesuffix(" range")


def test_option_takes_the_same_type_in_every_command() -> None:
    kinds: dict[str, dict[Any, list[str]]] = defaultdict(lambda: defaultdict(list))
    for verb, option in options():
        for name in option.opts:
            kinds[name][kind(option)].append(verb)
    # A checkpoint of any name, and the name of a demo's.
    different = {name: dict(found) for name, found in kinds.items() if len(found) > 1 and name != "--model"}
    assert different == {}
    assert kinds["--target"] == {"choice": ["convert"]}


@pytest.mark.parametrize("name", ["--threads", "--device", "--samples"])
def test_shared_option_has_one_help_text(name: str) -> None:
    helps = {verb: option.help for verb, option in options() if name in option.opts}
    assert len(helps) > 1
    assert len(set(helps.values())) == 1, helps


def test_every_command_has_short_and_long_help() -> None:
    """Of a verb without rare options they are the same text."""
    for verb, command in commands():
        short, long = (invoke(verb, flag) for flag in ("--help", "--help-all"))
        assert short.exit_code == long.exit_code == 0, verb
        assert "--help-all" in short.output, verb
        rare = any(getattr(option, "rare", False) for option in command.params)
        assert (short.output != long.output) == rare, verb


@pytest.mark.parametrize("verb", LONG)
def test_long_help_lists_every_option_once_in_sections(verb: str) -> None:
    command = dict(commands())[verb]
    CliRunner().invoke(command, ["--help"])  # a run without the group must not change the help
    flag = "--help-all" if any(getattr(option, "rare", False) for option in command.params) else "--help"
    text = invoke(verb, flag, terminal_width=100).output
    _, *sections = text.split("\n\n")
    titles = [part.splitlines()[0] for part in sections if not part.startswith("  ")]
    assert len(titles) >= 5
    assert titles[-1] == f"{REST}:"
    assert f"{REST}:\n  -h, --help" in text
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            first = parameter.opts[0]
            assert sum(line.strip().split(" ")[0].rstrip(",") == first for line in text.splitlines()) == 1, first
            assert parameter.help, first
            assert hasattr(parameter, "section"), first


def test_every_choice_is_explained_in_the_long_help() -> None:
    obvious = {"--schedule", "--lora-preset", "--dtype", "--compute", "--head"}
    for verb, option in options():
        if verb in LONG and isinstance(option.type, click.Choice) and option.opts[0] not in obvious:
            shown = [choice for choice in option.type.choices if choice in (option.metavar or choice)]
            unexplained = [choice for choice in shown if choice not in (option.help or "")]
            assert unexplained == [], (verb, option.opts[0])


def test_options_follow_their_heading_and_rare_ones_appear_only_in_the_long_help() -> None:
    @click.command(cls=SectionedCommand)
    @click.option("--first", help="1.")
    @section("Later")
    @click.option("--second", help="2.")
    @click.option("--hidden", hidden=True)
    @section("Odd things", rare=True)
    @click.option("--third", help="3.")
    @click.option("--fourth", help="4.")
    def command(**given: Any) -> None: ...

    short, long = (CliRunner().invoke(command, [flag]).output for flag in ("--help", "--help-all"))
    later, rest = "Later:\n  --second TEXT  2.\n", f"{REST}:\n  --first TEXT  1.\n"
    assert later in short
    assert rest in short
    assert "--third" not in short
    assert short.endswith("2 more options with --help-all: odd things.\n")
    assert later + "\nOdd things:\n  --third TEXT   3.\n  --fourth TEXT  4.\n\n" + rest in long
    assert "more options" not in long
    assert CliRunner().invoke(command, ["--third", "x"]).exit_code == 0


def test_at_most_13_commands_and_150_options_exist() -> None:
    assert len(cli.main.list_commands(click.Context(cli.main))) <= 13
    counts = Counter(verb for verb, _ in options())
    assert sum(counts.values()) <= 150, counts


def test_every_option_is_in_the_documentation() -> None:
    """On one page, as an option has one meaning. Options of a request or a session have a page of their own."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text)) | {
        f"--{name.replace('_', '-')}" for name in re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    }
    missing = {option.opts[-1]: verb for verb, option in options() if option.opts[-1] not in named}
    assert missing == {}


@pytest.mark.parametrize(
    ("arguments", "successor"),
    [
        (["push", "bundle", "owner/name"], "push was removed; upload a bundle or an exit with hf upload (docs/hub.md)"),
        (["convert", "model", "out", "--data", "x"], "--data was removed; give --quantization-data"),
        (["fit", "model", "out", "--paper"], "--paper was removed; compare trainings with: python -m tools.paper"),
        (["train", "model", "out", "--exit-layers", "1"], "--exit-layers was removed; give --exit-head-layers"),
    ],
)
def test_removed_name_gives_one_line_with_its_successor(arguments: list[str], successor: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert f"Error: {successor}" in result.stderr.splitlines()[-1]


def test_successors_of_removed_names_exist() -> None:
    named = {(verb, name) for verb, option in options() for name in option.opts}
    for (verb, old), successor in REMOVED.items():
        assert (verb, old) not in named
        new = re.fullmatch(r"give (--[a-z-]+)", successor)
        assert new is None or (verb, new[1]) in named
