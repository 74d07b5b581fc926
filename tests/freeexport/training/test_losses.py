"""Losses of both exits, as ShallowDeep and FrozenExit compute them, against their definitions in numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Case
from engine_cases import log_softmax
from torch import nn
from training_case import LLAMA, T5, frozen_exit

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.training import losses
from freeexport.training.layer_modules import RMSNorm
from freeexport.training.shallow_deep import ShallowDeep, SharedHead
from freeexport.training.training_options import TrainingOptions
from freeexport.training.tuning import trainable_model
from graphs.families import describe

RANDOM = np.random.default_rng(7)
EXIT, ALPHA, EPSILON = 2, 0.5, 1e-6
LABELS = torch.tensor([[60, 70, 80, 90, 1]])


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float32, requires_grad=True)


def opened_model(directory: Path, alpha: float = ALPHA, exit_layer: int = EXIT) -> ShallowDeep:
    """A model in training mode, without dropout."""
    checkpoint = open_checkpoint(str(directory))
    model = trainable_model(checkpoint, TrainingOptions(Path("unread.jsonl"), exit_layer, dropout=0.0))
    return ShallowDeep(model, describe(checkpoint.config, checkpoint), exit_layer, "kd-dyn", alpha).train()


def batch(module: ShallowDeep) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[35, 60, 70, 80, 90]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": torch.tensor([[0, 60, 70, 80, 90]])} if module.seq2seq else {})


def rms(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    normed: np.ndarray = weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    return normed


def defined(module: ShallowDeep) -> float:
    """(S CE_S + L CE_L) / (S + L) + alpha mean over pairs of the mean square distance of normed states."""
    layers, labels, norm = module.layers, LABELS[0].numpy(), module.head.norm
    out = module.model(**batch(module), output_hidden_states=True, use_cache=False)
    states = out["decoder_hidden_states" if module.seq2seq else "hidden_states"]
    streams = [state[0].detach().double().numpy() for state in states]
    weight, matrix = (part.weight.detach().double().numpy() for part in (norm, module.head.linear))
    epsilon = float(getattr(norm, "variance_epsilon", EPSILON))
    # transformers norms the last of its hidden states.
    normed = {number: rms(streams[number], weight, epsilon) for number in range(1, layers)} | {layers: streams[-1]}
    ce = {
        number: -log_softmax(normed[number] @ matrix.T * module.head.scale)[np.arange(len(labels)), labels].sum()
        for number in (EXIT, layers)
    }

    def distance(student: int, teacher: int) -> float:
        return float(((normed[student] - normed[teacher]) ** 2).mean(-1).sum())

    found, below = [], EXIT + 1
    for teacher in [round(layers * number / EXIT) for number in range(1, EXIT + 1)][::-1]:
        if below > 1:
            nearest, below = min((distance(student, teacher), student) for student in range(1, below))
            found.append(nearest)
    return float((EXIT * ce[EXIT] + layers * ce[layers]) / (EXIT + layers) + ALPHA * np.mean(found))


@pytest.mark.parametrize("case", [T5, LLAMA], ids=lambda case: case.name)
def test_hidden_distillation_matches_its_definition(checkpoint: Callable[[Case], Path], case: Case) -> None:
    module = opened_model(checkpoint(case))
    with torch.no_grad():
        assert float(module(LABELS, **batch(module))["loss"]) == pytest.approx(defined(module), rel=1e-4)


def test_no_gradient_reaches_the_teacher(checkpoint: Callable[[Case], Path]) -> None:
    """The upper layers' gradients are those of their cross-entropy alone, whatever the distillation weighs."""
    gradients = []
    for alpha in (0.0, 100.0):
        module = opened_model(checkpoint(LLAMA), alpha)
        module(LABELS, **batch(module))["loss"].backward()
        gradients.append([layer.mlp.down_proj.weight.grad for layer in module.model.model.layers])
    upper, lower = gradients[0][EXIT:], gradients[0][:EXIT]
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(upper, gradients[1][EXIT:], strict=True))
    assert not any(torch.allclose(a, b, atol=1e-7) for a, b in zip(lower, gradients[1][:EXIT], strict=True))


def test_dropout_after_the_norm_is_drawn_once_per_layer(checkpoint: Callable[[Case], Path]) -> None:
    """One draw a layer: what is distilled is what the head reads. With the exit after layer 1 there is one pair."""
    module = opened_model(checkpoint(T5), exit_layer=1)
    module.head.dropout = nn.Dropout(0.5)
    read, found = list[torch.Tensor](), []
    module.head.linear.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0] / module.head.scale))
    for alpha in (0.0, 1.0):
        torch.manual_seed(3)
        module.alpha = alpha
        with torch.no_grad():
            found.append(float(module(LABELS, **batch(module))["loss"]))
    student, teacher = read[2:]
    assert (student == 0).float().mean() == pytest.approx(0.5, abs=0.1)
    assert found[1] - found[0] == pytest.approx(float((student - teacher).square().mean(-1).sum()), rel=1e-4)


