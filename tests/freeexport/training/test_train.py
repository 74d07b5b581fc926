from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from checkpoints import CASES, Case
from click.testing import CliRunner
from safetensors.numpy import save_file

from freeexport.checkpoints.checkpoint import CheckpointError, open_checkpoint
from freeexport.checkpoints.examples import DataError
from freeexport.checkpoints.exit_file import LossName, read_exit_file
from freeexport.checkpoints.transformers_model import reference_model
from freeexport.cli import main
from freeexport.system.output_directory import OutputError
from freeexport.training.full import trainable_model
from freeexport.training.options import EXIT_LOSSES, LORA_PRESETS, LoraOptions, TrainingOptions
from freeexport.training.run_directory import last_checkpoint
from freeexport.training.shallow_deep import ShallowDeep
from freeexport.training.train import train
from freeexport.training.trainer import rate_factor
from graphs.families import describe
from runtime.errors import OptionError

ROOT = Path(__file__).parents[3]
T5, LLAMA = (next(case for case in CASES if case.name == name) for name in ("t5-deep-decoder", "llama-tied"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 words and their reverse."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdef", k=draw.randint(2, 9))) for _ in range(48)]
    path.write_text("".join(json.dumps({"input": word, "target": word[::-1]}) + "\n" for word in words))
    return path


@pytest.fixture
def options(data: Path) -> TrainingOptions:
    return TrainingOptions(
        data, exit_layer=2, steps=3, batch_size=8, validation_share=0.2, evaluate_every=3, log_every=1
    )


