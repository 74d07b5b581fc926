"""Checkpoints whose exit has its own transformer layers, and their models for the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import BY_NAME, Case, load
from safetensors.numpy import save_file

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.exit_file import EXIT_WEIGHTS, ExitFile, write_exit_file
from freeexport.training.exit_modules import trained_exit
from graphs.exit_head import EXIT_MAP, EXIT_NORM, EXIT_NORM_BIAS
from graphs.families import describe
from graphs.shapes import own_shapes
from runtime.bundle.manifest import ExitInput

EXIT_LAYER = 1
OWN_LAYERS = 2


def write_exit(
    directory: Path, layers: int = OWN_LAYERS, reads: ExitInput = "state", exit_layer: int = EXIT_LAYER
) -> None:
    """Write an exit with random layers into a checkpoint.

    The map before the layers is near the identity. If the exit also reads a feature, a tenth of its states is added.
    """
    opened = open_checkpoint(str(directory))
    description = describe(opened.config, opened)
    draw = np.random.default_rng(0)
    width = description.hidden_size
    like = opened.read(description.decoder.layers[-layers].mlp.up.weight).std()
    tensors = {
        name: (draw.standard_normal(shape) * (2.0 if "relative_bias" in name else like)).astype(np.float32)
        if len(shape) > 1
        else (("bias" not in name) + 0.1 * draw.standard_normal(shape)).astype(np.float32)
        for name, shape in own_shapes(description, opened, layers, reads).items()
    }
    tensors[EXIT_MAP] = tensors[EXIT_MAP] / 4
    tensors[EXIT_MAP][:, :width] += np.eye(width, dtype=np.float32)
    features = tensors[EXIT_MAP].shape[1] // width - 1
    tensors[EXIT_MAP][:, width:] += np.tile(np.eye(width, dtype=np.float32), features) / 10
    if (norm := description.decoder.head.norm) is not None:
        tensors[EXIT_NORM] = opened.read(norm.weight) * np.float32(1.1)
        if norm.bias is not None:
            tensors[EXIT_NORM_BIAS] = opened.read(norm.bias)
    save_file(tensors, directory / EXIT_WEIGHTS)
    exit_file = ExitFile(exit_layer, opened.sha256, "logit-kd", "exit", layers, exit_input=reads)
    write_exit_file(directory, exit_file)


def with_exit_layers(name: str) -> Case:
    """Return the case `name` with an exit of two layers after layer 1."""
    plain = BY_NAME[name]

    def build(directory: Path) -> None:
        plain.build(directory)
        write_exit(directory)

    return Case(f"{name}-exit-layers", build, (EXIT_LAYER,), model_with_exit)


def with_feature(name: str, exit_layer: int, reads: ExitInput = "feature") -> Case:
    """Return the case `name` with an exit of one layer that reads the state after `exit_layer` and a feature."""
    plain = BY_NAME[name]

    def build(directory: Path) -> None:
        plain.build(directory)
        write_exit(directory, 1, reads, exit_layer)

    return Case(f"{name}-{reads}-{exit_layer}", build, (exit_layer, plain.layers - 1), model_with_exit)


def model_with_exit(directory: Path) -> Any:
    """Return the Hugging Face model with the exit in its attribute `own_exit`, for `reference`."""
    model = load(directory)
    opened = open_checkpoint(str(directory))
    object.__setattr__(model, "own_exit", trained_exit(opened, describe(opened.config, opened))[0])
    return model


EXIT_CASES = tuple(
    map(with_exit_layers, ("llama-tied", "qwen3", "mistral-window", "llama-biases", "t5-relu-tied", "umt5", "marian"))
)
