from __future__ import annotations

import itertools

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
    assert float(ours.detach()) == pytest.approx(expected, rel=1e-5)


def test_label_smoothing_spreads_the_label_over_all_tokens() -> None:
    logits, labels = torch.randn(5, 7, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 6, 2, 2, 1])
    said = logits.double().log_softmax(-1)
    wanted = 0.9 * torch.eye(7, dtype=torch.float64)[labels] + 0.1 / 7
    assert losses.cross_entropy(logits, labels, 0.1).item() == pytest.approx(-(wanted * said).sum().item(), rel=1e-5)


def test_cross_entropy_of_all_layers_is_weighted_by_depth() -> None:
    logits, labels = RANDOM.normal(size=(4, 9, 13)), RANDOM.integers(0, 13, 9)
    expected = sum((n / 10) * cross_entropy(logits[n - 1], labels) for n in range(1, 5))
    ours = losses.by_depth({n: losses.cross_entropy(tensor(logits[n - 1]), torch.tensor(labels)) for n in range(1, 5)})
    assert float(ours.detach()) == pytest.approx(expected, rel=1e-5)


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
def test_alignment_is_the_best_of_all_that_keep_the_order(seed: int) -> None:
    random = np.random.default_rng(seed)
    distances = random.random((random.integers(1, 6), random.integers(1, 6)))
    rows, columns = distances.shape
    every = itertools.combinations_with_replacement(range(columns), rows)
    best = min(every, key=lambda choice: distances[np.arange(rows), list(choice)].sum())
    assert losses.align(distances) == list(best)


def test_alignment_gives_up_the_nearest_layer_where_the_order_forbids_it() -> None:
    assert losses.align(np.array([[9.0, 1.0], [1.0, 2.0]])) == [1, 1]
    assert losses.align(np.array([[2.0, 1.0], [1.0, 9.0]])) == [0, 0]


def test_dynamic_pairs_follow_distances_of_the_hidden_states() -> None:
    shallow = {layer: RANDOM.normal(size=(7, 4)) for layer in (1, 2, 3)}
    teachers = losses.teacher_layers(3, 12)
    assert teachers == (4, 8, 12)
    # Each teacher is a copy of a shallow layer, with noise.
    copied = dict(zip(teachers, (1, 1, 3), strict=True))
    deep = {layer: shallow[copied[layer]] + 1e-3 * RANDOM.normal(size=(7, 4)) for layer in teachers}
    hidden = {layer: tensor(array) for layer, array in (shallow | deep).items()}
    assert losses.dynamic_pairs(hidden, 3, teachers) == [(1, 4), (1, 8), (3, 12)]


def test_a_teacher_below_the_exit_is_its_own_student_and_adds_nothing() -> None:
    hidden = {layer: tensor(RANDOM.normal(size=(7, 4))) for layer in range(1, 9)}
    teachers = losses.teacher_layers(4, 8)
    assert teachers == (2, 4, 6, 8)
    pairs = losses.dynamic_pairs(hidden, 4, teachers)
    assert pairs[:2] == [(2, 2), (4, 4)]
    whole, above = losses.hidden_distillation(hidden, pairs), losses.hidden_distillation(hidden, pairs[2:])
    assert float(whole.detach()) == pytest.approx(float(above.detach()) / 2, rel=1e-6)


def test_teachers_are_the_authors_choice_for_t5_large() -> None:
    assert losses.teacher_layers(6, 24) == (4, 8, 12, 16, 20, 24)
    assert losses.uniform_pairs(6, 24) == [(1, 4), (2, 8), (3, 12), (4, 16), (5, 20), (6, 24)]


@pytest.mark.parametrize("layers", range(2, 26))
def test_teachers_are_evenly_spaced_over_all_layers(layers: int) -> None:
    for exit_layer in range(1, layers):
        teachers = losses.teacher_layers(exit_layer, layers)
        assert len(set(teachers)) == exit_layer
        assert teachers[-1] == layers
        gaps = np.diff((0, *teachers))
        assert gaps.max() - gaps.min() <= 1
        assert losses.uniform_pairs(exit_layer, layers) == list(enumerate(teachers, start=1))


@pytest.mark.parametrize("loss", ["ce", "kd-dyn", "kd-last", "kd-unif", "weighted-ce", "logit-kd", "kd-dyn-raw"])
def test_kept_layers_hold_every_layer_that_the_loss_asks_for(loss: losses.LossName) -> None:
    for layers in range(2, 13):
        for exit_layer in range(1, layers):
            kept = losses.kept_layers(loss, exit_layer, layers)
            hidden = {layer: tensor(RANDOM.normal(size=(3, 2))) for layer in kept}
            assert {exit_layer, layers} <= set(kept)
            pairs = losses.distilled_pairs(loss, hidden, exit_layer, layers)
            assert {layer for pair in pairs for layer in pair} <= set(kept)
            assert bool(pairs) is loss.startswith("kd-")
