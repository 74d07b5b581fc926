"""Sample texts and sounds of a verification, as padded batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import Manifest
from runtime.text.tokenizer import Tokenizer

SOUNDS = 2  # windows to run if a bundle reads speech


@dataclass(frozen=True)
class Extent:
    """Extent of a verification.

    Attributes:
        tokens: Tokens of each text.
        draws: Draws of noise.
        sync_sizes: Rows of the sync passes.
        prompts: Number of prompts to decode.
        new_tokens: Tokens to decode for each prompt.
        seconds: Time after which no further check is started.
    """

    tokens: int = 48
    draws: int = 3
    sync_sizes: tuple[int, ...] = (1, 2, 3, 5, 8, 16)
    prompts: int = 4
    new_tokens: int = 64
    seconds: float = math.inf


FULL = Extent()
QUICK = Extent(tokens=24, draws=2, sync_sizes=(2, 8), prompts=2, new_tokens=16, seconds=60)


@dataclass(frozen=True)
class Batch:
    """Token sequences and prompts.

    Attributes:
        tokens: Right-padded token ids int64 [B, n].
        lengths: Their lengths [B].
        prompts: Prompts of an encoder-decoder: token ids, or spectrograms float32 [B, bins, 2 E].
        prompt_lengths: Their lengths [B].
    """

    tokens: np.ndarray
    lengths: np.ndarray
    prompts: np.ndarray | None = None
    prompt_lengths: np.ndarray | None = None

    @property
    def width(self) -> int:
        return int(self.tokens.shape[1])

    def following(self, index: np.ndarray) -> np.ndarray:
        """Return the tokens after those at flat indices.

        They are arbitrary after the last token of a text.
        """
        tokens: np.ndarray = np.roll(self.tokens, -1, axis=1).reshape(-1)[index]
        return tokens


def sample_batch(bundle: Bundle, tokens: int = FULL.tokens) -> Batch:
    """Return the sample texts as a padded batch."""
    manifest = bundle.manifest
    sequences = sample_ids(bundle)
    limit = max(1, min(tokens, manifest.capacity - 1))
    if manifest.speech is not None:
        start = [manifest.decoder_start_token_id or 0]
        targets = [start + ids[: limit - 1] for ids in sequences[:SOUNDS]]
        lengths = np.full(SOUNDS, manifest.encoder_capacity, np.int32)
        return Batch(*pad(targets), sample_sounds(manifest), lengths)
    if not manifest.encoder_decoder:
        return Batch(*pad([ids[:limit] for ids in sequences]))
    # The decoder's text need not answer the prompt.
    start = manifest.output_begins[:limit]
    targets = [start + ids[: limit - len(start)] for ids in sequences[1:] + sequences[:1]]
    prompts = [ids[: min(tokens, manifest.encoder_capacity)] for ids in sequences]
    return Batch(*pad(targets), *pad(prompts))


def sample_sounds(manifest: Manifest) -> np.ndarray:
    """Return windows of smooth random noise, as spectrograms float32 [SOUNDS, bins, 2 E]."""
    assert manifest.speech is not None
    shape = (SOUNDS, manifest.speech.bins, 2 * manifest.encoder_capacity)
    smooth = np.random.default_rng(0).standard_normal(shape).cumsum(axis=-1)
    return np.tanh(smooth / np.abs(smooth).max(axis=-1, keepdims=True)).astype(np.float32)


def sample_ids(bundle: Bundle) -> list[list[int]]:
    """Return token ids of the sample texts.

    If the bundle has no tokenizer or its vocabulary does not match, they are random, without
    padding.
    """
    tokenizer = Tokenizer.load(bundle.path, bundle.manifest.files)
    vocabulary = bundle.manifest.vocab_size
    if tokenizer is not None:
        texts = (
            files("freeexport").joinpath("data/verify.txt").read_text(encoding="utf-8").splitlines()
        )
        sequences = [tokenizer.encode(text) for text in texts]
        if all(0 <= token < vocabulary for ids in sequences for token in ids):
            return sequences
    generator = np.random.default_rng(0)
    # M2M100 in transformers assigns no position to padding tokens anywhere.
    known = [token for token in range(vocabulary) if token != bundle.manifest.pad_token_id]
    return [generator.choice(known, size).tolist() for size in (37, 11, 24, 5)]


def pad(sequences: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids int64 [B, n], zero-padded on the right, and their lengths int32 [B]."""
    tokens = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)] = ids
    return tokens, np.array([len(ids) for ids in sequences], np.int32)


def mask_of(lengths: np.ndarray, width: int) -> np.ndarray:
    """Return the mask of a padded batch, int64 [B, width]: 1 for tokens, 0 for padding."""
    return (np.arange(width)[None] < lengths[:, None]).astype(np.int64)


def valid_indices(lengths: np.ndarray | None, width: int) -> np.ndarray:
    """Return flat indices of the valid rows of a padded batch."""
    assert lengths is not None
    return np.flatnonzero(mask_of(lengths, width))
