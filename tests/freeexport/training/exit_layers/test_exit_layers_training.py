"""An exit of transformer layers is trained, written, read again, and refused where it does not fit."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import CASES, Case
from click.testing import CliRunner
from exit_layer_case import write_exit

from freeexport.checkpoints.checkpoint import CheckpointError, open_checkpoint
from freeexport.checkpoints.exit_file import EXIT_FILE, EXIT_WEIGHTS
from freeexport.checkpoints.transformers_model import reference_model
from freeexport.cli import main
from freeexport.conversion.convert import convert
from freeexport.conversion.options import ConvertOptions
from freeexport.training import losses
from freeexport.training.batches import Collator, described, examples
from freeexport.training.exit_layers.frozen import FrozenExitLayers
from freeexport.training.exit_layers.module import own_exit
from freeexport.training.options import LoraOptions, TrainingOptions
from freeexport.training.shallow_deep import IGNORED, ShallowDeep, SharedHead
from freeexport.training.train import train
from freeexport.training.trainer import ExitTrainer, exits, rate_factor
from runtime.errors import OptionError

T5, LLAMA = (next(case for case in CASES if case.name == name) for name in ("t5-deep-decoder", "llama-tied"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 words and their reverse."""
    path, draw = tmp_path_factory.mktemp("data") / "train.jsonl", random.Random(0)
    words = ["".join(draw.choices("abcdef", k=draw.randint(2, 9))) for _ in range(48)]
    path.write_text("".join(json.dumps({"input": word, "target": word[::-1]}) + "\n" for word in words))
    return path


@pytest.fixture
def options(data: Path) -> TrainingOptions:
    return TrainingOptions(
        data,
        exit_layer=2,
        exit_layers=2,
        tune="exit",
        loss="logit-kd",
        steps=40,
        batch_size=8,
        validation_share=0.2,
        evaluate_every=20,
        log_every=1,
        learning_rate=3e-3,
    )


