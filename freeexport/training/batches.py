"""Load the examples of a training run, in batches of similar length to minimise padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import (
    TARGETS_WANTED,
    DataError,
    Example,
    Recording,
    encode,
    fitted,
    read_examples,
    split,
    text_format,
    unwritable,
)
from freeexport.training.self_distill import Generate, own_examples
from freeexport.training.shallow_deep import IGNORED
from freeexport.training.training_options import MEASURED, TrainingOptions
from graphs.description import Description
from graphs.families import describe
from runtime.errors import OptionError

DEFAULT_MAX_TOKENS = 2048  # the default capacity of convert
VALIDATION_SHARE = 0.02  # share of the data, if there is no validation file


def described(checkpoint: Checkpoint, options: TrainingOptions) -> Description:
    """Return the checkpoint's description, after checking the options against it.

    Raises:
        UnsupportedModelError: If the model is not supported.
        OptionError: If the exit does not fit the model, or an option does not apply to speech.
    """
    description = describe(checkpoint.config, checkpoint)
    layers = len(description.decoder.layers)
    first = 1 if options.exit_input == "state" else 0
    if not first <= options.exit_layer < layers:
        also = ", or 0 with --exit-input feature" if options.exit_layer == 0 else ""
        raise OptionError(
            f"--exit-layer is {options.exit_layer}; the decoder has {layers} layers: {first} to "
            f"{layers - 1}{also}"
        )
    measured = options.select_by in MEASURED
    if description.spectrogram is not None and (options.truncate or not measured):
        flag = f"--select-by {options.select_by} decodes" if not measured else "--truncate cuts"
        raise OptionError(f"{flag} text, and the model reads speech; leave it out")
    if options.exit_head_layers > layers - options.exit_layer:
        raise OptionError(
            f"--exit-head-layers is {options.exit_head_layers}; after layer {options.exit_layer} "
            f"of {layers} at most {layers - options.exit_layer} make sense"
        )
    return description


def examples(
    checkpoint: Checkpoint,
    description: Description,
    options: TrainingOptions,
    generate: Generate | None = None,
    check: bool = True,
) -> tuple[list[Example], list[Example], list[str]]:
    """Load training and validation examples, and notes about them.

    The notes describe examples that were cut or left out, and targets that the tokenizer cannot
    write.

    Raises:
        DataError: If a line is broken or there are too few examples.
        CheckpointError: If the checkpoint has no tokenizer.
    """
    form = text_format(checkpoint, description, options.max_tokens or DEFAULT_MAX_TOKENS)
    form = replace(form, truncate=options.truncate)
    needed = "" if options.self_distill else TARGETS_WANTED
    training = read_examples(options.data, need_target=needed)
    if len(training) < 2:
        raise DataError(f"{options.data} has one example; give at least two")
    given = [(options.data, training)]
    if options.validation is None:
        training, validation = split(training, VALIDATION_SHARE, options.data)
    else:
        validation = read_examples(options.validation, need_target=needed)
        given.append((options.validation, validation))
    sets = (options.data, training), (options.validation or options.data, validation)
    notes: list[str | None] = []
    if options.self_distill is None:
        notes = [unwritable(requests, form, path) for path, requests in given if check]
        encoded = [encode(requests, form, path) for path, requests in sets]
    else:
        assert generate is not None
        own = own_examples(
            sets,
            checkpoint,
            form,
            new_tokens=options.max_new_tokens,
            directory=options.self_distill,
            generate=generate,
        )
        encoded = [fitted(found, form, path) for found, (path, _) in zip(own, sets, strict=True)]
    (first, left_out), (second, also_left_out) = encoded
    return first, second, [note for note in (*notes, left_out, also_left_out) if note is not None]


def token_counts(examples: Sequence[Example]) -> list[int]:
    """Return the number of tokens of each example."""
    return [len(example.prompt) + len(example.target) for example in examples]


class LengthBatches(Sampler[list[int]]):
    """Sampler of batches of example indices, for one of several devices.

    A batch has as many examples as fit in `tokens` padded tokens, at least one. Every epoch
    shuffles examples of similar length and the order of the batches. The number of batches stays
    the same. If it is not divisible by `devices`, some batches are repeated, so that all devices
    get the same number.

    Args:
        lengths: Lengths of the examples, in tokens.
        tokens: Padded tokens per batch.
        device: Index of this device.
    """

    def __init__(
        self, lengths: Sequence[int], tokens: int, seed: int, device: int = 0, devices: int = 1
    ) -> None:
        self.epoch = 0
        self._seed = seed
        self._device = device
        self._devices = devices
        # Round up to a multiple of an eighth of the power of two below. Enough examples then have
        # the same length to be shuffled.
        steps = [max(1, 1 << max(0, int(length).bit_length() - 4)) for length in lengths]
        self._rounded = np.array(
            [-(-length // step) * step for length, step in zip(lengths, steps, strict=True)]
        )
        # Start of each batch in ascending order of length, and the end.
        self._cuts = [0]
        for index, length in enumerate(np.sort(self._rounded)):
            if index > self._cuts[-1] and (index + 1 - self._cuts[-1]) * length > tokens:
                self._cuts.append(index)
        self._cuts.append(len(lengths))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-(len(self._cuts) - 1) // self._devices)

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng((self._seed, self.epoch))
        # A stable sort after a shuffle orders equal lengths randomly.
        shuffled = random.permutation(len(self._rounded))
        order = shuffled[np.argsort(self._rounded[shuffled], kind="stable")]
        batches = random.permutation(len(self._cuts) - 1)
        padded = np.resize(batches, len(self) * self._devices)
        for number in padded[self._device :: self._devices]:
            yield order[self._cuts[number] : self._cuts[number + 1]].tolist()


@dataclass(frozen=True)
class Collator:
    """Pad examples on the right to the longest.

    Returns `input_ids` [B, n], or for speech `input_features` float32 [B, bins, 2 n],
    `attention_mask` [B, n] and `labels` [B, m]. An encoder-decoder model also gets
    `decoder_input_ids` [B, m], which begin with `start`.

    A label is the token that the position predicts. It is -100 for padding, for a decoder-only
    model's prompt, and for the given tokens of a target.

    Attributes:
        start: First token of an encoder-decoder's decoder. None for a decoder-only model.
    """

    start: int | None

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        if self.start is not None:
            targets = [example.target for example in examples]
            shifted = [np.concatenate([[self.start], target[:-1]]) for target in targets]
            ids = [example.prompt for example in examples]
            extra = {"decoder_input_ids": _padded(shifted, 0)}
        else:
            whole = [np.concatenate([example.prompt, example.target]) for example in examples]
            ids = [one[:-1] for one in whole]
            extra = {}
        labels = [self.labels(example) for example in examples]
        mask = _padded([np.ones(len(one), np.int64) for one in ids], 0)
        sounds = [torch.from_numpy(one.features()) for one in ids if isinstance(one, Recording)]
        read = {"input_features": torch.stack(sounds)} if sounds else {"input_ids": _padded(ids, 0)}
        return {**read, "attention_mask": mask, "labels": _padded(labels, IGNORED), **extra}

    def labels(self, example: Example) -> np.ndarray:
        """Return the label of each position of the decoder, int32 [m]."""
        if self.start is None:
            unlabelled = np.full_like(example.prompt[1:], IGNORED)
            return np.concatenate([unlabelled, example.target])
        labels = example.target.copy()
        labels[: example.given] = IGNORED
        return labels


def _padded(rows: Sequence[np.ndarray], fill: int) -> torch.Tensor:
    out = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.int64)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = torch.from_numpy(np.asarray(values, np.int64))
    return out


def loader(
    dataset: Any, batches: Sampler[list[int]], collate: Any, generator_seed: int = 0
) -> DataLoader[Any]:
    """Return a loader that runs in this process.

    It has its own generator, so it does not advance torch's, whose state a checkpoint restores.
    """
    generator = torch.Generator().manual_seed(generator_seed)
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, generator=generator)
