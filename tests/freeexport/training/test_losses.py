from __future__ import annotations

import numpy as np
import pytest
import torch

from freeexport.training import losses

RANDOM = np.random.default_rng(7)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float32, requires_grad=True)


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-log_softmax(logits)[np.arange(len(labels)), labels].sum())


@pytest.mark.parametrize(("exit_layer", "layers"), [(1, 2), (2, 8), (6, 24), (5, 7)])
def test_cross_entropy_of_both_exits_equals_numpy(exit_layer: int, layers: int) -> None:
    shallow, deep = RANDOM.normal(size=(2, 11, 17)) * 3
    labels = RANDOM.integers(0, 17, 11)
    expected = (exit_layer * cross_entropy(shallow, labels) + layers * cross_entropy(deep, labels)) / (
        exit_layer + layers
    )
    ours = losses.by_depth(
        {
            exit_layer: losses.cross_entropy(tensor(shallow), torch.tensor(labels)),
            layers: losses.cross_entropy(tensor(deep), torch.tensor(labels)),
        }
    )
    assert float(ours.sum().detach()) == pytest.approx(expected, rel=1e-5)


def test_logit_distillation_equals_numpy_and_leaves_the_deep_logits_alone() -> None:
    deep, shallow = RANDOM.normal(size=(2, 6, 10)) * 2
    teacher, student = log_softmax(deep), log_softmax(shallow)
    given_deep, given_shallow = tensor(deep), tensor(shallow)
    ours = losses.logit_distillation(given_deep, given_shallow)
    ours.backward()
    assert float(ours.detach()) == pytest.approx(float((np.exp(teacher) * (teacher - student)).sum()), rel=1e-5)
    assert given_deep.grad is None
    assert given_shallow.grad is not None
    assert np.allclose(given_shallow.grad.numpy(), np.exp(student) - np.exp(teacher), atol=1e-6)


def test_hidden_distillation_equals_numpy_and_pulls_only_the_shallow_layer() -> None:
    arrays = {layer: RANDOM.normal(size=(5, 8)) for layer in (1, 2, 4, 6)}
    hidden = {layer: tensor(array) for layer, array in arrays.items()}
    pairs = [(1, 4), (2, 6)]
    expected = np.mean([((arrays[s] - arrays[d]) ** 2).mean(-1).sum() for s, d in pairs])
    ours = losses.hidden_distillation(hidden, pairs)
    ours.backward()
    assert float(ours.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert hidden[4].grad is None
    assert hidden[6].grad is None
    assert hidden[1].grad is not None
    assert np.allclose(hidden[1].grad.numpy(), (arrays[1] - arrays[4]) / 8, atol=1e-6)


@pytest.mark.parametrize("seed", range(25))
def test_each_teacher_takes_the_nearest_student_below_the_one_before(seed: int) -> None:
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


def test_with_states_that_drift_every_student_has_its_own_teacher() -> None:
    """As in a trained model: neighbours are near, so each teacher's nearest free student is the highest one."""
    steps = RANDOM.normal(size=(24, 7, 16)).cumsum(0) + 10 * np.arange(24)[:, None, None]
    states = {layer: tensor(steps[layer - 1]) for layer in range(1, 25)}
    teachers = losses.teacher_layers(6, 24)
    assert losses.dynamic_pairs(states, 6, teachers) == list(zip(range(1, 7), teachers, strict=True))


def test_teachers_left_without_a_student_have_no_pair() -> None:
    assert losses.match(np.array([[9.0, 1.0, 1.0], [9.0, 1.0, 1.0], [9.0, 2.0, 3.0]])) == [(1, 0), (2, 1)]
    assert losses.match(np.array([[1.0], [1.0], [9.0]])) == [(2, 0)]


@pytest.mark.parametrize("layers", [2, 3, 7, 8, 12, 24, 25])
def test_teachers_are_evenly_spaced_over_all_layers(layers: int) -> None:
    assert losses.teacher_layers(6, 24) == (4, 8, 12, 16, 20, 24)  # the authors' choice for T5-large
    for exit_layer in range(1, layers):
        teachers = losses.teacher_layers(exit_layer, layers)
        assert len(set(teachers)) == exit_layer
        assert teachers[-1] == layers
        gaps = np.diff((0, *teachers))
        assert gaps.max() - gaps.min() <= 1


def test_kept_layers_hold_every_layer_that_distillation_asks_for() -> None:
    for layers in range(2, 13):
        for exit_layer in range(1, layers):
            kept = losses.kept_layers("kd-dyn", exit_layer, layers)
            assert {exit_layer, layers} <= set(kept)
            hidden = {layer: tensor(RANDOM.normal(size=(3, 2))) for layer in kept}
            assert losses.dynamic_pairs(hidden, exit_layer, losses.teacher_layers(exit_layer, layers))
