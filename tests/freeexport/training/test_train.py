"""Each way of tuning: what it trains, and what it leaves alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import BY_NAME, Case
from command_line import succeed
from safetensors.torch import load_file, save_file
from training_case import LLAMA, T5, Runs, evaluated, logged, run_options, tensors
from transformers import PretrainedConfig, PreTrainedModel

from freeexport.checkpoints.checkpoint import CheckpointError, open_checkpoint
from freeexport.checkpoints.examples import DataError
from freeexport.checkpoints.exit_file import EXIT_WEIGHTS, LossName, read_exit_file
from freeexport.checkpoints.tokenizer_files import load_tokenizer
from freeexport.checkpoints.transformers_model import greedy_ids, reference_model
from freeexport.training import train as training
from freeexport.training import tuning
from freeexport.training.batches import examples
from freeexport.training.shallow_deep import IGNORED
from freeexport.training.train import train
from freeexport.training.trainer import ExitTrainer, decided_rows, oracle_exits, rate_factor
from freeexport.training.training_options import TrainingOptions
from graphs.families import describe
from runtime.errors import OptionError

ROOT = Path(__file__).parents[3]
Directory = Callable[[Case], Path]
ONE_BATCH: dict[str, Any] = {"loss": "ce", "dropout": 0.0, "steps": 2, "evaluate_every": 2, "batch_tokens": 10_000}
EXIT_OF_LAYERS: dict[str, Any] = {"exit_head_layers": 2, "steps": 12, "evaluate_every": 6, "learning_rate": 3e-3}


def test_prompt_tokens_and_forced_first_tokens_cannot_exit() -> None:
    labels = torch.tensor([[IGNORED, 5, 6, 7], [8, 9, IGNORED, IGNORED], [IGNORED, IGNORED, 4, IGNORED]])
    assert decided_rows(labels, seq2seq=True).tolist() == [False, True, True, True, True, False]
    assert decided_rows(labels, seq2seq=False).tolist() == [False, True, True, False, True, False]


@pytest.mark.parametrize(("case", "loss"), [(T5, "kd-dyn"), (LLAMA, "logit-kd"), (LLAMA, "deep-ce")])
def test_every_loss_trains_the_whole_model(checkpoint: Directory, case: Case, loss: LossName, run: Runs) -> None:
    out, result = run(case, loss=loss)
    assert result.steps == len(logged(out)) == 3
    before, after = tensors(checkpoint(case)), tensors(out)
    assert before.keys() == after.keys()
    assert all(not np.array_equal(before[name], after[name]) for name in before if "relative" not in name)
    exit_file = read_exit_file(out)
    assert exit_file is not None
    assert (exit_file.exit_layer, exit_file.loss, exit_file.has_parameters) == (2, loss, False)
    assert exit_file.trained == bool(result.verdict) == (loss != "deep-ce")
    assert (result.metrics["eval_loss"] == result.metrics["eval_deep_loss"]) == (loss == "deep-ce")
    assert exit_file.base_sha256 == open_checkpoint(str(checkpoint(case))).sha256
    assert not out.with_name("out.training").exists()
    assert reference_model(open_checkpoint(str(out))).config.vocab_size == 288


@pytest.mark.parametrize(("case", "options"), [(T5, {}), (LLAMA, EXIT_OF_LAYERS)], ids=["t5", "llama-layers"])
def test_lora_adapter_reads_as_the_merged_model(
    checkpoint: Directory, words: Path, case: Case, options: dict[str, Any], run: Runs
) -> None:
    out, trained = run(case, tune="lora", rank=4, **{"learning_rate": 1e-2, **options})
    opened, base = open_checkpoint(str(out)), open_checkpoint(str(checkpoint(case)))
    assert opened.exit is not None
    assert (opened.exit.tune, opened.exit.exit_layers) == ("lora", options.get("exit_head_layers", 0))
    before, state = tensors(checkpoint(case)), reference_model(opened).state_dict()
    changed = set()
    for name in before:
        read = opened.read(name)
        assert np.allclose(read, state[name].numpy(), atol=1e-6), name
        if not np.array_equal(read, before[name]):
            changed.add(name)
    not_adapted = ("embed", "shared", "relative", "lm_head")
    assert changed == {
        name for name, array in before.items() if array.ndim == 2 and not any(part in name for part in not_adapted)
    }
    assert opened.sha256 != base.sha256
    # FREE's setting for T5-3B is rank 64, alpha 128, dropout 0.1.
    written = json.loads((out / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["lora_dropout"]) == (4, 8, 0.1)
    for name, value in evaluated(out, run_options(words, **options)).items():
        assert trained.metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-3, abs=1e-3), name
    if options:  # its exit can be trained further, alone
        alone = out.with_name("alone")
        train(str(out), alone, run_options(words, **{**options, "tune": "exit", "steps": 4, "learning_rate": 1e-4}))
        further = open_checkpoint(str(alone))
        assert further.exit is not None
        assert (further.exit.tune, further.adapter) == ("exit", alone)
        assert all(np.array_equal(further.read(name), opened.read(name)) for name in before)
        assert not np.array_equal(further.read("exit.norm.weight"), opened.read("exit.norm.weight"))
        assert further.sha256 != opened.sha256
        # So can both.
        both = out.with_name("both")
        train(str(out), both, run_options(words, **{**options, "tune": "lora", "steps": 2, "evaluate_every": 2}))
        went_on, was = (load_file(path / "adapter_model.safetensors") for path in (both, out))
        assert went_on.keys() == was.keys()
        assert all(went_on[name].shape == was[name].shape and not torch.equal(went_on[name], was[name]) for name in was)
        config = json.loads((both / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == written["base_model_name_or_path"]
    else:  # the merged weights can be trained further, all of them
        merged = out.with_name("merged")
        train(str(out), merged, run_options(words, steps=2, learning_rate=1e-2, evaluate_every=2))
        went_on = tensors(merged)
        assert not any(np.array_equal(went_on[name], state[name].numpy()) for name in changed)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (LLAMA, {"exit_head_layers": 2, "learning_rate": 3e-3}),
        (T5, {"exit_head_layers": 2, "learning_rate": 3e-3}),
        (BY_NAME["m2m100"], {"exit_head_layers": 1, "exit_layer": 1, "learning_rate": 3e-3}),
    ],
    ids=["llama-layers", "t5-layers", "m2m100-layers"],
)
def test_exit_training_leaves_the_base_bit_identical(
    checkpoint: Directory, words: Path, case: Case, options: dict[str, Any], run: Runs
) -> None:
    out, trained = run(case, **{"tune": "exit", "steps": 24, "evaluate_every": 8, "learning_rate": 1e-2, **options})
    opened, base = open_checkpoint(str(out)), checkpoint(case)
    assert opened.exit is not None
    assert opened.exit.exit_layers == options["exit_head_layers"]
    assert (out / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    final = describe(opened.config, opened).decoder.head.norm
    assert final is not None
    assert not np.array_equal(opened.read("exit.norm.weight"), opened.read(final.weight))
    assert len(opened.sha256) == 64
    shallow, deep = logged(out, "eval_shallow_loss"), logged(out, "eval_deep_loss")
    assert shallow[-1] < shallow[0]
    assert max(deep) - min(deep) < 1e-5
    # States are kept in half precision.
    for name, value in evaluated(out, run_options(words, tune="exit", **options)).items():
        assert trained.metrics[f"eval_{name}"] == pytest.approx(value, rel=0.02, abs=0.02), name


def test_exit_of_t5gemma_is_trained(words: Path, run: Runs) -> None:
    options = {"tune": "exit", "exit_head_layers": 1, "exit_layer": 1}
    out, trained = run(BY_NAME["t5gemma2"], **options, steps=1, evaluate_every=1, learning_rate=1e-2)
    opened = open_checkpoint(str(out))
    assert opened.exit is not None
    assert opened.exit.exit_layers == 1
    values = evaluated(out, run_options(words, **options))  # the model's own encoder and decoder
    for key, value in values.items():
        assert trained.metrics[f"eval_{key}"] == pytest.approx(value, rel=0.02, abs=0.02), key


@pytest.mark.parametrize("tune", ["full", "exit"])
def test_gradient_accumulation_equals_one_large_batch(tune: Any, run: Runs) -> None:
    alike = ONE_BATCH if tune == "full" else {**ONE_BATCH, "tune": tune, "exit_head_layers": 1}
    outs = [run(T5, **alike).out, run(T5, **{**alike, "batch_tokens": 130, "accumulate": 20}).out]
    results = [(logged(out)[0], logged(out, "grad_norm")[0]) for out in outs]
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_gradient_checkpointing_and_bf16_change_little(run: Runs) -> None:
    changes: tuple[dict[str, Any], ...] = ({}, {"gradient_checkpointing": True}, {"bf16": True})
    curves = [logged(run(LLAMA, dropout=0.0, loss="kd-dyn", **change).out) for change in changes]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0] == pytest.approx(curves[2], rel=0.03)
    assert curves[0] != curves[2]


def test_random_weights_are_created_from_a_configuration(checkpoint: Directory, words: Path, tmp_path: Path) -> None:
    source = tmp_path / "configuration"
    source.mkdir()
    for path in checkpoint(T5).glob("*.json"):
        (source / path.name).write_bytes(path.read_bytes())
    options = run_options(words, from_config=True, steps=1, evaluate_every=1, dtype="float16")
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        train(str(source), tmp_path / name, replace(options, seed=seed))
    first, again, other = (tensors(tmp_path / name) for name in ("first", "again", "other"))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert any(not np.array_equal(first[name], other[name]) for name in first)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        train(str(tmp_path), tmp_path / "none", options)
    assert not (tmp_path / "none.training").exists()


def test_model_and_exit_are_trained_jointly_and_further(
    checkpoint: Directory, words: Path, run: Runs, tmp_path: Path
) -> None:
    together, trained = run(LLAMA, **{**EXIT_OF_LAYERS, "learning_rate": 1e-3})
    options = run_options(words, exit_head_layers=2)
    measured = evaluated(together, options)
    for name, value in measured.items():
        assert trained.metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-3, abs=1e-3), name
    shallow = logged(together, "eval_shallow_loss")
    assert shallow[-1] < shallow[0]
    before, after = open_checkpoint(str(checkpoint(LLAMA))), open_checkpoint(str(together))
    assert not np.array_equal(before.read("model.norm.weight"), after.read("model.norm.weight"))
    for tune in ("exit", "full"):
        out = tmp_path / tune
        still = replace(options, tune=tune, steps=1, evaluate_every=1, learning_rate=1e-12)
        assert train(str(together), out, still).metrics["eval_shallow_loss"] == pytest.approx(
            measured["shallow_loss"], rel=0.02
        )
        assert len(open_checkpoint(str(out)).sha256) == 64  # its exit belongs to these weights
        again = open_checkpoint(str(out)).read("exit.norm.weight")
        np.testing.assert_allclose(again, after.read("exit.norm.weight"), atol=1e-6)
    assert (tmp_path / "exit" / "model.safetensors").read_bytes() == (together / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="the same --exit-layer, --exit-head-layers"):
        train(str(together), tmp_path / "other", replace(options, exit_head_layers=1))


def test_adapter_with_an_exit_can_be_moved_relative_to_its_base(
    checkpoint: Directory, words: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(checkpoint(LLAMA), tmp_path / "m")
    train(str(base), tmp_path / "n", run_options(words, tune="lora", rank=4, **EXIT_OF_LAYERS))
    found = open_checkpoint(str(tmp_path / "n")).sha256
    assert open_checkpoint(str((tmp_path / "n").rename(tmp_path / "a"))).sha256 == found


def test_exit_of_another_adapter_is_refused(run: Runs, tmp_path: Path) -> None:
    out, _ = run(LLAMA, tune="lora", rank=4, **EXIT_OF_LAYERS)
    other = Path(shutil.copytree(out, tmp_path / "other"))
    weights = load_file(other / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] += 1
    save_file(weights, other / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="its exit was trained on other weights"):
        _ = open_checkpoint(str(other)).sha256
    (other / EXIT_WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"exit\.safetensors is missing"):
        open_checkpoint(str(other))


def chrf_of_outputs(directory: Path, options: TrainingOptions) -> float:
    """Decode one prompt at a time."""
    import sacrebleu

    opened = open_checkpoint(str(directory))
    tokenizer, model = load_tokenizer(opened), reference_model(opened)
    _, validation, _ = examples(opened, describe(opened.config, opened), options)
    most = 2 * max(len(one.target) for one in validation)
    outputs = [ids for one in validation for ids in greedy_ids(model, opened, [one.prompt], most)]
    texts, targets = (
        [tokenizer.decode(ids, skip_special_tokens=True) for ids in part]
        for part in (outputs, [one.target for one in validation])
    )
    return float(sacrebleu.corpus_chrf(texts, [targets]).score) / 100


def test_weights_of_the_best_outputs_are_kept(run: Runs, words: Path) -> None:
    pytest.importorskip("sacrebleu")
    out, result = run(T5, select_by="chrf", steps=4, evaluate_every=2, learning_rate=3e-3, patience=0)
    found = logged(out, "eval_chrf")
    assert len(found) == 3  # one before the first step
    assert result.metrics["eval_chrf"] == max(found[1:])
    assert result.best_step == 2 * (1 + found[1:].index(max(found[1:])))
    assert chrf_of_outputs(out, run_options(words)) == pytest.approx(max(found[1:]), abs=1e-6)


def test_last_weights_are_kept_on_request_even_if_worse(
    checkpoint: Directory, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the loss, the weights from before training would be kept, and patience 1 would end the run."""
    options = run_options(words, loss="ce", select_by="last", learning_rate=5.0, evaluate_every=1, patience=1)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(ExitTrainer, "best", killed)  # after the last step, before the end
        with pytest.raises(RuntimeError, match="killed"):
            train(str(checkpoint(LLAMA)), out, options)
    result = train(str(checkpoint(LLAMA)), out, replace(options, resume=True))
    assert (result.best_step, result.steps) == (3, 3)
    assert result.metrics["eval_loss"] > result.before["eval_loss"]
    assert evaluated(out, options)["deep_loss"] == pytest.approx(result.metrics["eval_deep_loss"], rel=1e-4)


