"""Initialise an exit's own parameters.

Fit the linear map that best approximates the skipped layers, and choose the exit's vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import Example
from freeexport.checkpoints.special_tokens import known_ends
from freeexport.checkpoints.tokenizer_files import load_tokenizer
from freeexport.training.batches import Collator
from freeexport.training.exit_modules import ExitLayers, JoinedInputs, KnownTokens
from freeexport.training.layer_modules import norm_module
from freeexport.training.shallow_deep import EXIT, IGNORED, ShallowDeep, SharedHead
from freeexport.training.training_options import TrainingOptions
from graphs.description import Description
from graphs.exit_head import VOCABULARY
from runtime.bundle.manifest import ExitVocabulary
from runtime.errors import OptionError

_POSITIONS = 10_000  # minimum number of positions for fitting a map
_TAIL_POSITIONS = 2_000  # minimum for fitting the class of all other tokens
# Ridge as a fraction of the mean variance. It prevents large weights in directions with little
# data.
_RIDGE = 1e-3
_LOGIT_ROWS = 256  # rows whose logits are in memory at once


def first_exit(
    model: Any,
    checkpoint: Checkpoint,
    description: Description,
    options: TrainingOptions,
    examples: Sequence[Example],
    collate: Collator,
) -> ExitLayers:
    """Return the exit from which training starts: copies of the last layers after a fitted map."""
    layers = description.decoder.layers
    into = len(layers) - options.exit_head_layers
    joined = None if options.exit_input == "state" else JoinedInputs(options.exit_input)
    whole = ShallowDeep(model, description, options.exit_layer, "ce", also=(into,), own=joined)
    states = observed(whole, examples, collate, options.bf16, everywhere=True)
    pairs = ((hidden[EXIT if joined else options.exit_layer], hidden[into]) for hidden in states)
    linear = linear_map(*_joined(pairs, _POSITIONS), description.hidden_size)
    own_norm = norm_module(description.decoder.head.norm, checkpoint.read)
    return ExitLayers(layers[into:], checkpoint.read, linear, own_norm)


def observed(
    model: ShallowDeep,
    examples: Sequence[Example],
    collate: Collator,
    bf16: bool,
    everywhere: bool = False,
) -> Iterator[dict[int, torch.Tensor]]:
    """Yield hidden states by layer, without dropout, in batches of examples.

    Only labelled rows are included. With `everywhere`, a decoder-only model yields all positions
    except the first, whose states have a different magnitude.
    """
    for start in range(0, len(examples), 16):
        inputs = collate(examples[start : start + 16])
        if everywhere and not model.seq2seq:
            valid = inputs["attention_mask"] > 0
            valid[:, 0] = False
            inputs["labels"] = torch.where(valid, 0, IGNORED)
        inputs = {key: value.to(model.device) for key, value in inputs.items()}
        was_training = model.training
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            hidden = model.eval().hidden_states(**inputs)
        model.train(was_training)
        yield hidden


def _joined(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], min_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate pairs of rows until there are at least `min_rows`."""
    found = []
    count = 0
    for pair in pairs:
        found.append([part.detach().float().cpu().numpy() for part in pair])
        count += len(pair[0])
        if count >= min_rows:
            break
    return cast(tuple[np.ndarray, np.ndarray], tuple(map(np.concatenate, zip(*found, strict=True))))


def chosen_tokens(
    checkpoint: Checkpoint,
    description: Description,
    options: TrainingOptions,
    training: Sequence[Example],
) -> tuple[np.ndarray, ExitVocabulary]:
    """Choose the exit's vocabulary of `--exit-vocab` tokens.

    It contains special and end-of-sequence tokens, then the most frequent tokens of the training
    targets, then the lowest ids. If the checkpoint's exit already has a vocabulary, that one is
    used, unless the exit is only what training starts from (`--exit-from`).

    Returns the ids, ascending, and a record of how many target tokens they cover.
    """
    size = options.exit_vocab or 0
    vocabulary = description.vocab_size
    # For speech, no special token except the end is ever emitted.
    named = (
        [] if description.spectrogram is not None else load_tokenizer(checkpoint).all_special_ids
    )
    special = {*named, *known_ends(checkpoint, vocabulary)}
    kept = np.array(sorted(token for token in special if 0 <= token < vocabulary), np.int64)
    min_size = max(2, len(kept) + 1)
    if not min_size <= size < vocabulary:
        raise OptionError(
            f"--exit-vocab is {size}; this model has {vocabulary} tokens, and {len(kept)} special "
            f"ones, which are always kept: choose {min_size} to {vocabulary - 1}"
        )
    counts = np.bincount(
        np.concatenate([one.target[one.given :] for one in training]), minlength=vocabulary
    )
    ranked = np.lexsort((np.arange(vocabulary), -counts))
    tokens = np.sort(np.concatenate([kept, ranked[~np.isin(ranked, kept)]])[:size])
    if VOCABULARY in checkpoint and options.exit_from is None:
        tokens = checkpoint.read(VOCABULARY).astype(np.int64)
    covered = float(counts[tokens].sum() / counts.sum())
    return tokens, ExitVocabulary(size, covered, int(counts.sum()), trained=True)


@torch.no_grad()
def begin_other(known: KnownTokens, head: SharedHead, normed: Iterable[torch.Tensor]) -> None:
    """Initialise `known.other`, the class of all other tokens, for head inputs [N, d].

    It is a linear fit of their summed probability.
    """
    pieces = (rows for batch in normed for rows in batch.split(_LOGIT_ROWS))
    pairs = ((rows * head.scale, known.folded(head.read(rows).float())[:, -1:]) for rows in pieces)
    x, y = _joined(pairs, _TAIL_POSITIONS)
    weight = linear_map(x - x.mean(0), y - y.mean(0))  # [1, d]
    known.other.weight.copy_(torch.from_numpy(weight))
    known.other.bias.copy_(torch.from_numpy(y.mean(0) - weight @ x.mean(0)))


def linear_map(shallow: np.ndarray, deep: np.ndarray, part: int | None = None) -> np.ndarray:
    """Fit the least-squares map [d, n] from `shallow` [N, n] to `deep` [N, d].

    Groups of `part` columns of `shallow` are normalised separately. Default: all columns together.
    """
    part = part or shallow.shape[1]
    sizes = np.repeat(
        [np.sqrt(np.square(one).mean()) for one in np.split(shallow, shallow.shape[1] // part, 1)],
        part,
    )
    square, product = _moments(shallow / sizes, deep)
    solved: np.ndarray = (np.linalg.solve(square, product.T).T / sizes).astype(np.float32)
    return solved


def _moments(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of x x', plus the ridge, and of y x' over rows [N, d]."""
    x = x.astype(np.float64)
    y = y.astype(np.float64)
    square = x.T @ x / len(x)
    product = y.T @ x / len(x)
    return square + _RIDGE * np.trace(square) / len(square) * np.eye(len(square)), product
