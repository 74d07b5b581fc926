"""Which tokens the shallow head knows: those that the text to expect has most of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import DataError
from freeexport.checkpoints.text_format import known_ends, text_format
from freeexport.system.jsonl import BrokenLine, read_requests
from graphs.description import Description
from graphs.errors import GraphError
from runtime.bundle.precision import ExitVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows of a matrix product come in multiples of this.
STEP = 64


# What "auto" aims at. A token that is left out never exits, so the exit rate can lose at most the rest.
COVERED = 0.99
CHUNK = 1024  # texts a call of the tokenizer


def exit_vocabulary(
    checkpoint: Checkpoint, description: Description, size: int | None, text: Path
) -> tuple[tuple[int, ...], ExitVocabulary]:
    """The `size` tokens that are most frequent in the targets of `text` (JSON lines; inputs where there is no target),
    ascending, and what share of it they are. Those that end a sequence are always among them. None for `size` is the
    smallest multiple of 64 that covers 99 %.

    Raises GraphError for a size out of range, CheckpointError without a tokenizer, DataError for broken lines.
    """
    form = text_format(checkpoint, description, 1)
    ends = sorted({form.eos, *known_ends(checkpoint, description.vocab_size)})
    check_size(size, len(ends), description.vocab_size)
    counts = np.zeros(description.vocab_size, np.int64)
    for ids in _token_ids(form.tokenizer, text):
        np.add.at(counts, [token for token in ids if token < len(counts)], 1)
        counts[form.eos] += 1
    total = int(counts.sum())
    ranked = ranked_tokens(ends, counts)
    covered = np.cumsum(counts[ranked]) / max(1, total)
    if size is None:
        fewest = int(np.searchsorted(covered, COVERED)) + 1
        size = min(-(-max(fewest, 2) // STEP) * STEP, len(counts))
    chosen = tuple(sorted(map(int, ranked[:size])))
    return chosen, ExitVocabulary(size, float(covered[size - 1]), total)


def check_size(size: int | None, fewest: int, vocabulary: int) -> None:
    """GraphError where an exit vocabulary of `size` tokens cannot be."""
    if size is not None and not max(2, fewest) <= size <= vocabulary:
        raise GraphError(
            f"exit vocabulary {size} is out of range; this model has {vocabulary} tokens and {fewest} that end a "
            f"sequence, choose {max(2, fewest)} to {vocabulary}"
        )


def _token_ids(tokenizer: PreTrainedTokenizerBase, path: Path) -> Iterator[list[int]]:
    texts = []
    for request in read_requests(path):
        if isinstance(request, BrokenLine):
            raise DataError(f"{path}, line {request.line_number}: {request.reason}; fix it")
        text = request.target if request.target is not None else request.input
        texts.append(text if isinstance(text, str) else " ".join(message["content"] for message in text))
    if not texts:
        raise DataError(f"{path} has no text; give one JSON object with 'input' and 'target' a line")
    for start in range(0, len(texts), CHUNK):
        encoded = tokenizer(texts[start : start + CHUNK], add_special_tokens=False, verbose=False)
        yield from encoded["input_ids"]


def ranked_tokens(ends: Sequence[int], *counts: np.ndarray) -> np.ndarray:
    """All token ids: `ends`, then by counts [V], of which the first decides, then the lower ids first, as vocabularies
    are roughly in the order of use."""
    ranked = np.lexsort((np.arange(len(counts[0])), *(-count for count in reversed(counts))))
    return np.concatenate([np.array(sorted(ends), np.int64), ranked[~np.isin(ranked, ends)]])