def metrics(out: Path, name: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def tensors(directory: Path) -> dict[str, np.ndarray]:
    opened = open_checkpoint(str(directory))
    return {name: opened.read(name) for name in opened.names()}


@pytest.mark.parametrize("case", [T5, LLAMA], ids=lambda case: case.name)
@pytest.mark.parametrize("loss", get_args(LossName))
def test_every_loss_trains_the_whole_model(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, case: Case, loss: LossName, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = train(str(checkpoint(case)), out, replace(options, loss=loss))
    assert result.steps == 3
    assert len(metrics(out)) == 3
    before, after = tensors(checkpoint(case)), tensors(out)
    assert before.keys() == after.keys()
    assert all(not np.array_equal(before[name], after[name]) for name in before if "relative" not in name)
    exit_file = read_exit_file(out)
    assert exit_file is not None
    assert (exit_file.exit_layer, exit_file.loss, exit_file.has_parameters) == (2, loss, False)
    assert exit_file.base_sha256 == open_checkpoint(str(checkpoint(case))).sha256
    assert not (tmp_path / "out.training").exists()
    assert reference_model(open_checkpoint(str(out))).config.vocab_size == 288


@pytest.mark.parametrize("case", [T5, LLAMA], ids=lambda case: case.name)
def test_lora_writes_an_adapter_that_reads_as_the_merged_model(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, case: Case, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train(str(checkpoint(case)), out, replace(options, tune="lora", lora=LoraOptions(4, 8.0), learning_rate=1e-2))
    opened = open_checkpoint(str(out))
    assert opened.exit is not None
    assert opened.exit.tune == "lora"
    before, state = tensors(checkpoint(case)), reference_model(opened).state_dict()
    changed = set()
    for name in opened.names():
        read = opened.read(name)
        assert np.allclose(read, state[name].numpy(), atol=1e-6), name
        if not np.array_equal(read, before[name]):
            changed.add(name)
    linear = {name for name, array in before.items() if array.ndim == 2} - {
        name for name in before if "embed" in name or "shared" in name or "relative" in name or "lm_head" in name
    }
    assert changed == linear
    assert opened.sha256 != open_checkpoint(str(checkpoint(case))).sha256


def test_lora_preset_is_the_published_setting() -> None:
    assert LORA_PRESETS["paper-t5-3b"] == LoraOptions(64, 128.0, ("all-linear",))


@pytest.mark.parametrize("case", [T5, LLAMA], ids=lambda case: case.name)
@pytest.mark.parametrize(("loss", "rank"), [("ce", 0), ("logit-kd", 4)])
def test_exit_leaves_the_base_unchanged_to_the_bit(
    checkpoint: Callable[[Case], Path],
    options: TrainingOptions,
    case: Case,
    loss: LossName,
    rank: int,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    train(str(checkpoint(case)), out, replace(options, tune="exit", loss=loss, adapter_rank=rank))
    opened = open_checkpoint(str(out))
    assert opened.exit is not None
    assert (opened.exit.exit_norm, opened.exit.adapter_rank) == (True, rank)
    assert (out / "model.safetensors").read_bytes() == (checkpoint(case) / "model.safetensors").read_bytes()
    assert (out / "config.json").read_bytes() == (checkpoint(case) / "config.json").read_bytes()
    final = "decoder.final_layer_norm.weight" if case is T5 else "model.norm.weight"
    assert not np.array_equal(opened.read("exit.norm.weight"), opened.read(final))
    assert ("exit.adapter.up.weight" in opened) is bool(rank)
    if rank:
        assert np.abs(opened.read("exit.adapter.up.weight")).max() > 0
    assert len(opened.sha256) == 64


@pytest.mark.parametrize("loss", EXIT_LOSSES)
def test_exit_loss_falls(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, loss: LossName, tmp_path: Path
) -> None:
    run = replace(options, tune="exit", loss=loss, steps=40, evaluate_every=10, learning_rate=1e-2, adapter_rank=8)
    train(str(checkpoint(LLAMA)), tmp_path / "out", run)
    evaluated = metrics(tmp_path / "out", "eval_shallow_loss")
    assert evaluated[-1] < evaluated[0]
    deep = metrics(tmp_path / "out", "eval_deep_loss")
    assert max(deep) - min(deep) < 1e-5


def test_an_untrained_exit_without_adapter_says_what_the_final_norm_says(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, tmp_path: Path
) -> None:
    losses = []
    for tune in ("exit", "full"):
        run = replace(options, tune=tune, loss="ce", steps=1, evaluate_every=1, learning_rate=1e-12, adapter_rank=0)
        train(str(checkpoint(T5)), tmp_path / tune, run)
        losses.append([metrics(tmp_path / tune, name)[0] for name in ("eval_shallow_loss", "eval_deep_loss")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("case", [T5, LLAMA], ids=lambda case: case.name)
def test_deep_and_shallow_logits_are_those_of_whole_and_cut_models(
    checkpoint: Callable[[Case], Path], case: Case
) -> None:
    opened = open_checkpoint(str(checkpoint(case)))
    description = describe(opened.config, opened)
    model = reference_model(opened)
    ours = ShallowDeep(model, description, 2, "ce").eval()
    ids, target = torch.tensor([[35, 60, 70, 80, 1]]), torch.tensor([[90, 91, 92, 1]])
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = target if case is T5 else torch.tensor([[60, -100, 80, 90, 1]])
    if case is T5:
        batch["decoder_input_ids"] = torch.tensor([[0, 90, 91, 92]])
    with torch.no_grad():
        hidden = ours.hidden_states(labels, **batch)
        logits = {layer: ours.head(hidden[layer]) for layer in (2, ours.layers)}
        for layer in (ours.layers, 2):
            layers = model.decoder.block if case is T5 else model.model.layers
            del layers[layer:]
            expected = model(**batch, use_cache=False).logits[labels != -100]
            assert torch.allclose(logits[layer], expected, atol=1e-4), layer


@pytest.mark.parametrize("tune", ["full", "exit"])
def test_gradient_accumulation_equals_one_large_batch(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, tune: Any, tmp_path: Path
) -> None:
    # One step over everything, in one batch and in several of other sizes.
    run = replace(options, tune=tune, loss="ce", steps=1, dropout=0.0, evaluate_every=1)
    results = []
    for name, size, accumulate in (("one", 64, 1), ("many", 7, 10)):
        train(str(checkpoint(T5)), tmp_path / name, replace(run, batch_size=size, accumulate=accumulate))
        results.append((metrics(tmp_path / name)[0], metrics(tmp_path / name, "grad_norm")[0]))
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_gradient_checkpointing_and_bf16_change_little(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, tmp_path: Path
) -> None:
    run = replace(options, dropout=0.0, loss="kd-dyn")
    curves = []
    for name, change in (("plain", {}), ("less", {"gradient_checkpointing": True}), ("bf16", {"bf16": True})):
        train(str(checkpoint(LLAMA)), tmp_path / name, replace(run, **change))
        curves.append(metrics(tmp_path / name))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0] == pytest.approx(curves[2], rel=0.03)
    assert curves[0] != curves[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="bfloat16 is fast on a GPU")
@pytest.mark.parametrize("fast", [False, True])
def test_bf16_on_a_processor_without_it_is_warned_of(
    checkpoint: Callable[[Case], Path],
    options: TrainingOptions,
    fast: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("freeexport.training.train.multiplies_bfloat16", lambda: fast)
    for bf16 in (False, True):
        run = replace(options, bf16=bf16, steps=1, evaluate_every=1)
        train(str(checkpoint(LLAMA)), tmp_path / str(bf16), run)
        warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: --bf16 is slow")]
        assert len(warned) == (bf16 and not fast)


@pytest.mark.parametrize("loss", ["kd-dyn", "logit-kd"])
def test_no_gradient_reaches_frozen_weights(checkpoint: Callable[[Case], Path], data: Path, loss: LossName) -> None:
    opened = open_checkpoint(str(checkpoint(LLAMA)))
    model = trainable_model(opened, TrainingOptions(data, 2)).requires_grad_(False)
    wanted = model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    module = ShallowDeep(model, describe(opened.config, opened), 2, loss)
    batch = {
        "input_ids": torch.tensor([[3, 4, 5]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.int64),
        "labels": torch.tensor([[4, 5, 6]]),
    }
    module(**batch)["loss"].backward()
    assert [name for name, value in module.named_parameters() if value.grad is not None] == [
        "model.model.layers.0.mlp.up_proj.weight"
    ]
    assert wanted.grad is not None
    assert wanted.grad.abs().max() > 0


def test_random_weights_from_a_configuration(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, tmp_path: Path
) -> None:
    source = tmp_path / "configuration"
    source.mkdir()
    for path in checkpoint(T5).iterdir():
        if path.suffix == ".json":
            (source / path.name).write_bytes(path.read_bytes())
    outs = []
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        train(str(source), tmp_path / name, replace(options, from_config=True, seed=seed, dtype="float16"))
        outs.append(tensors(tmp_path / name))
    assert all(np.array_equal(outs[0][name], outs[1][name]) for name in outs[0])
    assert any(not np.array_equal(outs[0][name], outs[2][name]) for name in outs[0])
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        train(str(tmp_path), tmp_path / "none", replace(options, from_config=True))
    assert not (tmp_path / "none.training").exists()


def test_time_limit_ends_the_run_with_its_best_weights(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, tmp_path: Path
) -> None:
    run = replace(options, steps=None, time_limit=0.5 / 60, evaluate_every=10_000)
    result = train(str(checkpoint(LLAMA)), tmp_path / "out", run)
    assert 0.5 <= result.seconds < 5
    assert result.best_step == result.steps > 0
    assert metrics(tmp_path / "out", "learning_rate")[-1] < 5e-5  # the schedule ended with the time


def test_early_stopping_keeps_the_best(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, tmp_path: Path
) -> None:
    # A rate that only makes it worse.
    run = replace(options, steps=50, evaluate_every=1, patience=2, learning_rate=0.5, schedule="constant", warmup=0.0)
    result = train(str(checkpoint(LLAMA)), tmp_path / "out", run)
    evaluated = metrics(tmp_path / "out", "eval_loss")
    assert result.steps < 50
    assert result.metrics["eval_loss"] == pytest.approx(min(evaluated))
    assert result.best_step == evaluated.index(min(evaluated)) + 1
    # The written weights are the best ones, not the last.
    again = replace(options, steps=1, evaluate_every=1, learning_rate=1e-12)
    train(str(tmp_path / "out"), tmp_path / "again", again)
    assert metrics(tmp_path / "again", "eval_loss")[0] == pytest.approx(min(evaluated), rel=1e-4)


def test_validation_file_is_used(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "validation.jsonl"
    other.write_text(json.dumps({"input": "ab", "target": "ba" * 30}) + "\n")
    train(str(checkpoint(LLAMA)), tmp_path / "out", replace(options, validation=other))
    with pytest.raises(DataError, match="none of the 1 examples fits 20"):
        train(str(checkpoint(LLAMA)), tmp_path / "short", replace(options, validation=other, max_tokens=20))


def test_killed_run_resumes_with_the_same_losses(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, data: Path, tmp_path: Path
) -> None:
    """Over epoch borders, with dropout: data order and random state both go on where they were."""
    run = replace(options, steps=40, evaluate_every=7)
    train(str(checkpoint(T5)), tmp_path / "whole", run)
    arguments = [
        *(sys.executable, "-m", "freeexport", "train", str(checkpoint(T5)), str(tmp_path / "out")),
        *("--data", str(data), "--exit-layer", "2", "--steps", "40", "--batch-size", "8"),
        *("--validation-share", "0.2", "--evaluate-every", "7", "--log-every", "1"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(arguments, env=environment, cwd=tmp_path)
    states = tmp_path / "out.training"
    while process.poll() is None and not (states / "checkpoint-7" / "elapsed.json").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (tmp_path / "out").exists()
    train(str(checkpoint(T5)), tmp_path / "out", replace(run, resume=True))
    assert metrics(tmp_path / "out") == pytest.approx(metrics(tmp_path / "whole"), abs=1e-5, rel=1e-6)
    assert len(metrics(tmp_path / "out")) == 40
    first, second = tensors(tmp_path / "out"), tensors(tmp_path / "whole")
    assert all(np.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_checkpoints_that_are_damaged_or_not_ours_are_passed_over(tmp_path: Path) -> None:
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


def test_resume_needs_the_same_options(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = str(checkpoint(LLAMA)), tmp_path / "out"
    with pytest.raises(OptionError, match="no run to resume"):
        train(model, out, replace(options, resume=True))

    def fail(*arguments: Any) -> None:
        raise RuntimeError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("freeexport.training.train._write", fail)
        with pytest.raises(RuntimeError, match="no room"):
            train(model, out, options)
    with pytest.raises(OutputError, match="interrupted run"):
        train(model, out, options)
    with pytest.raises(OptionError, match="had seed 0, not 1"):
        train(model, out, replace(options, resume=True, seed=1))
    states = tmp_path / "out.training"
    (states / "checkpoint-old").mkdir()
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


def test_output_in_the_way_is_left_alone(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not what train writes"):
        train(str(checkpoint(LLAMA)), tmp_path, replace(options, overwrite=True))
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert not tmp_path.with_name(f"{tmp_path.name}.training").exists()


@pytest.mark.parametrize("layer", [0, 5, -1])
def test_exit_layer_out_of_range_is_refused(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, layer: int, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="has 5 layers: 1 to 4"):
        train(str(checkpoint(LLAMA)), tmp_path / "out", replace(options, exit_layer=layer))
    assert list(tmp_path.iterdir()) == []


def test_one_line_of_data_is_refused(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, tmp_path: Path
) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text('{"input": "a", "target": "b"}\n')
    with pytest.raises(DataError, match="one example"):
        train(str(checkpoint(LLAMA)), tmp_path / "out", replace(options, data=path))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"loss": "hinge"}, "--loss 'hinge' is unknown"),
        ({"tune": "head"}, "--tune 'head' is unknown"),
        ({"tune": "exit", "loss": "kd-dyn"}, "which --tune exit freezes"),
        ({"tune": "lora", "from_config": True}, "needs trained weights"),
        ({"steps": 3, "epochs": 1.0}, "contradict"),
        ({"steps": 0}, "--steps is 0"),
        ({"time_limit": 0.0}, "--time-limit is 0.0"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan"),
        ({"dropout": 1.0}, "--dropout is 1.0"),
        ({"validation_share": 0.0}, "--validation-share"),
        ({"epochs": float("inf")}, "--epochs is inf"),
        ({"loss_alpha": float("inf")}, "--loss-alpha is inf"),
        ({"lora": LoraOptions(rank=0)}, "LoRA rank 0"),
        ({"lora": LoraOptions(alpha=float("inf"))}, "alpha inf must be above 0 and finite"),
        ({"lora": LoraOptions(dropout=1.5)}, "--lora-dropout is 1.5"),
        ({"label_smoothing": 1.0}, "--label-smoothing is 1.0"),
        ({"label_smoothing": float("nan")}, "--label-smoothing is nan"),
        ({"label_smoothing": 0.1, "tune": "exit"}, "--label-smoothing is for --tune full and lora"),
        ({"select_by": "beauty"}, "'beauty' is no metric; choose from exact"),
        ({"select_by": "chrf", "tune": "exit"}, "--select-by chrf measures the whole model"),
        ({"select_samples": 0}, "--select-samples is 0"),
        ({"resume": True, "overwrite": True}, "contradict"),
    ],
)
def test_options_that_cannot_be_are_refused(data: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        TrainingOptions(data, 2, **change)


def test_unknown_lora_target_is_refused(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, tmp_path: Path
) -> None:
    run = replace(options, tune="lora", lora=LoraOptions(targets=("nowhere",)))
    with pytest.raises(OptionError, match="--lora-target nowhere"):
        train(str(checkpoint(LLAMA)), tmp_path / "out", run)


def test_training_an_exit_again_is_refused(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, tmp_path: Path
) -> None:
    train(str(checkpoint(LLAMA)), tmp_path / "out", replace(options, tune="exit", steps=1, evaluate_every=1))
    with pytest.raises(CheckpointError, match="has an exit of its own"):
        train(str(tmp_path / "out"), tmp_path / "again", options)


@pytest.mark.parametrize("loss", ["ce", "weighted-ce"])
def test_label_smoothing_is_part_of_training_and_not_of_the_evaluation(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, loss: LossName, tmp_path: Path
) -> None:
    given = replace(options, loss=loss, dropout=0.0, steps=1, evaluate_every=1, learning_rate=1e-12)
    for name, smoothing in (("hard", 0.0), ("smooth", 0.5)):
        train(str(checkpoint(LLAMA)), tmp_path / name, replace(given, label_smoothing=smoothing))
    hard, smooth = tmp_path / "hard", tmp_path / "smooth"
    assert metrics(smooth)[0] != pytest.approx(metrics(hard)[0], abs=1e-3)
    assert metrics(smooth, "eval_loss") == pytest.approx(metrics(hard, "eval_loss"), abs=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "inverse-sqrt"])
def test_rate_warms_up_and_never_rises_again(schedule: Any) -> None:
    factors = [rate_factor(schedule, 0.1, step / 100) for step in range(101)]
    assert factors[0] == 0
    assert factors[5] == pytest.approx(0.5)
    assert max(factors) == pytest.approx(1.0) == factors[10]
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert (factors[-1] < 1e-9) is (schedule in ("linear", "cosine"))


def test_command_prints_what_was_reached(checkpoint: Callable[[Case], Path], data: Path, tmp_path: Path) -> None:
    arguments = [str(checkpoint(LLAMA)), str(tmp_path / "out"), "--data", str(data), "--exit-layer", "1"]
    ran = ["--steps", "2", "--tune", "lora", "--lora-preset", "paper-t5-3b", "--lora-rank", "2", "--json"]
    result = CliRunner().invoke(main, ["train", *arguments, *ran, "--max-tokens", "18"], catch_exceptions=False)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["steps"] == 2
    assert "examples are longer than 18 tokens and are left out" in result.stderr
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 128
    cut = [*arguments, *ran[:-1], "--overwrite", "--max-tokens", "18", "--truncate", "--label-smoothing", "0.1"]
    result = CliRunner().invoke(main, ["train", *cut], catch_exceptions=False)
    assert result.exit_code == 0
    assert "inputs are cut, so that examples have 18 tokens" in result.stderr
    assert "left out" not in result.stderr


def test_two_processes_train_as_one(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, data: Path, tmp_path: Path
) -> None:
    run = replace(options, loss="ce", dropout=0.0, steps=2, evaluate_every=2, batch_size=64)
    train(str(checkpoint(T5)), tmp_path / "one", run)
    arguments = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "freeexport", "train", str(checkpoint(T5)), str(tmp_path / "two"), "--data", str(data)),
        *("--exit-layer", "2", "--steps", "2", "--batch-size", "20", "--validation-share", "0.2"),
        *("--evaluate-every", "2", "--log-every", "1", "--loss", "ce", "--dropout", "0"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "two") == pytest.approx(metrics(tmp_path / "one"), rel=1e-4)
    # After the steps Adam has amplified the rounding of another order of summation: 1.2e-4 on transformers 4.57.
    assert metrics(tmp_path / "two", "eval_loss") == pytest.approx(metrics(tmp_path / "one", "eval_loss"), rel=5e-4)
