"""Tools that make models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
from checkpoints import BY_NAME, Case
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.exit_file import ExitFile, read_exit_file, write_exit_file
from freeexport.cli import main as freeexport
from tools.models import demo_model, difference_lora


def read(verb: str, arguments: list[str]) -> dict[str, object]:
    """The options of a command of freeexport; click's UsageError where there is none of a name or a value is wrong."""
    # click keeps a command's option for help as its first context has it, so that is the context of all.
    context = click.Context(freeexport, **freeexport.context_settings)
    command = freeexport.get_command(context, verb)
    assert command is not None, verb
    if isinstance(command, click.Group):
        command = command.commands["run"]
    return command.make_context(verb, [*arguments], parent=context).params


@pytest.mark.parametrize("bf16", [False, True])
def test_recipe_options_are_accepted_by_the_commands(
    bf16: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Training takes hours: here commands are read as click would, and what these write is only pretended."""
    given: list[list[str]] = []

    def pretend(*arguments: object) -> None:
        module, *rest = map(str, arguments)
        if module == "freeexport":
            given.append(rest)
            if rest[0] in ("train", "convert"):
                Path(rest[2]).mkdir()
        else:
            out = Path(rest[0])
            out.mkdir()
            for split in ("train", "validation", "calibration", "test"):
                (out / f"{split}.jsonl").write_text('{"input": "a", "target": "b", "references": [["b"], ["c"]]}\n')

    monkeypatch.setattr(demo_model, "python", pretend)
    monkeypatch.setattr(demo_model, "multiplies_bfloat16", lambda: bf16)
    result = CliRunner().invoke(demo_model.command, [str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for verb, *options in given:
        read(verb, options)
    assert {verb for verb, *_ in given} == {"train", "convert", "calibrate"}
    trained = [options for verb, *options in given if verb == "train"]
    assert all(("--bf16" in options) is bf16 for options in trained)
    (tmp_path / "stage2").rmdir()
    (tmp_path / "stage2.training").mkdir()
    given.clear()
    demo_model.train_stages(tmp_path)
    assert [(Path(options[1]).name, "--resume" in options) for _, *options in given] == [("stage2", True)]


def test_low_rank_weight_difference_becomes_an_adapter(checkpoint: Callable[[Case], Path], tmp_path: Path) -> None:
    base, tuned, out = checkpoint(BY_NAME["llama-tied"]), tmp_path / "tuned", tmp_path / "out"
    shutil.copytree(base, tuned)
    tensors, draw = load_file(base / "model.safetensors"), np.random.default_rng(0)
    for name, array in tensors.items():
        if ".layers." in name and array.ndim == 2:
            tensors[name] = array + 0.1 * np.outer(*(draw.normal(size=size) for size in array.shape)).astype(np.float32)
    save_file(tensors, tuned / "model.safetensors")
    write_exit_file(tuned, ExitFile(1, open_checkpoint(str(tuned)).sha256, "logit-kd", "full"))
    given = [str(base), str(tuned), str(out), "--rank", "1"]
    assert "rank 1, 100.0% of" in CliRunner().invoke(difference_lora.command, given, catch_exceptions=False).output
    merged = open_checkpoint(str(out))
    assert merged.exit is not None
    assert merged.exit.exit_layer == 1
    assert all(np.allclose(merged.read(name), array, atol=1e-4) for name, array in tensors.items())


def test_shipped_model_can_be_trained_further(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"input": "g2p: hello", "target": "HH AH L OW"}\n' * 2)
    given = ["train", str(demo_model.DATA), str(tmp_path / "out"), "--data", str(data), "--validation", str(data)]
    pace = ["--exit-layer", "3", "--steps", "1", "--dropout", "0"]
    result = CliRunner().invoke(freeexport, [*given, *pace], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    exit_file = read_exit_file(tmp_path / "out")
    assert exit_file is not None
    assert exit_file.exit_layer == 3
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (demo_model.DATA / "tokenizer.json").read_bytes()
