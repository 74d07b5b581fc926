"""Recipes of models that the package ships."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from string import Template

import click
import pytest
from click.testing import CliRunner

from freeexport.checkpoints.exit_file import read_exit_file
from freeexport.cli import main as freeexport
from freeexport.demo import G2P
from tools.data import g2p, g2p_tokenizer

TOOLS = {"tools.data.g2p": g2p.command, "tools.data.g2p_tokenizer": g2p_tokenizer.command}


def commands() -> list[list[str]]:
    """The words of the commands in the model's card, with its variables."""
    block = re.findall(r"^    (.*)$", (G2P / "MODEL_CARD.md").read_text(), re.MULTILINE)
    lines = "\n".join(block).replace("\\\n", " ").splitlines()
    variables = dict(re.findall(r'^(\w+)="(.*)"$', "\n".join(lines), re.MULTILINE))
    found = [Template(line).substitute(variables) for line in lines if line.startswith(("python", "freeexport"))]
    return [shlex.split(line) for line in found]


def test_commands_of_the_model_card_have_valid_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # click keeps a command's option for help as its first context has it, so that is the context of all.
    context = click.Context(freeexport, **freeexport.context_settings)
    read = []
    for program, *words in commands():
        if program == "python":
            name = words[1]
            TOOLS[name].make_context(name, words[2:])
        else:
            name = words[0]
            command = freeexport.get_command(context, name)
            assert command is not None
            command = command.commands["run"] if isinstance(command, click.Group) else command
            command.make_context(name, words[1:], parent=context)
        read.append(name)
    assert read == [*["tools.data.g2p"] * 3, "tools.data.g2p_tokenizer", "train", "train", "convert", "calibrate"]


def test_shipped_model_can_be_trained_further(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"input": "g2p: hello", "target": "HH AH L OW"}\n' * 2)
    given = ["train", str(G2P), str(tmp_path / "out"), "--data", str(data), "--validation", str(data)]
    pace = ["--exit-layer", "3", "--steps", "1", "--dropout", "0"]
    result = CliRunner().invoke(freeexport, [*given, *pace], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    exit_file = read_exit_file(tmp_path / "out")
    assert exit_file is not None
    assert exit_file.exit_layer == 3
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (G2P / "tokenizer.json").read_bytes()
