"""How an exit's own layers begin: as copies of the last ones, behind the linear map that leads to what those read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import Example
from freeexport.training.batches import Collator
from freeexport.training.exit_layers.module import ExitLayers, own_exit
from freeexport.training.full import collator
from freeexport.training.options import TrainingOptions
from freeexport.training.shallow_deep import IGNORED, ShallowDeep
from graphs.description import Description

_MAP_POSITIONS = 10_000  # that the map is fitted on, at least
_RIDGE = 1e-3  # a share of the mean variance


def observed(model: torch.nn.Module, description: Description, options: TrainingOptions) -> ShallowDeep:
    """The whole model, which also tells what the last layers, as many as the exit gets, read."""
    into = len(description.decoder.layers) - options.exit_layers
    return ShallowDeep(model, description, options.exit_layer, "ce", also=(into,))


def first_layers(
    checkpoint: Checkpoint,
    description: Description,
    options: TrainingOptions,
    whole: ShallowDeep,
    examples: Sequence[Example],
    cache: Path,
) -> ExitLayers:
    """Copies of the last layers behind the map, which is kept in the directory `cache`; or the checkpoint's own, where
    it has been trained for this exit before."""
    if (trained := own_exit(checkpoint, description)) is not None:
        return trained.train()
    layers = description.decoder.layers
    into = len(layers) - options.exit_layers
    linear = cached_map(cache, whole, examples, collator(checkpoint, options), into, options.bf16)
    norm = description.decoder.head.norm
    return ExitLayers(layers[into:], checkpoint.read, linear, checkpoint.read(norm.weight), norm.epsilon)


def cached_map(
    directory: Path, model: ShallowDeep, examples: Sequence[Example], collate: Collator, into: int, bf16: bool
) -> np.ndarray:
    """[d, d]: the linear map that is nearest, in least squares, to what the layers between the exit layer and number
    `into` (from 0: what that layer reads) do. First positions, whose states are of another size, do not count."""
    path = directory / "map.npy"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        np.save(path, _map(model, examples, collate, into, bf16))
    found: np.ndarray = np.load(path)
    return found


@torch.no_grad()
def _map(model: ShallowDeep, examples: Sequence[Example], collate: Collator, into: int, bf16: bool) -> np.ndarray:
    model.eval()
    square = product = np.zeros(())
    seen = 0
    for start in range(0, len(examples), 16):
        if seen >= _MAP_POSITIONS:
            break
        inputs = collate(examples[start : start + 16])
        mask = inputs["attention_mask"].clone()
        mask[:, 0] = 0
        inputs["labels"] = torch.where(mask > 0, 0, IGNORED)
        inputs = {key: value.to(model.device) for key, value in inputs.items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            hidden = model.hidden_states(**inputs)
        x, y = (hidden[layer].double().cpu().numpy() for layer in (model.exit_layer, into))
        square, product, seen = square + x.T @ x, product + y.T @ x, seen + len(x)
    square = square + _RIDGE * np.trace(square) / len(square) * np.eye(len(square))
    solved: np.ndarray = np.linalg.solve(square, product.T).T.astype(np.float32)
    return solved
