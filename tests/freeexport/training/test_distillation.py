"""Distillation of hidden states as ShallowDeep and FrozenExit do it, against the definition written in numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import CASES, Case
from torch import nn
from training_case import frozen_exit

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.exit_file import LossName
from freeexport.training.exit_modules import AdaptedExit
from freeexport.training.options import TrainingOptions
from freeexport.training.shallow_deep import ShallowDeep, SharedHead
from freeexport.training.tuning import trainable_model
from graphs.families import describe

T5, LLAMA = (next(case for case in CASES if case.name == name) for name in ("t5-deep-decoder", "llama-tied"))
EXIT, ALPHA, EPSILON = 2, 0.5, 1e-6
LABELS = torch.tensor([[60, 70, 80, 90, 1]])


def opened_model(directory: Path, loss: LossName, alpha: float = ALPHA, exit_layer: int = EXIT) -> ShallowDeep:
    """In training mode, without dropout."""
    checkpoint = open_checkpoint(str(directory))
    model = trainable_model(checkpoint, TrainingOptions(Path("unread.jsonl"), exit_layer, dropout=0.0))
    return ShallowDeep(model, describe(checkpoint.config, checkpoint), exit_layer, loss, alpha).train()


def batch(module: ShallowDeep) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[35, 60, 70, 80, 90]])
    inputs = {"labels": LABELS, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": torch.tensor([[0, 60, 70, 80, 90]])} if module.seq2seq else {})


def final_norm(module: ShallowDeep) -> nn.Module:
    norm: nn.Module = module.model.decoder.final_layer_norm if module.seq2seq else module.model.model.norm
    return norm


def rms(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    normed: np.ndarray = weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    return normed


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def residual_streams(module: ShallowDeep) -> dict[int, np.ndarray]:
    """Outputs of all layers [N, d], by hooks of our own."""
    layers = module.model.decoder.block if module.seq2seq else module.model.model.layers
    streams: dict[int, np.ndarray] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            streams[number] = state.detach().double().numpy().reshape(-1, state.shape[-1])

        return hook

    handles = [layer.register_forward_hook(keep(number)) for number, layer in enumerate(layers, start=1)]
    module(**batch(module))
    for handle in handles:
        handle.remove()
    return streams


def defined(module: ShallowDeep) -> float:
    """(S CE_S + L CE_L) / (S + L) + alpha mean over pairs of the mean square distance of normed states."""
    norm = final_norm(module)
    weight = norm.weight.detach().double().numpy()
    epsilon = float(getattr(norm, "variance_epsilon", EPSILON))
    normed = {number: rms(state, weight, epsilon) for number, state in residual_streams(module).items()}
    layers, labels = module.layers, LABELS[0].numpy()
    matrix = module.head.linear.weight.detach().double().numpy()
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
def test_the_loss_is_what_the_definition_in_numpy_gives(checkpoint: Callable[[Case], Path], case: Case) -> None:
    module = opened_model(checkpoint(case), "kd-dyn")
    with torch.no_grad():
        assert float(module(**batch(module))["loss"]) == pytest.approx(defined(module), rel=1e-4)


def test_no_gradient_reaches_the_teacher(checkpoint: Callable[[Case], Path]) -> None:
    """The upper layers' gradients are those of their cross-entropy alone, whatever the distillation weighs."""
    gradients = []
    for alpha in (0.0, 100.0):
        module = opened_model(checkpoint(LLAMA), "kd-dyn", alpha)
        module(**batch(module))["loss"].backward()
        gradients.append([layer.mlp.down_proj.weight.grad for layer in module.model.model.layers])
    upper, lower = gradients[0][EXIT:], gradients[0][:EXIT]
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(upper, gradients[1][EXIT:], strict=True))
    assert not any(torch.allclose(a, b, atol=1e-7) for a, b in zip(lower, gradients[1][:EXIT], strict=True))


def test_dropout_after_the_norm_is_that_of_the_models_mode(checkpoint: Callable[[Case], Path]) -> None:
    """One draw a layer: what is distilled is what the head reads. With the exit after layer 1 there is one pair."""
    module = opened_model(checkpoint(T5), "kd-dyn", exit_layer=1)
    module.head.dropout = nn.Dropout(0.5)
    read: list[torch.Tensor] = []
    module.head.linear.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0] / module.head.scale))
    losses = []
    for alpha in (0.0, 1.0):
        torch.manual_seed(3)
        module.alpha = alpha
        with torch.no_grad():
            losses.append(float(module(**batch(module))["loss"]))
    student, teacher = read[2:]
    assert (student == 0).float().mean() == pytest.approx(0.5, abs=0.1)
    assert losses[1] - losses[0] == pytest.approx(float((student - teacher).square().mean(-1).sum()), rel=1e-4)


def test_a_frozen_exit_is_read_after_its_own_norm() -> None:
    random = np.random.default_rng(5)
    shallow, deep = random.normal(size=(2, 7, 8)) * [[[3.0]], [[40.0]]]
    weight, matrix = random.uniform(0.5, 2.0, 8), random.normal(size=(11, 8))
    labels = random.integers(0, 11, 7)
    norm, linear = nn.RMSNorm(8, eps=EPSILON), nn.Linear(8, 11, bias=False)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(weight))
        linear.weight.copy_(torch.tensor(matrix))
    own = AdaptedExit(torch.tensor(weight * 1.5), EPSILON, rank=0)
    module = frozen_exit(own, SharedHead(norm, linear, 1.0), 2, 6).train()
    student, teacher = (
        log_softmax(rms(state, scale * weight, EPSILON) @ matrix.T) for state, scale in ((shallow, 1.5), (deep, 1.0))
    )
    best = torch.tensor(teacher, dtype=torch.float32).topk(11, dim=-1)
    states = torch.tensor(shallow, dtype=torch.float32)[None]
    deep_losses = torch.tensor(-teacher[np.arange(7), labels])
    loss = module(states, torch.tensor(labels)[None], best.indices, best.values, best.indices[:, 0], deep_losses)[
        "loss"
    ]
    ce = [-chances[np.arange(7), labels].sum() for chances in (student, teacher)]
    expected = (2 * ce[0] + 6 * ce[1]) / 8 + ALPHA * (np.exp(teacher) * (teacher - student)).sum()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)
    loss.backward()
    assert norm.weight.grad is None
    assert own.norm.weight.grad is not None
