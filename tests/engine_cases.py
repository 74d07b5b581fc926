"""Pairs of engines and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from checkpoints import VOCAB_SIZE

from freeexport.verification.batches import pad, sample_batch
from freeexport.verification.engines import EnginePair, encode_prompts
from runtime.bundle.bundle import Bundle


def pair_of(path: Path, rows: int) -> EnginePair:
    """Return engines for `rows` sequences. With an encoder, all read the first sample prompt."""
    bundle = Bundle.open(path)
    batch = sample_batch(bundle)
    if batch.prompts is not None and batch.prompt_lengths is not None:
        width = int(batch.prompt_lengths[0])
        prompts = np.repeat(batch.prompts[:1, :width], rows, 0)
        lengths = np.full(rows, width, np.int32)
        batch = replace(batch, prompts=prompts, prompt_lengths=lengths)
    return EnginePair(bundle, rows, 1, encode_prompts(bundle, batch)[0])


def tokens(*lengths: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random right-padded token IDs int64 [B, n] and their lengths int32 [B]."""
    generator = np.random.default_rng(0)
    return pad([generator.integers(3, VOCAB_SIZE, length).tolist() for length in lengths])


def every(rows: int, count: int) -> np.ndarray:
    """Return `count` for each of `rows` sequences, int32 [rows]."""
    return np.full(rows, count, np.int32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


CONFIDENCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "softmax": lambda p: np.sort(p)[:, -1] - np.sort(p)[:, -2],
    "max-prob": lambda p: p.max(-1),
    "entropy": lambda p: 1 + (p * np.log(np.maximum(p, 1e-300))).sum(-1) / np.log(p.shape[-1]),
}


def one_by_one(path: Path, ids: np.ndarray, read: int) -> tuple[np.ndarray, np.ndarray]:
    """Return hidden states [n, d] and logits [n, V] of ids [n].

    The first `read` ids are read in one call, then each in its own.
    """
    pair = pair_of(path, rows=1)
    found = list[tuple[np.ndarray, np.ndarray]]()
    for first, end in [(0, read), *((place, place + 1) for place in range(read, len(ids)))]:
        hidden = pair.shallow(ids[None, first:end], every(1, end - first))["hidden"]
        found.append((hidden[0], pair.deep(hidden, every(1, end - first))["logits"]))
    states, logits = zip(*found, strict=True)
    return np.concatenate(states), np.concatenate(logits)


def check_rows_are_exact(path: Path) -> None:
    """Assert that three sequences in calls of up to 16 rows have the same bits as one row at a time."""
    ids, lengths = tokens(25, 14, 36)
    ids = np.pad(ids, ((0, 0), (0, 16)))  # rows after the last valid one
    single = [one_by_one(path, ids[row, :length], 9) for row, length in enumerate(lengths)]
    batch = pair_of(path, rows=3)
    pasts = every(3, 9)
    batch.deep(batch.shallow(ids[:, :9], pasts)["hidden"], pasts)
    while (counts := np.minimum(lengths - pasts, [16, 1, 5])).any():
        width = counts.max()
        new = np.stack([ids[row, past : past + width] for row, past in enumerate(pasts)])
        hidden = batch.shallow(new, counts)["hidden"]
        logits = batch.deep(hidden, counts)["logits"].reshape(3, width, -1)
        for row, (past, count) in enumerate(zip(pasts, counts, strict=True)):
            np.testing.assert_array_equal(hidden[row, :count], single[row][0][past : past + count])
            np.testing.assert_array_equal(logits[row, :count], single[row][1][past : past + count])
        pasts = pasts + counts
