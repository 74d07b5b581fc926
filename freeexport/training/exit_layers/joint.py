"""`--tune full` or `lora` with `--exit-layers N`: a model or its adapter is trained together with the exit's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import Example
from freeexport.training.exit_layers.start import first_layers, observed
from freeexport.training.exit_only import write_exit
from freeexport.training.full import Trainable
from freeexport.training.options import TrainingOptions
from freeexport.training.shallow_deep import ShallowDeep
from graphs.description import Description

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from freeexport.training.exit_layers.module import ExitLayers
    from freeexport.training.full import Own


def tune_joint(
    tune: Callable[[Own], Trainable],
    checkpoint: Checkpoint,
    description: Description,
    options: TrainingOptions,
    training: Sequence[Example],
    cache: Path,
) -> Trainable:
    """What `tune` trains and writes, given what makes the exit's layers; these are trained and written with it. Raises
    what `tune` does. The map that the exit begins with is kept in the directory `cache`."""

    def own(model: PreTrainedModel) -> ExitLayers:
        return first_layers(checkpoint, description, options, observed(model, description, options), training, cache)

    tuning = tune(own)
    write_whole, layers = tuning.write, cast(ShallowDeep, tuning.module).own
    assert layers is not None

    def write(directory: Path) -> None:
        write_whole(directory)
        write_exit(layers, directory)

    tuning.write, tuning.exit_norm, tuning.exit_layers = write, True, options.exit_layers
    return tuning
