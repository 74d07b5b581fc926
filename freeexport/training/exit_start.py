"""The start of an exit's own parameters: the linear map nearest to what the skipped layers do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import Example
from freeexport.training.batches import Collator
from freeexport.training.exit_modules import AdaptedExit, Adapter, Exit, ExitLayers, own_exit
from freeexport.training.options import TrainingOptions
from freeexport.training.shallow_deep import IGNORED, ShallowDeep
from graphs.description import Description

_POSITIONS = 10_000  # that a map is fitted on, at least
# A share of the mean variance: keeps directions that the data hardly shows from growing large weights.
_RIDGE = 1e-3


def first_exit(
    model: Any,
    checkpoint: Checkpoint,
    description: Description,
    options: TrainingOptions,
    examples: Sequence[Example],
    collate: Collator,
) -> Exit:
    """The exit that training begins with: the checkpoint's own where it has been trained before; else layers like the
    last ones behind a fitted map, or a norm and a fitted adapter."""
    if (trained := own_exit(checkpoint, description)) is not None:
        return trained.train()
    layers, norm = description.decoder.layers, description.decoder.head.norm
    into = len(layers) - options.exit_layers
    whole = ShallowDeep(model, description, options.exit_layer, "ce", also=(into,))
    norm_weight = checkpoint.read(norm.weight)
    if options.exit_layers:
        shallow, deep = _observed(whole, examples, collate, into, options.bf16, everywhere=True)
        return ExitLayers(layers[into:], checkpoint.read, linear_map(shallow, deep), norm_weight, norm.epsilon)
    torch.manual_seed(options.seed)
    own = AdaptedExit(norm_weight, norm.epsilon, options.adapter_rank)
    if own.adapter is not None:
        shallow, deep = _observed(whole, examples, collate, into, options.bf16, everywhere=False)
        begin_linear(own.adapter, shallow, deep, norm_weight)
    return own


@torch.no_grad()
def _observed(
    model: ShallowDeep, examples: Sequence[Example], collate: Collator, into: int, bf16: bool, everywhere: bool
) -> tuple[np.ndarray, np.ndarray]:
    """States [N, d] after the exit layer and after layer `into`: of labelled rows, or of all but first positions, whose
    states are of another size."""
    was_training = model.training
    model.eval()
    found = list[tuple[np.ndarray, np.ndarray]]()
    for start in range(0, len(examples), 16):
        if sum(len(shallow) for shallow, _ in found) >= _POSITIONS:
            break
        inputs = collate(examples[start : start + 16])
        if everywhere:
            valid = inputs["attention_mask"] > 0
            valid[:, 0] = False
            inputs["labels"] = torch.where(valid, 0, IGNORED)
        inputs = {key: value.to(model.device) for key, value in inputs.items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            hidden = model.hidden_states(**inputs)
        shallow, deep = (hidden[layer].float().cpu().numpy() for layer in (model.exit_layer, into))
        found.append((shallow, deep))
    model.train(was_training)
    return cast(tuple[np.ndarray, np.ndarray], tuple(map(np.concatenate, zip(*found, strict=True))))


def linear_map(shallow: np.ndarray, deep: np.ndarray) -> np.ndarray:
    """[d, d]: the least-squares map from one [N, d] to the other."""
    square, product = _moments(shallow, deep)
    solved: np.ndarray = np.linalg.solve(square, product.T).T.astype(np.float32)
    return solved


@torch.no_grad()
def begin_linear(adapter: Adapter, shallow: np.ndarray, deep: np.ndarray, norm_weight: np.ndarray) -> None:
    """Set the adapter to the map of rank `rank // 2` from `shallow` [N, d] that is nearest to `deep` [N, d] as far as
    the final norm's weights [d] show it. Exact, since silu(x) - silu(-x) = x: two units a rank."""
    rank = adapter.down.weight.shape[0] // 2
    if not rank:
        return
    epsilon = adapter.norm.epsilon
    length = float(np.median(_root_mean_square(deep, 0.0)))
    # What must be added to get the deep state's direction, at its usual length.
    added = deep / _root_mean_square(deep, epsilon) * length - shallow
    square, product = _moments(shallow / _root_mean_square(shallow, epsilon), added)
    for weight, factor, axis in zip(
        (adapter.down.weight, adapter.up.weight), low_rank(square, product, norm_weight, rank), (0, 1), strict=True
    ):
        pair = torch.from_numpy(np.concatenate([factor, -factor], axis)).to(weight)
        weight.narrow(axis, 0, pair.shape[axis]).copy_(pair)


def low_rank(square: np.ndarray, product: np.ndarray, weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors [r, d], [d, r] of the map of rank r that minimises the squared error of its outputs times `weight` [d]
    (reduced-rank ridge regression). `square` and `product` [d, d]: `_moments`."""
    width = len(square)
    whole = np.linalg.solve(square, product.T).T
    magnitude = np.maximum(np.abs(weight.astype(np.float64)), 1e-3 * np.abs(weight).max())
    root = np.linalg.cholesky(square)
    left = np.linalg.svd((magnitude[:, None] * whole) @ root)[0][:, : min(rank, width)]
    return left.T @ (magnitude[:, None] * whole), left / magnitude[:, None]


def _moments(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of x x', with the ridge, and of y x', of rows [N, d]."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    square, product = x.T @ x / len(x), y.T @ x / len(x)
    return square + _RIDGE * np.trace(square) / len(square) * np.eye(len(square)), product


def _root_mean_square(x: np.ndarray, epsilon: float) -> np.ndarray:
    root: np.ndarray = np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon)
    return root