class WithoutLayers(nn.Module):
    """An exit whose head reads the normed states."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def passes(self, states: torch.Tensor, *others: Any) -> list[torch.Tensor]:
        return [states]


def test_frozen_exit_is_read_after_its_own_norm() -> None:
    shallow, deep = RANDOM.normal(size=(2, 7, 8)) * [[[3.0]], [[40.0]]]
    weight, matrix = RANDOM.uniform(0.5, 2.0, 8), RANDOM.normal(size=(11, 8))
    labels = RANDOM.integers(0, 11, 7)
    norm, linear = nn.RMSNorm(8, eps=EPSILON), nn.Linear(8, 11, bias=False)
    norm.weight.data, linear.weight.data = torch.tensor(weight).float(), torch.tensor(matrix).float()
    own = WithoutLayers(RMSNorm(torch.tensor(weight * 1.5), EPSILON))
    module = frozen_exit(own, SharedHead(norm, linear, 1.0), 2, 6).train()
    student, teacher = (
        log_softmax(rms(state, scale * weight, EPSILON) @ matrix.T) for state, scale in ((shallow, 1.5), (deep, 1.0))
    )
    best = torch.tensor(teacher, dtype=torch.float32).topk(11, dim=-1)
    states, nats = torch.tensor(shallow)[None].float(), torch.tensor(-teacher[np.arange(7), labels])
    found = module(states, torch.tensor(labels)[None], best.indices, best.values, best.indices[:, 0], nats)["loss"]
    ce = [-chances[np.arange(7), labels].sum() for chances in (student, teacher)]
    expected = (2 * ce[0] + 6 * ce[1]) / 8 + ALPHA * (np.exp(teacher) * (teacher - student)).sum()
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-4)
    found.backward()
    assert norm.weight.grad is None
    assert own.norm.weight.grad is not None


def test_logit_distillation_matches_numpy_without_gradients_for_the_deep_logits() -> None:
    deep, shallow = RANDOM.normal(size=(2, 6, 10)) * 2
    teacher, student = log_softmax(deep), log_softmax(shallow)
    given_deep, given_shallow = tensor(deep), tensor(shallow)
    ours = losses.logit_distillation(given_deep, given_shallow)
    ours.backward()
    assert float(ours.detach()) == pytest.approx(float((np.exp(teacher) * (teacher - student)).sum()), rel=1e-5)
    assert given_deep.grad is None
    assert given_shallow.grad is not None
    assert np.allclose(given_shallow.grad.numpy(), np.exp(student) - np.exp(teacher), atol=1e-6)


@pytest.mark.parametrize("seed", range(25))
def test_each_teacher_takes_the_nearest_student_below_the_previous_one(seed: int) -> None:
    random = np.random.default_rng(seed)
    distances = random.random((random.integers(1, 7), random.integers(1, 7)))
    teachers, students = distances.shape
    pairs, below = losses.match(distances)[::-1], students
    assert [teacher for teacher, _ in pairs] == list(range(teachers))[::-1][: len(pairs)]
    for teacher, student in pairs:
        assert student < below
        assert all(distances[teacher, student] <= distances[teacher, other] for other in range(below))
        below = student
    assert len(pairs) == teachers or below == 0, "a teacher goes without while a student is free"


def test_drifting_states_give_every_student_its_own_teacher() -> None:
    """As in a trained model: neighbours are near, so each teacher's nearest free student is the highest one."""
    steps = RANDOM.normal(size=(24, 7, 16)).cumsum(0) + 10 * np.arange(24)[:, None, None]
    states = {layer: tensor(steps[layer - 1]) for layer in range(1, 25)}
    teachers = losses.teacher_layers(6, 24)
    assert losses.dynamic_pairs(states, 6, teachers) == list(zip(range(1, 7), teachers, strict=True))


@pytest.mark.parametrize("layers", [2, 3, 7, 8, 12, 24, 25])
def test_teachers_are_evenly_spaced_over_all_layers_and_kept(layers: int) -> None:
    assert losses.teacher_layers(6, 24) == (4, 8, 12, 16, 20, 24)  # the authors' choice for T5-large
    for exit_layer in range(1, layers):
        teachers = losses.teacher_layers(exit_layer, layers)
        assert len(set(teachers)) == exit_layer
        assert teachers[-1] == layers
        gaps = np.diff((0, *teachers))
        assert gaps.max() - gaps.min() <= 1
        assert {exit_layer, *teachers} <= set(losses.kept_layers("kd-dyn", exit_layer, layers))
