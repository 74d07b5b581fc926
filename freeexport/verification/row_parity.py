"""Compare ways to run a bundle's engines: all rows at once, one by one, and in sync passes.

8- and 4-bit weights come with 8-bit activations. Kernels and processors may round the last bit of
attention differently. Now and then that moves an activation to its next step, and after a few
layers every row differs. By how much depends on the model and the precision, so the noise is
measured: caches and hidden states are changed by less than one step of the engines' arithmetic. The
largest difference depends on chance, so no limit applies to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from freeexport.verification.batches import FULL, Batch, Extent
from freeexport.verification.checks import Check, Measure
from freeexport.verification.engines import EnginePair
from runtime.bundle.manifest import SCALE_BYTES, FloatType
from runtime.text.sampler import log_softmax

# Limit of a comparison, relative to noise. Faults (a shifted position, another row's cache) exceed
# noise by a factor of 15 to 1000.
FACTOR = 4.0
# Shares of rows that may exceed even that: by another best token, and by their divergence.
BEST = 0.01
ROWS = 0.02
# Smallest tolerance in nats. In fp32 noise is almost zero, and a different order of summation in
# kernels exceeds it.
MIN_TOLERANCE = 1e-4
# Rows whose log probabilities are in memory at once.
_BLOCK = 64
Arithmetic = FloatType | Literal["8 bits"]
# Largest relative change of the engines' inputs for measuring noise: the last bit of their
# arithmetic. In fp32 it is the difference of attention between kernels (5e-7). With 8-bit
# activations, noise is the same from 6e-8 to 4e-3 in a model of 30 layers. In a model of few
# layers, smaller changes move too few activations.
STEP: dict[Arithmetic, float] = {"fp32": 2**-21, "fp16": 2**-10, "bf16": 2**-8, "8 bits": 2**-12}


@dataclass(frozen=True)
class Rows:
    """Outputs of the engines for n valid rows.

    Attributes:
        index: Flat indices [n] into the padded text.
        hidden: Hidden states [n, d].
        shallow: Logits [n, V] of the shallow engine.
        deep: Logits [n, V] of the deep engine.
    """

    index: np.ndarray
    hidden: np.ndarray
    shallow: np.ndarray
    deep: np.ndarray

    @classmethod
    def of_call(
        cls, index: np.ndarray, rows: np.ndarray, shallow: dict[str, np.ndarray], deep: np.ndarray
    ) -> Rows:
        """Select the flat indices `rows` of a call's outputs, which are at `index` of the text."""
        hidden = shallow["hidden"].reshape(-1, shallow["hidden"].shape[-1])
        return cls(index, hidden[rows], shallow["logits"][rows], deep[rows])

    def __getitem__(self, chosen: np.ndarray) -> Rows:
        return Rows(*(array[chosen] for array in vars(self).values()))


@dataclass(frozen=True)
class Moved:
    """Changes of n predictions.

    Attributes:
        divergence: Kullback-Leibler divergence, in nats.
        nats: Decrease of the token's log probability.
        gap: Distance of the two best logits before.
        gap_moved: Change of the distance between these two logits.
        other_best: True if the best token changed.
        nll: Negative log probability of the token before.
    """

    divergence: np.ndarray
    nats: np.ndarray
    gap: np.ndarray
    gap_moved: np.ndarray
    other_best: np.ndarray
    nll: np.ndarray

    @classmethod
    def between(cls, before: np.ndarray, after: np.ndarray, tokens: np.ndarray) -> Moved:
        """Compare logits [n, V] before and after, with any n tokens."""
        none = np.zeros(0)
        parts = [cls(none, none, none, gap_moved=none, other_best=none > 0, nll=none)]
        for start in range(0, len(before), _BLOCK):
            old, new, followed = (
                array[start : start + _BLOCK] for array in (before, after, tokens)
            )
            rows = np.arange(len(old))
            second, best = np.argpartition(old, -2, -1)[:, -2:].T
            gap = (old[rows, best] - old[rows, second]).astype(np.float64)
            gap_moved = np.abs(gap - (new[rows, best] - new[rows, second]))
            ours = log_softmax(new)
            theirs = log_softmax(old)
            # Values below 0 are float64's rounding errors.
            divergence = np.maximum((np.exp(theirs) * (theirs - ours)).sum(-1), 0)
            nll = -theirs[rows, followed]
            other_best = new.argmax(-1) != old.argmax(-1)
            parts.append(
                cls(
                    divergence,
                    -ours[rows, followed] - nll,
                    gap,
                    gap_moved=gap_moved,
                    other_best=other_best,
                    nll=nll,
                )
            )
        return cls.joined(parts)

    @classmethod
    def joined(cls, parts: Sequence[Moved]) -> Moved:
        return cls(*map(np.concatenate, zip(*(vars(part).values() for part in parts), strict=True)))


def self_checks(
    pair: EnginePair,
    text: Batch,
    whole: Rows,
    hidden: np.ndarray,
    arithmetic: Arithmetic,
    extent: Extent = FULL,
) -> Iterator[Check]:
    """Compare other ways to call the engines with `whole` and `hidden`, all rows at once.

    `hidden` is [B, W, d].
    """
    shallow, deep = measure_noise(pair, text, STEP[arithmetic], extent.draws)
    stepped = in_calls(pair, text, range(text.width + 1))
    tokens = text.following(whole.index)
    name = "stepping against prefill"
    yield from row_checks(
        name, "shallow logits", Moved.between(whole.shallow, stepped.shallow, tokens), shallow
    )
    yield from row_checks(
        name, "deep logits", Moved.between(whole.deep, stepped.deep, tokens), deep
    )
    for size, together, singles, tokens in _sync_passes(pair, text, hidden, extent.sync_sizes):
        moved = Moved.between(singles, together, tokens)
        yield from row_checks(f"sync pass of {size}", "deep logits", moved, deep)


