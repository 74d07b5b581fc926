"""Checkpoints whose exit has its own vocabulary, and their models for the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import BY_NAME, Case
from exit_layer_case import EXIT_LAYER, model_with_exit, write_exit
from reference import ExitVocabulary
from safetensors.numpy import load_file, save_file

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.exit_file import EXIT_WEIGHTS, ExitFile, write_exit_file
from graphs.exit_head import OTHER, OTHER_BIAS, VOCABULARY
from graphs.families import describe
from runtime.bundle import manifest

# Two of three tokens, so that the best token is often missing.
KNOWN = np.array([token for token in range(288) if token % 3 or token < 3], np.int32)


def with_exit_vocabulary(name: str, layers: bool = False) -> Case:
    """Return the case `name` with an exit vocabulary after layer 1. `layers` adds two own layers to the exit."""
    plain = BY_NAME[name]

    def build(directory: Path) -> None:
        plain.build(directory)
        opened = open_checkpoint(str(directory))
        width = describe(opened.config, opened).hidden_size
        base = opened.sha256
        tensors = {}
        if layers:
            write_exit(directory)
            tensors = load_file(directory / EXIT_WEIGHTS)
        tensors[VOCABULARY] = KNOWN
        draw = np.random.default_rng(1)
        tensors[OTHER] = (draw.standard_normal((1, width)) / np.sqrt(width)).astype(np.float32)
        tensors[OTHER_BIAS] = np.array([11.0], np.float32)
        save_file(tensors, directory / EXIT_WEIGHTS)
        facts = manifest.ExitVocabulary(len(KNOWN), 0.9, 100, trained=True)
        exit_file = ExitFile(EXIT_LAYER, base, "ce", "full", exit_layers=2 if layers else 0, vocabulary=facts)
        write_exit_file(directory, exit_file)

    return Case(f"{name}-exit-vocabulary{'-layers' * layers}", build, (EXIT_LAYER, plain.exit_layers[-1]))


def model_with_vocabulary(directory: Path) -> Any:
    """Return the Hugging Face model with the exit in `own_exit` and `exit_vocabulary`, for `reference`."""
    model = model_with_exit(directory)
    opened = open_checkpoint(str(directory))
    tokens = torch.tensor(KNOWN.astype(np.int64))
    known = ExitVocabulary(tokens, torch.tensor(opened.read(OTHER)[0]), float(opened.read(OTHER_BIAS)[0]))
    object.__setattr__(model, "exit_vocabulary", known)
    return model