def killed(*arguments: Any) -> None:
    raise RuntimeError("killed")


class WithoutLinear(PreTrainedModel):
    """A model of an embedding and a head."""

    config_class = PretrainedConfig

    def __init__(self) -> None:
        super().__init__(PretrainedConfig())
        self.head = torch.nn.Linear(2, 4)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


def test_lora_is_refused_for_a_model_without_linear_layers(words: Path) -> None:
    given: Any = SimpleNamespace(encoder=None)
    with pytest.raises(OptionError, match="bare has no linear layers that LoRA could adapt"):
        tuning._adapted(WithoutLinear(), "bare", None, given, run_options(words, tune="lora"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"loss": "hinge"}, "--loss 'hinge' is unknown"),
        ({"tune": "head"}, "--tune 'head' is unknown"),
        ({"tune": "exit", "exit_head_layers": 1, "loss": "kd-dyn"}, "which --tune exit freezes"),
        ({"tune": "exit"}, "give --exit-head-layers 1 or more, or train the model with --tune full or lora"),
        ({"schedule": "cosine"}, "--schedule 'cosine' is unknown; choose linear, hold"),
        ({"tune": "lora", "from_config": True}, "needs trained weights"),
        ({"steps": 3, "epochs": 1.0}, "contradict"),
        ({"steps": 0}, "--steps is 0"),
        ({"time_limit": 0.0}, "--time-limit is 0.0"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan"),
        ({"dropout": 1.0}, "--dropout is 1.0"),
        ({"epochs": float("inf"), "steps": None}, "--epochs is inf"),
        ({"loss_alpha": float("inf")}, "--loss-alpha is inf"),
        ({"loss": "ce", "loss_alpha": 4.0}, "--loss-alpha is the weight of a distillation, and --loss ce has none"),
        ({"threads": 0}, "--threads is 0; give at least 1"),
        ({"tune": "lora", "rank": 0}, "--rank is 0; give at least 1"),
        ({"rank": 4}, "--rank is for --tune lora, not for --tune full"),
        ({"tune": "exit", "exit_head_layers": 1, "rank": 4}, "--rank is for --tune lora, not for --tune exit"),
        ({"max_new_tokens": 0}, "--max-new-tokens is 0"),
        ({"exit_head_layers": -1}, "--exit-head-layers is -1"),
        ({"loss": "weighted-ce"}, "--loss 'weighted-ce' is unknown; choose ce, kd-dyn, logit-kd, deep-ce"),
        ({"exit_vocab": 99, "loss": "deep-ce"}, "--loss deep-ce is for an exit without"),
        ({"exit_vocab": 0}, "--exit-vocab is 0"),
        ({"select_by": "beauty"}, "'beauty' is no metric; choose from exact"),
        ({"select_by": "chrf", "tune": "exit", "exit_head_layers": 1}, "--select-by chrf measures the whole model"),
        ({"resume": True, "overwrite": True}, "contradict"),
    ],
)
def test_invalid_options_are_refused(words: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        run_options(words, **change)


@pytest.mark.parametrize(
    ("case", "change", "reason"),
    [
        (LLAMA, {"exit_layer": 0}, "has 5 layers: 1 to 4, or 0 with --exit-input feature"),
        (LLAMA, {"exit_layer": 5}, "has 5 layers: 1 to 4"),
        (LLAMA, {"exit_head_layers": 4}, "at most 3 make sense"),
        (LLAMA, {"exit_vocab": 3}, "3 special ones, which are always kept: choose 4 to 287"),
        (LLAMA, {"max_tokens": 3}, "none of the 40 examples fits 3"),
        (LLAMA, {"data": "one.jsonl"}, "one example"),
        (LLAMA, {"validation": "missing.jsonl"}, r"missing\.jsonl does not exist"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused_before_reading_weights(
    checkpoint: Directory,
    words: Path,
    case: Case,
    change: dict[str, Any],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "one.jsonl").write_text('{"input": "a", "target": "b"}\n')
    change = {name: tmp_path / value if isinstance(value, str) else value for name, value in change.items()}
    monkeypatch.setattr("freeexport.training.tuning.reference_model", None)
    with pytest.raises((OptionError, DataError), match=reason):
        train(str(checkpoint(case)), tmp_path / "out", replace(run_options(words), **change))
    assert [path.name for path in tmp_path.iterdir()] == ["one.jsonl"]


def test_checkpoint_with_its_own_exit_is_refused_without_the_same_options(
    words: Path, run: Runs, tmp_path: Path
) -> None:
    out, _ = run(LLAMA, tune="exit", steps=24, evaluate_every=8, learning_rate=3e-3, exit_head_layers=2)
    with pytest.raises(CheckpointError, match="has an exit of its own"):
        train(str(out), tmp_path / "again", run_options(words))


@pytest.mark.parametrize("schedule", ["linear", "hold"])
def test_learning_rate_warms_up_and_never_rises_again(schedule: Any) -> None:
    factors = [rate_factor(schedule, 0.1, step / 100) for step in range(101)]
    assert factors[:6:5] == pytest.approx([0, 0.5])
    assert max(factors) == pytest.approx(1.0) == factors[10]
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] < 1e-9
    assert factors[55] == pytest.approx(0.5 if schedule == "linear" else 1.0)


def test_oracle_exits_are_the_most_confident_tokens_that_agree_often_enough() -> None:
    confidence = torch.linspace(1, 0, 200)
    agreed = torch.ones(200, dtype=torch.bool)
    agreed[[50, 120, 121, 122]] = False
    # 1 of 101 is too many, 1 of 100 is not... and later the share is never high enough again.
    assert oracle_exits(confidence, agreed) == pytest.approx(120 / 200)
    assert oracle_exits(confidence, ~agreed) == 0.0
    assert oracle_exits(confidence.flip(0), agreed.flip(0)) == pytest.approx(120 / 200)


@pytest.mark.skipif(torch.cuda.is_available(), reason="bfloat16 is fast on a GPU")
@pytest.mark.parametrize("fast", [False, True])
def test_train_prints_the_results(
    checkpoint: Directory, words: Path, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freeexport.training.train.multiplies_bfloat16", lambda: fast)
    arguments = ["train", str(checkpoint(LLAMA)), str(tmp_path / "out"), "--data", str(words / "train.jsonl")]
    given = ["--exit-layer", "1", "--steps", "2", "--bf16", "--max-tokens", "18", "--evaluate-every", "2"]
    result = succeed(*arguments, *given, *(["--truncate"] if fast else ["--json"]))
    assert ("warning: --bf16 is slow" in result.stderr) is not fast
    if fast:
        assert "inputs are cut, so that examples have 18 tokens" in result.stderr
        assert "left out" not in result.stderr
        assert "oracle exits" in result.stdout
        assert "verdict: " in result.stdout
        assert result.stdout.splitlines()[-1].startswith(f"next: freeexport convert {tmp_path / 'out'}")
    else:
        assert json.loads(result.stdout)["steps"] == 2
        assert "examples are longer than 18 tokens and are left out" in result.stderr


@pytest.mark.slow
def test_two_processes_train_like_one(checkpoint: Directory, words: Path, run: Runs, tmp_path: Path) -> None:
    one, _ = run(T5, **ONE_BATCH)
    arguments = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "freeexport", "train", str(checkpoint(T5)), str(tmp_path / "two")),
        *("--data", str(words / "train.jsonl"), "--validation", str(words / "validation.jsonl")),
        *("--exit-layer", "2", "--steps", "2", "--batch-tokens", "420", "--accumulate", "2"),
        *("--evaluate-every", "2", "--loss", "ce", "--dropout", "0"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert logged(tmp_path / "two") == pytest.approx(logged(one), rel=1e-4)
    # After the steps Adam has amplified the rounding of another order of summation: 1.2e-4 on transformers 4.57.
    assert logged(tmp_path / "two", "eval_loss") == pytest.approx(logged(one, "eval_loss"), rel=5e-4)


@pytest.mark.parametrize(
    ("fast", "bf16", "said"),
    [(True, False, "give --bf16"), (False, True, "--bf16 is slow"), (True, True, ""), (False, False, "")],
)
def test_bfloat16_is_recommended_by_processor(
    fast: bool, bf16: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "multiplies_bfloat16", lambda: fast)
    note = training.bfloat16_note(bf16)
    assert said in note
    assert bool(said) == bool(note)


def test_step_is_timed_repeatedly_and_the_better_half_counts() -> None:
    # Steps of 1 s, and then two that other work disturbed; of 37 s each at first.
    assert training.better_half([(0.0, 0), (1.0, 100), (2.0, 200), (12.0, 300), (22.0, 400)]) == (1.0, 100.0)
    assert training.better_half([(0.0, 0), (37.0, 100), (74.0, 200), (75.0, 300), (76.0, 400)]) == (1.0, 100.0)
    assert training.better_half([(0.0, 0), (2.0, 100)]) == (2.0, 50.0)


def test_torch_is_imported_after_the_thread_wait_policy_is_set() -> None:
    """torch's OpenMP reads the policy when it is loaded."""
    program = "import sys, freeexport.commands.train; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert result.stdout == "False\n"