def logged(out: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def evaluated(out: Path, options: TrainingOptions) -> dict[str, float]:
    """The measures of a written checkpoint on the validation examples, by the model run as a whole."""
    opened = open_checkpoint(str(out))
    description = described(opened, options)
    _, validation, _ = examples(opened, description, options)
    own = own_exit(opened, description)
    assert own is not None
    module = ShallowDeep(reference_model(opened), description, options.exit_layer, "ce", own=own).eval()
    batch = Collator(None)(validation)
    with torch.no_grad():
        sums = module(**batch)
    rows = int((batch["labels"] != IGNORED).sum())
    return {name: float(sums[name]) / rows for name in ("shallow_loss", "deep_loss", "agreement")}


def test_a_frozen_model_gets_an_exit_that_learns_and_is_read_as_it_was(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, tmp_path: Path
) -> None:
    base, out = checkpoint(LLAMA), tmp_path / "out"
    trained = train(str(base), out, options)
    losses_seen = logged(out, "loss")
    assert np.mean(losses_seen[-5:]) < 0.9 * np.mean(losses_seen[:5])
    assert (out / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    opened = open_checkpoint(str(out))
    assert opened.exit is not None
    assert (opened.exit.exit_layers, opened.exit.exit_norm, opened.exit.adapter_rank) == (2, True, 0)
    assert len(opened.sha256) == 64
    # States are kept in half precision.
    for name, value in evaluated(out, options).items():
        assert trained.metrics[f"eval_{name}"] == pytest.approx(value, rel=0.02, abs=0.02), name
    assert 0 <= trained.metrics["eval_exits"] <= 1


def test_a_model_and_its_exit_are_trained_together(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = replace(options, tune="full", learning_rate=1e-3)
    trained = train(str(checkpoint(LLAMA)), out, run)
    first, last = (logged(out, "eval_shallow_loss")[place] for place in (0, -1))
    assert last < first
    for name, value in evaluated(out, run).items():
        assert trained.metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-3, abs=1e-3), name
    before, after = (open_checkpoint(str(path)) for path in (checkpoint(LLAMA), out))
    assert before.sha256 != after.sha256
    assert not np.array_equal(before.read("model.norm.weight"), after.read("model.norm.weight"))


def test_an_adapter_and_an_exit_of_layers_are_trained_together(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, tmp_path: Path
) -> None:
    base, out = checkpoint(LLAMA), tmp_path / "out"
    run = replace(options, tune="lora", lora=LoraOptions(4, 8.0), steps=20, evaluate_every=10)
    trained = train(str(base), out, run)
    assert logged(out, "eval_shallow_loss")[-1] < logged(out, "eval_shallow_loss")[0]
    # What is read is the merged model, with the exit that was trained beside the adapter.
    for name, value in evaluated(out, run).items():
        assert trained.metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-3, abs=1e-3), name
    opened, before = open_checkpoint(str(out)), open_checkpoint(str(base))
    assert opened.exit is not None
    assert (opened.exit.tune, opened.exit.exit_layer, opened.exit.exit_layers) == ("lora", 2, 2)
    assert len({opened.sha256, opened.exit.base_sha256, before.sha256}) == 3
    changed = "model.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(opened.read(changed), before.read(changed))
    assert np.array_equal(opened.read("model.norm.weight"), before.read("model.norm.weight"))
    assert not np.array_equal(opened.read("exit.norm.weight"), before.read("model.norm.weight"))
    convert(str(out), tmp_path / "bundle", ConvertOptions(capacity=64, measure=False))  # verified
    # Its weights merged, it is trained further as a whole.
    further = replace(options, tune="full", steps=1, evaluate_every=1, learning_rate=1e-12)
    again = train(str(out), tmp_path / "further", further)
    assert again.metrics["eval_shallow_loss"] == pytest.approx(trained.metrics["eval_shallow_loss"], rel=1e-3)


def test_an_exit_that_another_adapter_was_trained_with_is_refused(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, tmp_path: Path
) -> None:
    run = replace(options, tune="lora", steps=1, evaluate_every=1)
    outs = [tmp_path / name for name in ("one", "other")]
    for seed, out in enumerate(outs):
        train(str(checkpoint(LLAMA)), out, replace(run, seed=seed))
    (outs[0] / EXIT_WEIGHTS).write_bytes((outs[1] / EXIT_WEIGHTS).read_bytes())
    (outs[0] / EXIT_FILE).write_bytes((outs[1] / EXIT_FILE).read_bytes())
    with pytest.raises(CheckpointError, match="its exit was trained on other weights"):
        _ = open_checkpoint(str(outs[0])).sha256
    (outs[0] / EXIT_WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"exit\.safetensors is missing"):
        open_checkpoint(str(outs[0]))


@pytest.mark.parametrize("tune", ["exit", "full"])
def test_an_exit_of_layers_is_trained_further(
    tune: str, checkpoint: Callable[[Case], Path], options: TrainingOptions, tmp_path: Path
) -> None:
    together, out = tmp_path / "together", tmp_path / "out"
    run = replace(options, tune="full", learning_rate=1e-3)
    train(str(checkpoint(LLAMA)), together, run)
    still = replace(options, tune=tune, steps=1, evaluate_every=1, learning_rate=1e-12)
    assert train(str(together), out, still).metrics["eval_shallow_loss"] == pytest.approx(
        evaluated(together, run)["shallow_loss"], rel=0.02
    )
    if tune == "exit":
        assert (out / "model.safetensors").read_bytes() == (together / "model.safetensors").read_bytes()
    before, after = open_checkpoint(str(together)), open_checkpoint(str(out))
    assert len(after.sha256) == 64  # its exit belongs to these weights
    np.testing.assert_allclose(after.read("exit.norm.weight"), before.read("exit.norm.weight"), atol=1e-6)
    with pytest.raises(CheckpointError, match="the same --exit-layer and --exit-layers"):
        train(str(together), tmp_path / "other", replace(still, exit_layers=1))


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_an_interrupted_joint_run_goes_on_with_the_same_losses(
    tune: Any,
    checkpoint: Callable[[Case], Path],
    options: TrainingOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, run = str(checkpoint(LLAMA)), replace(options, tune=tune, steps=8, evaluate_every=4, dropout=0.0)
    train(model, tmp_path / "whole", run)

    with monkeypatch.context() as patch:
        patch.setattr(ExitTrainer, "training_step", _failing(ExitTrainer.training_step, after=6))
        with pytest.raises(RuntimeError, match="killed"):
            train(model, tmp_path / "out", run)
    assert train(model, tmp_path / "out", replace(run, resume=True)).steps == 8
    assert logged(tmp_path / "out", "loss") == pytest.approx(logged(tmp_path / "whole", "loss"), rel=1e-4)
    first, second = (open_checkpoint(str(tmp_path / name)) for name in ("out", "whole"))
    for name in ("exit.map.weight", "model.layers.0.mlp.up_proj.weight"):
        np.testing.assert_allclose(first.read(name), second.read(name), atol=1e-5)


def _failing(step: Callable[..., Any], after: int) -> Callable[..., Any]:
    calls = iter(range(after))

    def once(*arguments: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            raise RuntimeError("killed")
        return step(*arguments, **options)

    return once


def test_an_interrupted_run_goes_on_with_its_options_only(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = str(checkpoint(LLAMA)), tmp_path / "out"
    run = replace(options, steps=6, evaluate_every=3)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("freeexport.training.train._write", fail)
        with pytest.raises(RuntimeError, match="no room"):
            train(model, out, run)
    with pytest.raises(OptionError, match="had exit_layers 2, not 1"):
        train(model, out, replace(run, resume=True, exit_layers=1))

    def again(*arguments: Any) -> None:
        raise AssertionError("the teacher is asked again")

    monkeypatch.setattr("freeexport.training.exit_layers.teacher._compute", again)
    assert train(model, out, replace(run, resume=True)).steps == 6


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"exit_layers": 4}, "at most 3 make sense"),
        ({"exit_layers": -1}, "--exit-layers is -1"),
        ({"tune": "full", "loss": "weighted-ce"}, "--loss weighted-ce is for an exit without"),
    ],
)
def test_what_does_not_go_together_is_refused(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(OptionError, match=reason):
        train(str(checkpoint(LLAMA)), tmp_path / "out", replace(options, **changes))
    assert not list(tmp_path.iterdir())


def test_an_encoder_decoder_is_refused_in_one_line(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="decoder-only models can have; leave it out for t5"):
        train(str(checkpoint(T5)), tmp_path / "out", options)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"exit_layers": 0}, r"has exit\.\S+, which exit\.json does not"),
        ({"exit_layers": 1}, r"has exit\.layers\.1\.\S+, which exit\.json does not"),
        ({"exit_layers": 3}, r"exit\.layers\.2\.\S+ is missing"),
        ({"exit_layers": 99}, "cannot have"),
    ],
)
def test_exit_files_that_say_otherwise_are_refused(tmp_path: Path, changes: dict[str, int], reason: str) -> None:
    LLAMA.build(tmp_path)
    write_exit(tmp_path)
    text = json.loads((tmp_path / EXIT_FILE).read_text())
    (tmp_path / EXIT_FILE).write_text(json.dumps({**text, **changes}))
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(str(tmp_path))


