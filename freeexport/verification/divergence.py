"""Measure how far a bundle's predictions on text diverge from the checkpoint's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from freeexport.checkpoints.examples import TARGETS_WANTED, DataError, read_examples, recording_of
from freeexport.verification.arithmetic import in_precision_of
from freeexport.verification.batches import Batch, pad, valid_indices
from freeexport.verification.engines import EnginePair, encode_prompts
from freeexport.verification.reference import forward
from freeexport.verification.row_parity import Moved
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import Precision
from runtime.errors import OptionError
from runtime.machine.machine import usable_cores
from runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tolerance of the mean divergence in nats: QUALITY_TIMES that of transformers in the same
# precision, at least MIN_QUALITY_TOLERANCE or MIN_COARSE_QUALITY_TOLERANCE. More than that
# indicates a fault, not low precision.
QUALITY_TIMES = 2.5
MIN_QUALITY_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
MIN_COARSE_QUALITY_TOLERANCE = 5e-2
# Sequences per batch, their maximum length in tokens, and the maximum number of lines read.
ROWS = 8
LONGEST = 256
LINES = 256
# Maximum lines of speech: the encoder takes as long as hundreds of tokens.
RECORDINGS = 32


@dataclass(frozen=True)
class Quality:
    """Quality of a bundle's predictions.

    Attributes:
        tokens: Number of predictions.
        reference_nll: Mean negative log-likelihood of the checkpoint, in nats.
        nll: That of the bundle.
        divergence: Mean Kullback-Leibler divergence of the bundle's predictions from the
            checkpoint's, in nats.
        agreement: Share of predictions with the same best token.
        tolerance: Largest divergence that passes.
        coarse_divergence: Divergence of transformers in the bundle's precision.
    """

    tokens: int
    reference_nll: float
    nll: float
    divergence: float
    agreement: float
    tolerance: float
    coarse_divergence: float = 0.0

    @property
    def perplexity_ratio(self) -> float:
        return float(np.exp(self.nll - self.reference_nll))

    @property
    def passed(self) -> bool:
        return bool(self.divergence <= self.tolerance)  # NaN fails


class Predictions(NamedTuple):
    """Predictions for n positions.

    Attributes:
        ours: Logits [n, V] of the bundle.
        theirs: Logits [n, V] of the checkpoint.
        coarse: Logits [n, V] of transformers in the bundle's precision.
        targets: Next tokens [n].
    """

    ours: np.ndarray
    theirs: np.ndarray
    coarse: np.ndarray
    targets: np.ndarray


def quality_of(predictions: Iterable[Predictions], precision: Precision) -> Quality:
    """Measure how far a bundle's predictions are from the checkpoint's."""
    parts = [
        (
            Moved.between(one.theirs, one.ours, one.targets),
            Moved.between(one.theirs, one.coarse, one.targets),
        )
        for one in predictions
    ]
    count = sum(len(ours.nll) for ours, _ in parts)
    if not count:
        raise DataError("no text has two tokens, so nothing is predicted; give longer text")
    ours, coarse = (Moved.joined(moved) for moved in zip(*parts, strict=True))
    means = (ours.nll, ours.nll + ours.nats, ours.divergence, ~ours.other_best, coarse.divergence)
    reference_nll, nll, divergence, agreement, itself = (float(values.mean()) for values in means)
    tolerance = max(
        MIN_QUALITY_TOLERANCE.get(precision, MIN_COARSE_QUALITY_TOLERANCE), QUALITY_TIMES * itself
    )
    return Quality(
        count,
        reference_nll,
        nll,
        divergence=divergence,
        agreement=agreement,
        tolerance=tolerance,
        coarse_divergence=itself,
    )


def predictions_on(bundle: Bundle, model: PreTrainedModel, data: Path) -> Iterator[Predictions]:
    """Yield teacher-forced predictions on the targets of `data`, a JSONL file.

    Raises:
        DataError: If the file is broken.
        OptionError: If the bundle has no tokenizer.
    """
    threads = usable_cores()
    speech = bundle.manifest.speech
    given = 0 if speech is None else len(speech.prefix(next(iter(speech.languages), "en")))

    def logits(batch: Batch, rows: np.ndarray) -> np.ndarray:
        selected: np.ndarray = forward(model, batch)["logits"].flatten(0, 1).numpy()[rows]
        return selected

    for batch in _batches(bundle, data):
        pair = EnginePair(
            bundle, len(batch.tokens), threads, encode_prompts(bundle, batch, threads)[0]
        )
        deep = pair.deep(pair.shallow(batch.tokens, batch.lengths)["hidden"], batch.lengths)
        rows = valid_indices(np.maximum(batch.lengths - 1, 0), batch.width)
        rows = rows[rows % batch.width >= given]
        theirs = coarse = logits(batch, rows)
        if bundle.manifest.precision != "fp32":
            with in_precision_of(bundle.manifest, model):
                coarse = logits(batch, rows)
        yield Predictions(deep["logits"][rows], theirs, coarse, batch.following(rows))


def _batches(bundle: Bundle, data: Path) -> Iterator[Batch]:
    """Yield batches of the first lines of `data`.

    A decoder-only bundle gets input and target as one sequence, others get them as prompt and
    answer.
    """
    manifest = bundle.manifest
    tokenizer = Tokenizer.load(bundle.path, manifest.files)
    if tokenizer is None:
        raise OptionError("the bundle has no tokenizer, so it takes no text; leave --data out")
    longest = min(LONGEST, manifest.capacity)
    if (speech := manifest.speech) is not None:
        requests = read_examples(data, RECORDINGS, TARGETS_WANTED)
        start = manifest.decoder_start_token_id or 0
        for first in range(0, len(requests), ROWS):
            lines = requests[first : first + ROWS]
            sounds = [recording_of(line, speech, manifest.encoder_capacity, data) for line in lines]
            texts = [
                tokenizer.encode(f" {str(line.target).strip()}", special=False) for line in lines
            ]
            prefixes = [[start, *speech.prefix(sound.language)] for sound in sounds]
            targets = [
                (begin + text)[:longest] for begin, text in zip(prefixes, texts, strict=True)
            ]
            features = [sound.features() for sound in sounds]
            counts = [len(sound) for sound in sounds]
            yield Batch(*pad(targets), np.stack(features), np.array(counts, np.int32))
        return
    pairs = []
    for request in read_examples(data, LINES, TARGETS_WANTED):
        text = request.text
        prompt = tokenizer.encode(text) if isinstance(text, str) else tokenizer.encode_chat(text)
        pairs.append((prompt, tokenizer.encode(request.target or "", special=False)))
    for start in range(0, len(pairs), ROWS):
        chunk = pairs[start : start + ROWS]
        if manifest.encoder_decoder:
            begin = manifest.output_begins
            targets = [(begin + target)[:longest] for _, target in chunk]
            yield Batch(
                *pad(targets), *pad([prompt[: manifest.encoder_capacity] for prompt, _ in chunk])
            )
        else:
            yield Batch(*pad([(prompt + target)[:longest] for prompt, target in chunk]))
