"""What a training run reads: the model's description, and the data as examples for it."""

from __future__ import annotations

from dataclasses import replace

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import TARGETS_WANTED, DataError, Example, encode, read_examples, split
from freeexport.checkpoints.text_format import text_format
from freeexport.training.options import TrainingOptions
from graphs.description import Description
from graphs.families import describe
from runtime.errors import OptionError

DEFAULT_MAX_TOKENS = 2048  # as convert's capacity


def described(checkpoint: Checkpoint, options: TrainingOptions) -> Description:
    """The checkpoint's description. Raises UnsupportedModelError, and OptionError where the exit layer is none."""
    description = describe(checkpoint.config, checkpoint)
    layers = len(description.decoder.layers)
    if not 1 <= options.exit_layer < layers:
        raise OptionError(f"--exit-layer is {options.exit_layer}; the decoder has {layers} layers: 1 to {layers - 1}")
    if options.exit_layers and description.encoder is not None:
        raise OptionError(
            f"--exit-layers is {options.exit_layers}, which decoder-only models can have; leave it out for "
            f"{description.family}"
        )
    if options.exit_layers > layers - options.exit_layer:
        raise OptionError(
            f"--exit-layers is {options.exit_layers}; after layer {options.exit_layer} of {layers} at most "
            f"{layers - options.exit_layer} make sense"
        )
    return description


def examples(
    checkpoint: Checkpoint, description: Description, options: TrainingOptions
) -> tuple[list[Example], list[Example], list[str]]:
    """Training and validation examples, and what is to be said about those that were cut or left out.

    Raises DataError for a broken line and for too few examples, CheckpointError where there is no tokenizer.
    """
    form = text_format(checkpoint, description, options.max_tokens or DEFAULT_MAX_TOKENS)
    form = replace(form, truncate=options.truncate)
    training = read_examples(options.data, need_target=TARGETS_WANTED)
    if len(training) < 2:
        raise DataError(f"{options.data} has one example; give at least two")
    if options.validation is None:
        training, validation = split(training, options.validation_share, options.data)
    else:
        validation = read_examples(options.validation, need_target=TARGETS_WANTED)
    first, left_out = encode(training, form, options.data)
    second, also_left_out = encode(validation, form, options.validation or options.data)
    return first, second, [str(part) for part in (left_out, also_left_out) if part is not None]
