"""Trainings of the compared methods, and their losses against references in numpy."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from checkpoints import Case
from click.testing import CliRunner
from engine_cases import log_softmax
from safetensors.numpy import save_file
from torch import nn
from training_case import T5, logged, write_data

from freeexport.checkpoints.exit_file import read_exit_file
from freeexport.cli import main
from freeexport.training.run_directory import open_run
from freeexport.training.shallow_deep import SharedHead
from runtime.errors import FreeExportError, OptionError
from tools.paper import recipes
from tools.paper.losses import HiddenDistillation, Leftover, Mapped, WeightedCrossEntropy, teachers
from tools.paper.recipes import RECIPES, recipe_options, train_recipe

LAYERS, ROWS, WIDTH, TOKENS = 6, 7, 8, 11
RANDOM = np.random.default_rng(11)
STREAMS = RANDOM.normal(size=(LAYERS, ROWS, WIDTH))
STREAMS[5] = STREAMS[1] + 0.1  # layer 6 is nearest to 2, which leaves layer 2 without a lower one
GAIN, MATRIX = RANDOM.uniform(0.5, 2.0, WIDTH), RANDOM.normal(size=(TOKENS, WIDTH))
TARGETS = RANDOM.integers(0, TOKENS, ROWS)
SCALE, EPSILON = 0.3, 1e-6


def normed(layer: int) -> np.ndarray:
    stream = STREAMS[layer - 1]
    state: np.ndarray = GAIN * stream / np.sqrt((stream**2).mean(-1, keepdims=True) + EPSILON)
    return state


def cross_entropy(layer: int) -> float:
    return float(-log_softmax(SCALE * normed(layer) @ MATRIX.T)[np.arange(ROWS), TARGETS].sum())


def distance(pairs: list[tuple[int, int]]) -> float:
    """Return the mean over pairs of mean squared distances, summed over rows."""
    return float(np.mean([((normed(a) - normed(b)) ** 2).mean(-1).sum() for a, b in pairs]))


def computed(loss: Any, exit_layer: int) -> tuple[float, dict[int, torch.Tensor]]:
    """Return a loss and its gradients by layer, or those that are not None."""
    norm, linear = nn.RMSNorm(WIDTH, eps=EPSILON), nn.Linear(WIDTH, TOKENS, bias=False)
    norm.weight.data, linear.weight.data = torch.tensor(GAIN).float(), torch.tensor(MATRIX).float()
    module: Any = SimpleNamespace(head=SharedHead(norm, linear, SCALE), exit_layer=exit_layer, layers=LAYERS)
    kept = {exit_layer, LAYERS, *loss.layers(exit_layer, LAYERS)}
    hidden = {layer: torch.tensor(STREAMS[layer - 1]).float().requires_grad_() for layer in sorted(kept)}
    total = loss.total(module, hidden, torch.tensor(TARGETS))
    total.backward()
    return float(total.detach()), {n: state.grad for n, state in hidden.items() if state.grad is not None}


def test_weighted_cross_entropy_is_the_mean_over_layers_by_depth() -> None:
    expected = sum(layer * cross_entropy(layer) for layer in range(1, LAYERS + 1)) / 21
    found, gradients = computed(WeightedCrossEntropy(), 2)
    assert found == pytest.approx(expected, rel=1e-5)
    assert set(gradients) == set(range(1, LAYERS + 1))


def nearest(exit_layer: int, leftover: Leftover) -> list[tuple[int, int]]:
    """Match as the paper says, one teacher after the other from the deepest down."""
    pairs, bound = [], exit_layer + 1
    for teacher in reversed(teachers(exit_layer, LAYERS)):
        below = range(1, bound)
        if below:
            bound = min(below, key=lambda layer: distance([(layer, teacher)]))
            pairs.append((bound, teacher))
        elif leftover == "reuse":
            pairs.append((bound, teacher))
    return pairs


@pytest.mark.parametrize("alpha", [0.5, 2.0])
@pytest.mark.parametrize(
    ("mapping", "leftover", "pairs"),
    [
        ("dyn", "reuse", nearest(3, "reuse")),
        ("dyn", "drop", nearest(3, "drop")),
        ("unif", "reuse", [(1, 2), (2, 4), (3, 6)]),
        ("last", "reuse", [(3, 6)]),
    ],
)
def test_distillation_matches_its_definition(
    mapping: Mapped, leftover: Leftover, pairs: list[tuple[int, int]], alpha: float
) -> None:
    found, gradients = computed(HiddenDistillation(mapping, alpha, leftover), 3)
    exits = (3 * cross_entropy(3) + 6 * cross_entropy(6)) / 9
    assert found == pytest.approx(exits + alpha * distance(pairs), rel=1e-5)
    students = {student for student, teacher in pairs if student != teacher}
    assert set(gradients) - {layer for layer, grad in gradients.items() if not grad.any()} == {3, 6, *students}


def spaced(*positions: float) -> dict[int, torch.Tensor]:
    """Return states of one row and one feature at these positions, by layer."""
    return {number: torch.tensor([[position]]) for number, position in enumerate(positions, 1)}


@pytest.mark.parametrize(
    ("states", "dyn", "dropped"),
    [
        # Layer 6 is nearest to 3, layer 4 to 2, layer 2 to 1.
        (spaced(1.0, 2.0, 3.0, 2.1, 9.0, 3.1), {(3, 6), (2, 4), (1, 2)}, {(3, 6), (2, 4), (1, 2)}),
        # Layer 6 is nearest to 2, so layer 4 takes 1, and layer 2 is left over.
        (spaced(1.0, 2.0, 3.0, 2.9, 9.0, 2.2), {(2, 6), (1, 4), (1, 2)}, {(2, 6), (1, 4)}),
        # Layer 6 takes 1: nothing is left for two teachers.
        (spaced(1.0, 2.0, 3.0, 2.9, 9.0, 0.9), {(1, 6), (1, 4), (1, 2)}, {(1, 6)}),
    ],
)
def test_layer_mappings_match_hand_computed_cases(
    states: dict[int, torch.Tensor], dyn: set[tuple[int, int]], dropped: set[tuple[int, int]]
) -> None:
    found = HiddenDistillation().pairs(states, 3, 6)
    assert (len(found), set(found)) == (3, dyn)
    assert set(HiddenDistillation(leftover="drop").pairs(states, 3, 6)) == dropped
    assert HiddenDistillation("unif").pairs(states, 3, 6) == [(1, 2), (2, 4), (3, 6)]
    assert HiddenDistillation("last").pairs(states, 3, 6) == [(3, 6)]


@pytest.mark.parametrize(
    ("exit_layer", "layers", "expected"),
    [
        (4, 24, (6, 12, 18, 24)),
        (6, 24, (4, 8, 12, 16, 20, 24)),
        (8, 24, (3, 6, 9, 12, 15, 18, 21, 24)),
        (10, 24, (3, 6, 8, 11, 13, 16, 18, 20, 22, 24)),
        (12, 24, tuple(range(2, 25, 2))),
        (3, 12, (4, 8, 12)),
    ],
)
def test_teachers_match_the_authors_choice(exit_layer: int, layers: int, expected: tuple[int, ...]) -> None:
    assert teachers(exit_layer, layers) == expected


def test_recipes_follow_the_authors_settings() -> None:
    free = RECIPES["free"].loss
    assert isinstance(free, HiddenDistillation)
    assert (free.mapping, free.alpha, free.leftover) == ("dyn", 0.5, "reuse")
    options = recipe_options(RECIPES["free-lora"], Path("a"), exit_layer=6, epochs=20)
    assert (options.tune, options.lora_rank, options.rate, options.warmup) == ("lora", 64, 1e-4, 0.0)
    assert (options.select_by, options.patience, options.epoch_count, options.truncate) == ("last", 0, 20, True)
    assert recipe_options(RECIPES["free"], Path("a"), exit_layer=6, warmup=0.1).warmup == 0.1


def test_run_records_the_options_of_its_loss() -> None:
    """A resumed run with another alpha must be refused."""
    records = []
    for alpha in (0.5, 2.0):
        recipe = replace(RECIPES["free"], loss=HiddenDistillation(alpha=alpha))
        records.append(recipe_options(recipe, Path("a"), exit_layer=2).recorded())
    assert json.loads(json.dumps(records[0]))["loss"] == {"alpha": 0.5, "leftover": "reuse", "mapping": "dyn"}
    assert records[0] != records[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exit_layer": 0}, "--exit-layer is 0; the decoder has"),
        ({"exit_layer": T5.layers}, f"--exit-layer is {T5.layers}; the decoder has {T5.layers} layers"),
        ({"device": "cuda:99"}, "device cuda:99 is not there"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"steps": 0}, "--steps is 0"),
    ],
)
def test_invalid_input_is_refused_before_training(
    checkpoint: Callable[[Case], Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_data(tmp_path)
    given = {"exit_layer": 2, "steps": 1, **change}
    device = given.pop("device", "cpu")

    def run() -> None:
        options = recipe_options(RECIPES["free"], tmp_path / "train.jsonl", **given)
        train_recipe(str(checkpoint(T5)), tmp_path / "out", options, device)

    with pytest.raises(OptionError, match=message):
        run()
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "validation.jsonl"}


def test_training_runs_in_a_child_process_that_sees_one_device(
    checkpoint: Callable[[Case], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(recipes, "train", lambda *call: calls.append(call))

    def run_here(module: str, call: str, variables: dict[str, str]) -> None:
        assert (module, variables) == ("tools.paper.recipes", {"CUDA_VISIBLE_DEVICES": ""})
        recipes.main([call])

    monkeypatch.setattr(recipes, "run_child", run_here)
    write_data(tmp_path)
    options = recipe_options(RECIPES["free"], tmp_path / "train.jsonl", exit_layer=2, threads=1)
    train_recipe(str(checkpoint(T5)), tmp_path / "out", options)
    assert calls == [(str(checkpoint(T5)), tmp_path / "out", options)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_training_ends_with_its_parent_process(
    number: signal.Signals, checkpoint: Callable[[Case], Path], tmp_path: Path
) -> None:
    write_data(tmp_path)
    out = tmp_path / "out"
    # A shell starts jobs in the background with SIGINT ignored, which this process would inherit.
    script = (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path\nfrom tools.paper.recipes import *\n"
        f"data, out = Path({str(tmp_path / 'train.jsonl')!r}), Path({str(out)!r})\n"
        "options = recipe_options(RECIPES['static'], data, exit_layer=2, steps=10**6, threads=1)\n"
        f"train_recipe({str(checkpoint(T5))!r}, out, options)\n"
    )
    parent = psutil.Popen([sys.executable, "-c", script])
    while not (tmp_path / "out.training" / "metrics.jsonl").exists():
        assert parent.poll() is None
        time.sleep(0.05)
    children = parent.children(recursive=True)
    assert children
    parent.send_signal(number)
    left = psutil.wait_procs([parent, *children], timeout=30)[1]
    for process in left:
        process.kill()
    assert left == []


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_trains_and_its_checkpoint_converts(
    name: str, checkpoint: Callable[[Case], Path], tmp_path: Path
) -> None:
    write_data(tmp_path)
    recipe, out = RECIPES[name], tmp_path / "out"
    settings = {"exit_layer": 2, "steps": 3, "batch_tokens": 160, "learning_rate": 3e-3, "threads": 1}
    validation = tmp_path / "validation.jsonl"
    options = recipe_options(recipe, tmp_path / "train.jsonl", validation=validation, **settings)
    train_recipe(str(checkpoint(T5)), out, options)
    assert len(logged(out)) == 3
    losses = logged(out, "eval_loss")
    assert losses[-1] < losses[0]
    exit_file = read_exit_file(out)
    assert exit_file is not None
    assert (exit_file.exit_layer, exit_file.tune) == (2, recipe.tune)
    assert exit_file.trained == (name != "full")
    layer = "1" if name in ("static", "calm") else "2"
    result = CliRunner().invoke(main, ["convert", str(out), str(tmp_path / "bundle"), "--exit-layer", layer])
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_interrupted_training_of_another_loss_is_refused(checkpoint: Callable[[Case], Path], tmp_path: Path) -> None:
    write_data(tmp_path)
    model = str(checkpoint(T5))
    free, other = (
        recipe_options(RECIPES[name], tmp_path / "train.jsonl", exit_layer=2, steps=3) for name in ("free", "free-drop")
    )
    open_run(tmp_path / "out", model, other)
    saved = tmp_path / "out.training" / "checkpoint-2"
    saved.mkdir()
    save_file({"a": np.zeros(2, np.float32)}, saved / "model.safetensors")
    torch.save({}, saved / "optimizer.pt")
    (saved / "trainer_state.json").write_text('{"global_step": 2}')
    (saved / "elapsed.json").write_text("1.5")
    with pytest.raises(FreeExportError, match=r"had loss .*'drop'.* not .*'reuse'"):
        train_recipe(model, tmp_path / "out", free)
    assert saved.exists()