def measure_noise(
    pair: EnginePair, text: Batch, step: float, draws: int = FULL.draws
) -> tuple[Moved, Moved]:
    """Measure how shallow and deep predictions react to small changes of the engines' inputs.

    The text is run in growing pieces, unchanged, and with hidden states and the caches of every
    layer changed by up to `step` of their value.
    """
    bounds = [
        0,
        *(1 << power for power in range(text.width.bit_length()) if 1 << power < text.width),
        text.width,
    ]
    before = in_calls(pair, text, bounds)
    # The first row reads no cache, so its shallow prediction does not change.
    later = (
        np.flatnonzero(before.index % text.width > 0)
        if text.width > 1
        else np.arange(len(before.index))
    )
    before = before[later]
    tokens = text.following(before.index)
    shallow = list[Moved]()
    deep = list[Moved]()
    for draw in range(draws):
        after = in_calls(pair, text, bounds, step=step, generator=np.random.default_rng(draw))[
            later
        ]
        shallow.append(Moved.between(before.shallow, after.shallow, tokens))
        deep.append(Moved.between(before.deep, after.deep, tokens))
    return Moved.joined(shallow), Moved.joined(deep)


def in_calls(
    pair: EnginePair,
    text: Batch,
    bounds: Sequence[int],
    step: float = 0.0,
    generator: np.random.Generator | None = None,
) -> Rows:
    """Run the text in calls over the columns between two bounds, and return all valid rows.

    With a generator, the engines' inputs are changed by up to `step` of their value.
    """

    def changed(array: np.ndarray) -> np.ndarray:
        if generator is None:
            return array
        return (array * (1 + step * generator.uniform(-1, 1, array.shape))).astype(array.dtype)

    pair.trim(0)
    parts = list[Rows]()
    previous = 0
    for start, end in pairwise(bounds):
        count = np.clip(text.lengths - start, 0, end - start).astype(np.int32)
        for cache in pair.caches.values():
            for array in cache.arrays.values():
                # Of values in 8 bits, only their scales can change so little.
                in_bytes = array.dtype == np.int8
                numbers = array[..., -SCALE_BYTES:].view(np.float32) if in_bytes else array
                numbers[:, :, previous:start] = changed(numbers[:, :, previous:start])
        shallow, deep_outputs = pair.both(text.tokens[:, start:end], count, changed)
        deep = deep_outputs["logits"]
        row, column = np.nonzero(np.arange(end - start) < count[:, None])
        parts.append(
            Rows.of_call(
                row * text.width + start + column, row * (end - start) + column, shallow, deep
            )
        )
        previous = start
    joined = Rows(*map(np.concatenate, zip(*(vars(part).values() for part in parts), strict=True)))
    return joined[np.argsort(joined.index)]


def _sync_passes(
    pair: EnginePair, text: Batch, hidden: np.ndarray, sizes: Sequence[int]
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield results of sync passes for each size.

    Each item has the size, logits [n, V] of one deep pass over up to `size` rows of each text,
    logits [n, V] of passes over one row at a time, and the next tokens [n]. A past precedes the
    passes.
    """
    # Pasts differ in length, so a pass reads rows at different positions, as in a batch.
    past = np.maximum(1, text.lengths // 3).astype(np.int32)

    def after_the_past(widths: Sequence[slice]) -> Iterator[np.ndarray]:
        pair.trim(0)
        pair.deep(hidden[:, : int(past.max())], past)
        for part in widths:
            yield pair.deep(rows[:, part], np.clip(count - part.start, 0, part.stop - part.start))[
                "logits"
            ]

    for size in sizes:
        count = np.clip(text.lengths - past, 0, size).astype(np.int32)
        if size > min(pair.manifest.max_pending, int(count.max(initial=0))):
            break
        columns = np.minimum(past[:, None] + np.arange(size), text.width - 1)
        rows = np.take_along_axis(hidden, columns[..., None], axis=1)
        (together,) = after_the_past([slice(0, size)])
        singles = np.stack(
            list(after_the_past([slice(place, place + 1) for place in range(size)])), axis=1
        )
        row, place = np.nonzero(np.arange(size) < count[:, None])
        tokens = text.following(row * text.width + columns[row, place])
        yield size, together.reshape(pair.rows, size, -1)[row, place], singles[row, place], tokens


def row_checks(name: str, tensor: str, moved: Moved, noise: Moved) -> Iterator[Check]:
    """Check that rows did not move further than noise moves them."""

    def check(measure: Measure, error: float, tolerance: float) -> Check:
        return Check(name, tensor, float(error), tolerance=float(tolerance), measure=measure)

    def limit(values: np.ndarray) -> float:
        """Return the tolerance for a measure of noise.

        It is FACTOR times the sum of the mean and the standard error for this number of rows, at
        least MIN_TOLERANCE. Unlike max, np.maximum keeps NaN.
        """
        mean = np.abs(values.mean()) + values.std() / np.sqrt(len(moved.divergence))
        return float(np.maximum(MIN_TOLERANCE, FACTOR * mean))

    yield check("divergence", moved.divergence.mean(), limit(noise.divergence))
    yield check("nats", np.abs(moved.nats.mean()), limit(noise.nats))
    clear = moved.gap > FACTOR * noise.gap_moved.max(initial=0.0)
    yield check("best", (moved.other_best & clear).sum() / max(1, clear.sum()), BEST)
    near = moved.divergence <= max(MIN_TOLERANCE, FACTOR * noise.divergence.max(initial=0.0))
    yield check("rows", 1 - near.mean(), ROWS)
