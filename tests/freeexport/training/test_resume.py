"""Runs that were killed go on where they were; what is in the way is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Case
from safetensors.numpy import save_file
from training_case import LLAMA, T5, Runs, logged, run_options, tensors

from freeexport.system.output import OutputError
from freeexport.training.run_directory import last_checkpoint
from freeexport.training.train import train
from freeexport.training.trainer import ExitTrainer
from runtime.errors import OptionError

ROOT = Path(__file__).parents[3]
Directory = Callable[[Case], Path]


STOPS = """
import sys, time
from freeexport.training.trainer import ExitTrainer
save = ExitTrainer._save_checkpoint
def save_and_wait(*arguments):
    save(*arguments)
    open(sys.argv[1], "w").close()
    time.sleep(600)
ExitTrainer._save_checkpoint = save_and_wait
from freeexport.cli import main
main(sys.argv[2:])
"""


def test_a_killed_run_resumes_with_the_same_losses(
    checkpoint: Directory, words: Path, run: Runs, tmp_path: Path
) -> None:
    """Over epoch borders, with dropout: data order and random state both go on where they were."""
    options = run_options(words, steps=14, evaluate_every=5, patience=0)
    whole, trained = run(T5, steps=14, evaluate_every=5, patience=0)
    out, states, saved = tmp_path / "out", tmp_path / "out.training", tmp_path / "saved"
    command = [
        *(sys.executable, "-c", STOPS, str(saved), "train", str(checkpoint(T5)), str(out), "--exit-layer", "2"),
        *("--data", str(options.data), "--validation", str(options.validation), "--steps", "14"),
        *("--batch-tokens", "160", "--evaluate-every", "5", "--patience", "0"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and not saved.exists():
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run failed before it was killed"
    assert last_checkpoint(states) == states / "checkpoint-5"
    assert not out.exists()
    again = train(str(checkpoint(T5)), out, replace(options, resume=True))
    assert logged(out) == pytest.approx(logged(whole), abs=1e-5, rel=1e-6)
    assert logged(out, "eval_loss") == pytest.approx(logged(whole, "eval_loss"), rel=1e-4)
    assert len(logged(out)) == 14
    assert again.before == pytest.approx(trained.before)
    first, second = tensors(out), tensors(whole)
    assert all(np.allclose(first[name], second[name], atol=1e-6) for name in first)
    assert not states.exists()


def test_leftovers_of_a_kill_before_the_first_checkpoint_are_replaced(
    checkpoint: Directory, words: Path, tmp_path: Path
) -> None:
    states = tmp_path / "out.training"
    (states / "checkpoint-3").mkdir(parents=True)
    (states / "checkpoint-3" / "optimizer.pt").write_bytes(b"half")
    (states / "training_options.json").write_text("{}")
    options = run_options(words, steps=1, evaluate_every=1)
    assert train(str(checkpoint(LLAMA)), tmp_path / "out", options).steps == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("case", "tune"), [(LLAMA, "lora"), (LLAMA, "exit"), (T5, "exit")])
def test_interrupted_training_of_exit_layers_resumes_with_the_same_losses(
    case: Case, tune: Any, checkpoint: Directory, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, more = str(checkpoint(case)), {"dropout": 0.0, "learning_rate": 3e-3, "exit_vocab": 12}
    options = run_options(words, tune=tune, exit_head_layers=2, steps=4, evaluate_every=2, **more)
    train(model, tmp_path / "whole", options)
    calls, step = iter(range(3)), ExitTrainer.training_step

    def failing(*arguments: Any, **others: Any) -> Any:
        if next(calls, None) is None:
            raise RuntimeError("killed")
        return step(*arguments, **others)

    with monkeypatch.context() as patch:
        patch.setattr(ExitTrainer, "training_step", failing)
        with pytest.raises(RuntimeError, match="killed"):
            train(model, tmp_path / "out", options)
    with pytest.raises(OptionError, match="had exit_head_layers 2, not 1"):
        train(model, tmp_path / "out", replace(options, resume=True, exit_head_layers=1))

    def again(*arguments: Any) -> None:
        raise AssertionError("the teacher runs again")

    monkeypatch.setattr("freeexport.training.frozen.progress", again)
    assert train(model, tmp_path / "out", replace(options, resume=True)).steps == 4
    assert logged(tmp_path / "out") == pytest.approx(logged(tmp_path / "whole"), rel=1e-4)
    first, second = tensors(tmp_path / "out"), tensors(tmp_path / "whole")
    for name in first:
        np.testing.assert_allclose(first[name], second[name], atol=1e-5)


def test_damaged_and_foreign_checkpoints_are_skipped(tmp_path: Path) -> None:
    def write(name: str, **files: str) -> Path:
        path = tmp_path / name
        path.mkdir()
        save_file({"a": np.zeros(2, np.float32)}, path / "model.safetensors")
        torch.save({}, path / "optimizer.pt")
        for file, text in {"trainer_state.json": '{"global_step": 3}', "elapsed.json": "1.5", **files}.items():
            (path / file).write_text(text)
        return path

    complete = write("checkpoint-3")
    write("checkpoint-old")
    write("checkpoint-4.bak")
    write("checkpoint-5", **{"trainer_state.json": "[" * 100_000})
    write("checkpoint-6", **{"trainer_state.json": "[]"})
    write("checkpoint-7", **{"elapsed.json": "NaN"})
    write("checkpoint-8", **{"model.safetensors": "no"})
    write("checkpoint-9", **{"optimizer.pt": ""})
    assert last_checkpoint(tmp_path) == complete
    assert last_checkpoint(write("checkpoint-10").parent) == tmp_path / "checkpoint-10"


def test_resume_requires_the_same_options(
    checkpoint: Directory, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out, options = str(checkpoint(LLAMA)), tmp_path / "out", run_options(words)
    with pytest.raises(OptionError, match="no run to resume"):
        train(model, out, replace(options, resume=True))

    def fail(*arguments: Any) -> None:
        raise RuntimeError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("freeexport.training.train.write_exit_file", fail)
        with pytest.raises(RuntimeError, match="no room"):
            train(model, out, options)
    with pytest.raises(OutputError, match="interrupted run"):
        train(model, out, options)
    with pytest.raises(OptionError, match="had seed 0, not 1"):
        train(model, out, replace(options, resume=True, seed=1))
    states = tmp_path / "out.training"
    (states / "checkpoint-99").mkdir()
    (states / "checkpoint-99" / "trainer_state.json").write_text("[")
    recorded = (states / "training_options.json").read_text()
    for damage in ("{", "[]", "[" * 100_000, ""):
        (states / "training_options.json").write_text(damage)
        with pytest.raises(OptionError, match=r"training_options\.json .*; start anew with --overwrite"):
            train(model, out, replace(options, resume=True))
    (states / "training_options.json").write_text(recorded)
    assert train(model, out, replace(options, resume=True, patience=1)).steps == 3
    with pytest.raises(OutputError, match="--overwrite"):
        train(model, out, options)
    train(model, out, replace(options, overwrite=True))


def test_foreign_output_directory_is_left_unchanged(checkpoint: Directory, words: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="was not written by this command"):
        train(str(checkpoint(LLAMA)), tmp_path, run_options(words, overwrite=True))
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert not tmp_path.with_name(f"{tmp_path.name}.training").exists()
