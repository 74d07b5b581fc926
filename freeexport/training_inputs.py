"""What a training run reads: the model's description, and the data as examples for it."""

from __future__ import annotations

from freeexport.checkpoint import Checkpoint, CheckpointError
from freeexport.tokenizer_files import has_tokenizer, load_tokenizer
from freeexport.training_data import DataError, Example, TextFormat, encode, read_lines, split
from freeexport.training_options import TrainingOptions
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
    return description


def examples(
    checkpoint: Checkpoint, description: Description, options: TrainingOptions
) -> tuple[list[Example], list[Example], list[str]]:
    """Training and validation examples, and what is to be said about those that were left out.

    Raises DataError for a broken line and for too few examples, CheckpointError where there is no tokenizer.
    """
    form = _text_format(checkpoint, description, options)
    training = read_lines(options.data)
    if len(training) < 2:
        raise DataError(f"{options.data} has one example; give at least two")
    if options.validation is None:
        training, validation = split(training, options.validation_share, options.data)
    else:
        validation = read_lines(options.validation)
    first, left_out = encode(training, form, options.data)
    second, also_left_out = encode(validation, form, options.validation or options.data)
    return first, second, [str(part) for part in (left_out, also_left_out) if part is not None]


def _text_format(checkpoint: Checkpoint, description: Description, options: TrainingOptions) -> TextFormat:
    if not has_tokenizer(checkpoint):
        raise CheckpointError(f"{checkpoint.name} has no tokenizer, which text needs; add its tokenizer files")
    tokenizer = load_tokenizer(checkpoint)
    ends = checkpoint.generation_config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [tokenizer.eos_token_id if ends is None else ends]
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
    if end is None:
        raise CheckpointError(f"{checkpoint.name} names no eos_token_id; add it to its generation_config.json")
    capacity = description.decoder.max_positions
    limit = min(filter(None, (capacity, options.max_tokens or DEFAULT_MAX_TOKENS)))
    return TextFormat(tokenizer, int(end), limit, description.encoder is not None)
