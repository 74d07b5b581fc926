"""`--tune full` or `lora` with `--exit-layers N`: a model or its adapter is trained together with the exit's layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import Example
from freeexport.training.exit_layers.module import ExitLayers
from freeexport.training.exit_layers.start import first_layers, observed
from freeexport.training.exit_only import write_exit
from freeexport.training.full import Trainable, copy_tokenizer, on_examples, trainable_model, tune_lora
from freeexport.training.options import TrainingOptions
from freeexport.training.shallow_deep import ShallowDeep
from graphs.description import Description


def tune_joint(
    checkpoint: Checkpoint,
    description: Description,
    options: TrainingOptions,
    training: Sequence[Example],
    validation: Sequence[Example],
    cache: Path,
) -> Trainable:
    """Takes 16 bytes of memory a parameter, and what the batch needs. The map that the exit begins with is kept in the
    directory `cache`."""
    model = trainable_model(checkpoint, options)
    own = first_layers(checkpoint, description, options, observed(model, description, options), training, cache)
    module = ShallowDeep(
        model,
        description,
        options.exit_layer,
        options.loss,
        options.loss_alpha,
        own=own,
        smoothing=options.label_smoothing,
    )

    def write(directory: Path) -> None:
        model.to(getattr(torch, options.dtype)).save_pretrained(directory)
        copy_tokenizer(checkpoint, directory)
        write_exit(own, directory)

    tuning = on_examples(module, checkpoint, options, training, validation, write)
    tuning.exit_norm, tuning.exit_layers = True, options.exit_layers
    return tuning


def tune_joint_lora(
    checkpoint: Checkpoint,
    description: Description,
    options: TrainingOptions,
    training: Sequence[Example],
    validation: Sequence[Example],
    model_name: str,
    cache: Path,
) -> Trainable:
    """An adapter, as `tune_lora` writes it, and every weight of the exit's layers beside it. Raises what that does."""

    def own(model: torch.nn.Module) -> ExitLayers:
        return first_layers(checkpoint, description, options, observed(model, description, options), training, cache)

    tuning = tune_lora(checkpoint, description, options, training, validation, model_name, own)
    write_adapter, layers = tuning.write, cast(ShallowDeep, tuning.module).own
    assert layers is not None

    def write(directory: Path) -> None:
        write_adapter(directory)
        write_exit(layers, directory)

    tuning.write, tuning.exit_norm, tuning.exit_layers = write, True, options.exit_layers
    return tuning
