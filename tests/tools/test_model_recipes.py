"""Recipes train for hours: here their commands are read as click would, and what these write is only pretended."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from checkpoints import CASES, VOCAB_SIZE, Case
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.exit_file import ExitFile, read_exit_file, write_exit_file
from freeexport.cli import main as freeexport
from freeexport.conversion.convert import convert
from freeexport.conversion.options import ConvertOptions
from runtime import Session
from tools.data.splits import DataError
from tools.models import cut_vocabulary, demo_model, difference_lora, g2p_table, recipe, task_model

BY_NAME = {case.name: case for case in CASES}
RECIPES = {
    "demo_model": (demo_model, ()),
    "g2p_table": (g2p_table, ()),
    "restoration": (task_model, ("smollm2", "restoration", "--begin", "trained")),
    "phrases": (task_model, ("smollm2", "phrases", "--budget", "30h", "--paper")),
    "t5": (task_model, ("flan-t5-small", "restoration")),
}


def read(verb: str, arguments: list[str]) -> dict[str, object]:
    """The options of a command of freeexport; click's UsageError where there is none of a name or a value is wrong."""
    # click keeps a command's option for help as its first context has it, so that is the context of all.
    context = click.Context(freeexport, **freeexport.context_settings)
    command = freeexport.get_command(context, verb)
    assert command is not None, verb
    if isinstance(command, click.Group):
        command = command.commands["run"]
    return command.make_context(verb, [*arguments], parent=context).params


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that recipes run: each output is an empty directory or file, so that the next step finds it."""
    found: list[list[str]] = []

    def pretend(*given: object) -> None:
        arguments = [str(argument) for argument in given]
        found.append(arguments)
        if arguments[:2] in (["freeexport", "train"], ["freeexport", "convert"]):
            Path(arguments[3]).mkdir()
        elif arguments[0] in ("tools.models.flan_t5", "tools.models.cut_vocabulary"):
            Path(arguments[2]).mkdir()
        elif arguments[0].startswith("tools.data."):
            out = Path(arguments[2] if arguments[0].endswith("debian") else arguments[1])
            out.mkdir()
            for split in ("train", "validation", "calibration", "test"):
                (out / f"{split}.jsonl").write_text('{"input": "a", "target": "b", "references": [["b"], ["c"]]}\n')

    for module in (recipe, demo_model, g2p_table, task_model):
        monkeypatch.setattr(module, "python", pretend)
    monkeypatch.setattr(task_model, "smollm2", lambda: "model.gguf")
    monkeypatch.setattr(task_model, "WHEEL", __file__)
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_options_that_recipes_give_are_those_of_the_commands(
    name: str, commands: list[list[str]], tmp_path: Path
) -> None:
    module, arguments = RECIPES[name]
    result = CliRunner().invoke(module.command, [*arguments, str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    if module is demo_model:
        demo_model.calibrate(tmp_path)
    given = [command[1:] for command in commands if command[0] == "freeexport"]
    for verb, *options in given:
        read(verb, options)
    verbs = [verb for verb, *_ in given]
    assert set(verbs) >= ({"fit"} if module is task_model else {"train", "convert", "evaluate"})


def test_a_task_that_a_model_has_not_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(task_model.command, ["flan-t5-small", "phrases", str(tmp_path / "work")])
    assert result.exit_code == 2
    assert "flan-t5-small has no task phrases; choose from restoration" in result.output
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", ["llama-tied", "t5-gated-tied"])
def test_a_model_with_a_cut_vocabulary_writes_what_the_whole_one_does(
    name: str, checkpoint: Callable[[Case], Path], tmp_path: Path
) -> None:
    """As long as that has no other tokens; otherwise the likeliest that it knows."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"input": "one two", "target": "three four"}\n' * 2)
    case, texts = BY_NAME[name], ["one two three", "x", "line 5"]
    made = dict[int, list[tuple[int, ...]]]()
    for tokens in (VOCAB_SIZE - 1, 40):
        cut, out = tmp_path / f"cut-{tokens}", tmp_path / f"bundle-{tokens}"
        given = [str(checkpoint(case)), str(cut), "--data", str(data), "--tokens", str(tokens)]
        result = CliRunner().invoke(cut_vocabulary.command, given, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        convert(str(cut), out, ConvertOptions(capacity=128, encoder_capacity=128, verify="none", measure=False))
        options: dict[str, Any] = {"max_new_tokens": 16, "ignore_eos": True}
        with Session(out, threads=1, slots=1) as session:
            full, static = (
                [session.generate(text, mode=mode, **options).token_ids for text in texts]
                for mode in ("full", "shallow")
            )
        made[tokens] = static
    assert made[VOCAB_SIZE - 1] == full
    known = read_exit_file(tmp_path / "cut-40")
    assert known is not None
    assert known.vocabulary is not None
    assert known.vocabulary.size == 40
    first = 0 if name.startswith("t5") else 1  # of a decoder-only model, the prompt's own prediction is the whole one's
    assert len({token for ids in made[40] for token in ids[first:]}) <= 40


def test_a_difference_of_low_rank_is_an_adapter(checkpoint: Callable[[Case], Path], tmp_path: Path) -> None:
    base, tuned, out = checkpoint(BY_NAME["llama-tied"]), tmp_path / "tuned", tmp_path / "out"
    shutil.copytree(base, tuned)
    tensors, draw = load_file(base / "model.safetensors"), np.random.default_rng(0)
    for name, array in tensors.items():
        if ".layers." in name and array.ndim == 2:
            tensors[name] = array + 0.1 * np.outer(*(draw.normal(size=size) for size in array.shape)).astype(np.float32)
    save_file(tensors, tuned / "model.safetensors")
    write_exit_file(tuned, ExitFile(1, False, 0, open_checkpoint(str(tuned)).sha256, "logit-kd", "full"))
    given = [str(base), str(tuned), str(out), "--rank", "1"]
    assert "rank 1, 100.0% of" in CliRunner().invoke(difference_lora.command, given, catch_exceptions=False).output
    merged = open_checkpoint(str(out))
    assert merged.exit is not None
    assert merged.exit.exit_layer == 1
    assert all(np.allclose(merged.read(name), array, atol=1e-4) for name, array in tensors.items())


def test_a_recipe_that_was_interrupted_makes_only_what_is_missing(commands: list[list[str]], tmp_path: Path) -> None:
    runner = CliRunner()
    runner.invoke(g2p_table.command, [str(tmp_path), "--train-only"], catch_exceptions=False)
    trained = [command[3] for command in commands if command[:2] == ["freeexport", "train"]]
    assert len(trained) == len(set(trained)) == 1 + len(g2p_table.TRAININGS)
    (tmp_path / "kd-dyn-2-1").rmdir()
    (tmp_path / "kd-dyn-2-1.training").mkdir()
    commands.clear()
    runner.invoke(g2p_table.command, [str(tmp_path), "--train-only"], catch_exceptions=False)
    again = [command for command in commands if command[:2] == ["freeexport", "train"]]
    assert [Path(command[3]).name for command in again] == ["kd-dyn-2-1"]
    assert "--resume" in again[0]


@pytest.mark.parametrize("fast", [False, True])
def test_recipes_train_in_bfloat16_only_where_the_processor_multiplies_it(
    fast: bool, commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "multiplies_bfloat16", lambda: fast)
    recipe.train("model", tmp_path / "out")
    assert ("--bf16" in commands[0]) is fast


def test_one_table_makes_only_what_it_needs(commands: list[list[str]], tmp_path: Path) -> None:
    arguments = [str(tmp_path), "--only", "losses-int8-seed-0", "--threads", "2"]
    CliRunner().invoke(g2p_table.command, arguments, catch_exceptions=False)
    trained = [Path(command[3]).name for command in commands if command[:2] == ["freeexport", "train"]]
    assert trained == ["stage1", *(f"{loss}-2-0" for loss in g2p_table.METHODS)]
    (evaluation,) = [command[1:] for command in commands if command[:2] == ["freeexport", "evaluate"]]
    assert all(f"{tmp_path}/{loss}-2-0-int8=" in " ".join(evaluation) for loss in g2p_table.METHODS)
    options = read(evaluation[0], evaluation[1:])
    assert (options["threads"], options["output"]) == (2, tmp_path / "results-2" / "losses-int8-seed-0")


def test_every_table_is_made_under_its_name(commands: list[list[str]], tmp_path: Path) -> None:
    CliRunner().invoke(g2p_table.command, [str(tmp_path)], catch_exceptions=False)
    outputs = [Path(command[-1]).relative_to(tmp_path) for command in commands if command[1] == "evaluate"]
    assert outputs == [Path("results") / name for name in g2p_table.TABLES]


def test_trainings_may_begin_with_another_checkpoint_but_all_with_one(
    commands: list[list[str]], tmp_path: Path
) -> None:
    begin, other, work = (tmp_path / name for name in ("begin", "other", "work"))
    begin.mkdir()
    other.mkdir()
    arguments = [str(work), "--only", "confidence", "--begin"]
    for _ in range(2):
        CliRunner().invoke(g2p_table.command, [*arguments, str(begin)], catch_exceptions=False)
        trained = [command[2:4] for command in commands if command[:2] == ["freeexport", "train"]]
        assert trained == [[str(work / "stage1"), str(work / g2p_table.BEST.name)]]
    assert (work / "stage1").resolve() == begin
    assert not any(command[0] == "tools.data.g2p_tokenizer" for command in commands)
    with pytest.raises(DataError, match="choose another WORK"):
        g2p_table.begin_with(work, other)


def test_the_shipped_model_can_be_trained_further(tmp_path: Path) -> None:
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


def test_calibration_and_test_phrases_are_different_files(tmp_path: Path) -> None:
    for split in ("calibration", "test"):
        line = f'{{"input": "{split}", "target": "b", "references": [["b"], ["c"]]}}\n'
        (tmp_path / f"{split}.jsonl").write_text(line)
    paths = [demo_model.part_of(tmp_path / f"{split}.jsonl", "phrases") for split in ("calibration", "test")]
    assert [split in path.read_text() for split, path in zip(("calibration", "test"), paths, strict=True)] == [True] * 2
