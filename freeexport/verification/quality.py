"""What the precision of a bundle costs: the full model's predictions against the checkpoint's, on text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from freeexport.checkpoints.examples import TARGETS_WANTED, DataError, read_examples
from freeexport.verification.engine_pair import EnginePair
from freeexport.verification.parity import Batch, encode, forward, in_precision_of, pad, rows_of, sample_batch
from freeexport.verification.row_noise import log_softmax
from runtime.bundle.bundle import Bundle
from runtime.errors import OptionError
from runtime.machine.machine import usable_cores
from runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Mean nats that predictions may diverge by: so many times what those of transformers do when it is as coarse, and
# always so many. Above, something is wrong, not just coarse.
TIMES = 2.5
LEAST = {"fp32": 1e-4, "fp16": 2e-2}
COARSE_LEAST = 5e-2
# Sequences in memory at once, the most tokens of each, and how many lines are read.
ROWS, LONGEST, LINES = 8, 256, 256
_BLOCK = 64  # rows whose log probabilities are in memory at once


@dataclass(frozen=True)
class Quality:
    """Over `tokens` predictions: mean nats of the token that stands there, of the checkpoint (`reference_nll`) and of
    the bundle (`nll`); the Kullback-Leibler divergence of their predictions in nats (`divergence`), that of
    transformers when it is as coarse as the bundle (`coarse_divergence`), and what may be (`tolerance`); and how often
    their best tokens are the same (`agreement`)."""

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


def measure_quality(bundle: Bundle, model: PreTrainedModel, data: Path | None = None) -> Quality:
    """Teacher-forced, on the targets of `data` (JSON lines) or on the sample texts. Raises DataError, OptionError."""
    batches = [sample_batch(bundle)] if data is None else _batches(bundle, data)
    sums, count = np.zeros(5), 0
    for batch in batches:
        ours, theirs, coarse, targets = _predictions(bundle, model, batch)
        for start in range(0, len(targets), _BLOCK):
            block = slice(start, start + _BLOCK)
            sums += _sums(ours[block], theirs[block], coarse[block], targets[block])
        count += len(targets)
    if not count:
        raise DataError("no text has two tokens, so nothing is predicted; give longer text")
    reference_nll, nll, divergence, itself, agreement = (float(value) for value in sums / count)
    tolerance = max(LEAST.get(bundle.manifest.precision, COARSE_LEAST), TIMES * itself)
    return Quality(count, reference_nll, nll, divergence, agreement, tolerance, itself)


def _sums(ours: np.ndarray, theirs: np.ndarray, coarse: np.ndarray, targets: np.ndarray) -> list[float]:
    """Over the rows of logits [n, V]: nats of targets (theirs, ours), divergence (ours, coarse), same best token."""
    ours, theirs, coarse = map(log_softmax, (ours, theirs, coarse))
    rows, weights = np.arange(len(targets)), np.exp(theirs)
    nats = [-each[rows, targets].sum() for each in (theirs, ours)]
    divergences = [(weights * (theirs - each)).sum() for each in (ours, coarse)]
    return [*nats, *divergences, (ours.argmax(-1) == theirs.argmax(-1)).sum()]


def _predictions(
    bundle: Bundle, model: PreTrainedModel, batch: Batch
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Logits [n, V] of the bundle, of the checkpoint, and of transformers as coarse as the bundle; and the tokens [n]
    that come next."""
    width = batch.tokens.shape[1]
    cross, _ = encode(bundle, batch)
    pair = EnginePair(bundle, len(batch.tokens), usable_cores(), cross)
    deep = pair.deep(pair.shallow(batch.tokens, batch.lengths)["hidden"], batch.lengths)
    rows = rows_of(np.maximum(batch.lengths - 1, 0), width)
    theirs = coarse = _logits(model, batch, rows)
    if bundle.manifest.precision != "fp32":
        with in_precision_of(bundle.manifest, model):
            coarse = _logits(model, batch, rows)
    return deep["logits"][rows], theirs, coarse, batch.tokens.reshape(-1)[rows + 1]


def _logits(model: PreTrainedModel, batch: Batch, rows: np.ndarray) -> np.ndarray:
    logits = forward(model, batch)["logits"].numpy()
    found: np.ndarray = logits.reshape(-1, logits.shape[-1])[rows]
    return found


def _batches(bundle: Bundle, data: Path) -> Iterator[Batch]:
    """The first lines of `data`: input and target in one for a decoder-only bundle, else as prompt and answer."""
    manifest, tokenizer = bundle.manifest, Tokenizer.load(bundle.path, bundle.manifest.files)
    if tokenizer is None:
        raise OptionError("the bundle has no tokenizer, so it takes no text; leave --data out")
    requests = read_examples(data, LINES, TARGETS_WANTED)
    longest = min(LONGEST, manifest.capacity)
    for start in range(0, len(requests), ROWS):
        chunk = requests[start : start + ROWS]
        prompts = [_prompt(tokenizer, request.input) for request in chunk]
        targets = [tokenizer.encode(request.target or "", special=False) for request in chunk]
        if manifest.encoder_decoder:
            begin = [manifest.decoder_start_token_id or 0]
            read = [prompt[: manifest.encoder_capacity] for prompt in prompts]
            yield Batch(*pad([(begin + target)[:longest] for target in targets]), *pad(read))
        else:
            yield Batch(*pad([(a + b)[:longest] for a, b in zip(prompts, targets, strict=True)]))


def _prompt(tokenizer: Tokenizer, text: str | list[dict[str, str]]) -> list[int]:
    return tokenizer.encode(text) if isinstance(text, str) else tokenizer.encode_chat(text)