def test_the_distillation_of_the_best_tokens_is_that_of_all_where_they_are_all() -> None:
    generator = torch.Generator().manual_seed(0)
    deep, shallow = (4 * torch.randn(5, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    meant, said = deep.log_softmax(-1), shallow.log_softmax(-1)
    whole = (meant.exp() * (meant - said)).sum()
    assert float(losses.best_distillation(meant, said)) == pytest.approx(float(whole), rel=1e-6)
    top = meant.topk(3).indices
    some = losses.best_distillation(meant.gather(1, top), said.gather(1, top))
    # All others as one token.
    rest = [1 - part.gather(1, top).exp().sum(-1) for part in (meant, said)]
    inside = (meant.gather(1, top).exp() * (meant - said).gather(1, top)).sum()
    assert float(some) == pytest.approx(float(inside + (rest[0] * (rest[0] / rest[1]).log()).sum()), rel=1e-6)


def test_a_sampled_softmax_is_nearly_that_of_the_whole_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(16, 30_000, bias=False)
    linear.weight.data = torch.randn(30_000, 16, generator=generator) / 4
    module = FrozenExitLayers(torch.nn.Identity(), SharedHead(torch.nn.Identity(), linear, 1.0), (1, 2), "ce", 1.0)  # type: ignore[arg-type]
    student, tokens = torch.randn(6, 16, generator=generator), torch.randint(30_000, (6, 33), generator=generator)
    torch.manual_seed(0)
    found, places = module._log_chances(student, tokens)
    assert found.shape[1] < 3000
    whole = (student @ linear.weight.T).log_softmax(-1).gather(1, tokens)
    np.testing.assert_allclose(found.gather(1, places).detach(), whole.detach(), atol=0.2)


def test_exits_are_the_surest_tokens_of_which_enough_agree() -> None:
    confidence = torch.linspace(1, 0, 200)
    agreed = torch.ones(200, dtype=torch.bool)
    agreed[[50, 120, 121, 122]] = False
    # 1 of 101 is too many, 1 of 100 is not... and later the share is never high enough again.
    assert exits(confidence, agreed) == pytest.approx(120 / 200)
    assert exits(confidence, ~agreed) == 0.0
    assert exits(confidence.flip(0), agreed.flip(0)) == pytest.approx(120 / 200)


def test_a_held_rate_falls_at_the_end() -> None:
    factors = [rate_factor("hold", 0.1, progress) for progress in (0.05, 0.1, 0.5, 0.7, 0.85, 1.0)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 0.5, 0])


def test_the_command_trains_and_names_what_it_measured(
    checkpoint: Callable[[Case], Path], data: Path, tmp_path: Path
) -> None:
    arguments = [str(checkpoint(LLAMA)), str(tmp_path / "out"), "--data", str(data), "--exit-layer", "2"]
    more = ["--tune", "exit", "--exit-layers", "1", "--steps", "2", "--validation-share", "0.2", "--bf16"]
    result = CliRunner().invoke(main, ["train", *arguments, *more, "--schedule", "hold"])
    assert result.exit_code == 0, result.output
    assert "agreement" in result.output
    assert "exits at 99% agreement" in result.output
