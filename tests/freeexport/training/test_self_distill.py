"""`train --self-distill`: targets are the model's own greedy outputs, and none is generated twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Case
from training_case import LLAMA, T5, run_options

from freeexport.checkpoints.checkpoint import Checkpoint, open_checkpoint
from freeexport.checkpoints.transformers_model import greedy_ids, reference_model
from freeexport.conversion.own_outputs import ENGINES, own_outputs
from freeexport.system.output import OutputError
from freeexport.training.batches import described, examples
from freeexport.training.self_distill import ABOUT, OUTPUTS, Generate
from freeexport.training.train import train
from runtime.errors import OptionError

ROOT = Path(__file__).parents[3]
Directory = Callable[[Case], Path]
Data = Callable[..., list[str]]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """train.jsonl and validation.jsonl without targets; a word stands in both."""
    data = tmp_path / "prompts"
    data.mkdir()
    for name, first, count in (("train", 0, 20), ("validation", 19, 4)):
        lines = (json.dumps({"input": f"line {first + number} abc"}) + "\n" for number in range(count))
        (data / f"{name}.jsonl").write_text("".join(lines))
    return data


class Generator:
    """Generates with transformers, and stops after `most` outputs, as Ctrl-C does."""

    def __init__(self, most: int = 1000) -> None:
        self.most, self.made = most, 0

    def __call__(
        self, checkpoint: Checkpoint, prompts: Sequence[np.ndarray], new_tokens: int, directory: Path
    ) -> Iterator[tuple[int, np.ndarray]]:
        model = reference_model(checkpoint)
        for index in reversed(range(len(prompts))):
            if self.made == self.most:
                raise KeyboardInterrupt
            self.made += 1
            yield index, greedy_ids(model, checkpoint, [prompts[index]], new_tokens)[0]


@pytest.mark.parametrize("case", [LLAMA, T5], ids=["llama", "t5"])
def test_targets_are_outputs_of_the_whole_model_generated_once(
    case: Case, checkpoint: Directory, prompts: Path, tmp_path: Path
) -> None:
    model, own = str(checkpoint(case)), tmp_path / "own"
    options = run_options(prompts, self_distill=own, max_new_tokens=6)
    generate = Generator()
    trained = train(model, tmp_path / "out", options, generate)
    assert generate.made == 23  # 24 lines, one of them twice
    assert trained.before["eval_deep_accuracy"] == 1
    lines = [json.loads(line) for line in (own / OUTPUTS).read_text().splitlines()]
    assert {line["input"] for line in lines} == {f"line {number} abc" for number in range(23)}
    assert all(1 <= len(line["target_ids"]) <= 6 and isinstance(line["target"], str) for line in lines)
    again = Generator()
    train(model, tmp_path / "again", run_options(prompts, self_distill=own, max_new_tokens=6, exit_layer=1), again)
    assert again.made == 0


def test_interrupted_generation_continues(checkpoint: Directory, prompts: Path, tmp_path: Path) -> None:
    model, own = str(checkpoint(LLAMA)), tmp_path / "own"
    options = run_options(prompts, self_distill=own, max_new_tokens=6)
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path / "out", options, Generator(9))
    with (own / OUTPUTS).open("ab") as file:
        file.write(b'{"input": "line 3 abc", "target": "ab')  # as a kill leaves it
    generate = Generator()
    train(model, tmp_path / "out", options, generate)
    assert generate.made == 23 - 9
    whole = tmp_path / "whole"
    train(model, tmp_path / "other", run_options(prompts, self_distill=whole, max_new_tokens=6), Generator())
    assert sorted((own / OUTPUTS).read_text().splitlines()) == sorted((whole / OUTPUTS).read_text().splitlines())


@pytest.mark.slow
def test_killed_run_continues_with_its_generated_outputs(checkpoint: Directory, prompts: Path, tmp_path: Path) -> None:
    """With the engines that the command makes, which are gone in the end."""
    out = tmp_path / "out"
    own = tmp_path / "out.outputs"
    command = [
        *(sys.executable, "-m", "freeexport", "train", str(checkpoint(LLAMA)), str(out), "--exit-layer", "2"),
        *("--data", str(prompts / "train.jsonl"), "--validation", str(prompts / "validation.jsonl"), "--steps", "2"),
        *("--self-distill", "--max-new-tokens", "200"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (own / OUTPUTS).exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = (own / OUTPUTS).read_bytes()
    assert subprocess.run(command, env=environment, stderr=subprocess.DEVNULL).returncode == 0
    lines = (own / OUTPUTS).read_bytes()
    assert lines.startswith(first[: first.rfind(b"\n") + 1])
    assert len({json.loads(line)["input"] for line in lines.splitlines()}) == len(lines.splitlines()) == 23
    assert not (own / ENGINES).exists()


@pytest.mark.parametrize("case", [LLAMA, T5], ids=["llama", "t5"])
def test_engine_outputs_match_transformers(case: Case, checkpoint: Directory, prompts: Path, tmp_path: Path) -> None:
    """But for the rounding of weights to 8 bits."""
    model = str(checkpoint(case))
    opened = open_checkpoint(model)
    inputs = [np.arange(3, 4 + length, dtype=np.int32) for length in range(1, 41)]
    found = dict(own_outputs(model, opened, inputs, 5, tmp_path))
    wanted = greedy_ids(reference_model(opened), opened, inputs[:1], 5)
    assert sorted(found) == list(range(40))
    assert all(1 <= len(ids) <= 5 for ids in found.values())
    reference = reference_model(opened)
    wanted = [greedy_ids(reference, opened, [ids], 1)[0][0] for ids in inputs]
    assert np.mean([found[index][0] == first for index, first in enumerate(wanted)]) > 0.8


def test_end_token_is_trained_only_if_the_model_wrote_it(checkpoint: Directory, prompts: Path, tmp_path: Path) -> None:
    """An end that it did not write is not trained; an input without room for an output is left out."""
    opened = open_checkpoint(str(checkpoint(LLAMA)))

    def generate(_: Checkpoint, asked: Sequence[np.ndarray], *rest: object) -> Iterator[tuple[int, np.ndarray]]:
        yield from ((index, np.array([7, 8] if index else [7, 2], np.int32)) for index in range(len(asked)))

    (prompts / "validation.jsonl").write_text('{"input": "abc"}\n' + json.dumps({"input": "abc " * 40}) + "\n")
    options = run_options(prompts, self_distill=tmp_path / "own", max_new_tokens=2, max_tokens=40)
    training, validation, notes = examples(opened, described(opened, options), options, generate)
    assert [example.target.tolist() for example in training[:2]] == [[7, 2], [7, 8]]
    assert len(validation) == 1
    assert "1 of 2 examples are longer than 40 tokens" in notes[0]


def test_exit_beside_the_model_does_not_change_its_outputs(
    checkpoint: Directory, prompts: Path, tmp_path: Path
) -> None:
    generate = Generator()
    options = run_options(prompts, self_distill=tmp_path / "own", max_new_tokens=2, tune="exit", exit_head_layers=1)
    train(str(checkpoint(LLAMA)), tmp_path / "out", options, generate)
    generate.most = generate.made
    train(str(tmp_path / "out"), tmp_path / "again", options, generate)


def test_outputs_of_another_model_or_limit_are_refused(checkpoint: Directory, prompts: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    generate: Generate = Generator()
    options = partial(run_options, prompts, self_distill=own)
    train(str(checkpoint(LLAMA)), tmp_path / "out", options(max_new_tokens=2), generate)
    with pytest.raises(OutputError, match=r"own has outputs with sha256 \w{12}, not \w{12}; name another directory"):
        train(str(checkpoint(T5)), tmp_path / "t5", options(max_new_tokens=2), generate)
    with pytest.raises(OutputError, match=r"own has outputs with new_tokens 2, not 3; name another directory"):
        train(str(checkpoint(LLAMA)), tmp_path / "longer", options(max_new_tokens=3), generate)
    (own / ABOUT).unlink()
    with pytest.raises(OutputError, match=r"own exists and holds no outputs of a model"):
        train(str(checkpoint(LLAMA)), tmp_path / "other", options(max_new_tokens=2), generate)


@pytest.mark.parametrize("contradiction", ["from_config", "truncate"])
def test_options_without_model_outputs_are_refused(contradiction: str, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--self-distill .*; choose one"):
        run_options(prompts, self_distill=tmp_path, **{contradiction: True})
