"""A bundle's engines against themselves: one row at a time, and sync passes of several rows, against all at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from freeexport.verification.checks import Check
from freeexport.verification.engine_pair import EnginePair
from freeexport.verification.row_noise import FACTOR, Moved, row_checks
from runtime.bundle.precision import FloatType

SYNC_SIZES = (1, 2, 3, 5, 8, 16)
DRAWS = 3

# By how much of themselves the numbers that an engine reads are changed, at most, to see its noise: a last bit of what
# it computes in. In fp32 it is what attention differs by from kernel to kernel (5e-7). With activations in 8 bits noise
# is the same from 6e-8 to 4e-3 in a model of 30 layers; in one of few layers less than this tips too few over.
Arithmetic = FloatType | Literal["8 bits"]
STEP: dict[Arithmetic, float] = {"fp32": 2**-21, "fp16": 2**-10, "bf16": 2**-8, "8 bits": 2**-12}
# In fp32 nothing tips over: there the largest difference is judged, of which this share of the largest value may always
# be.
LEAST = 1e-4


@dataclass(frozen=True)
class Text:
    """Token ids int64 [B, W], right-padded to `lengths` int32 [B]."""

    tokens: np.ndarray
    lengths: np.ndarray

    @property
    def width(self) -> int:
        return int(self.tokens.shape[1])

    def following(self, index: np.ndarray) -> np.ndarray:
        """The tokens after those at flat indices; after the last of a text any."""
        found: np.ndarray = np.roll(self.tokens, -1, axis=1).reshape(-1)[index]
        return found


@dataclass(frozen=True)
class Rows:
    """What the engines gave for valid rows: flat indices [n] into the padded text, hidden states [n, d], logits [n, V]
    of both engines."""

    index: np.ndarray
    hidden: np.ndarray
    shallow: np.ndarray
    deep: np.ndarray

    @classmethod
    def of_call(cls, index: np.ndarray, rows: np.ndarray, shallow: dict[str, np.ndarray], deep: np.ndarray) -> Rows:
        """The flat indices `rows` of a call's outputs, which are `index` of the text."""
        hidden = shallow["hidden"].reshape(-1, shallow["hidden"].shape[-1])
        return cls(index, hidden[rows], shallow["logits"][rows], deep[rows])

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """In the order of the text."""
        whole = [np.concatenate(arrays) for arrays in zip(*(vars(part).values() for part in parts), strict=True)]
        order = np.argsort(whole[0])
        return cls(*(array[order] for array in whole))

    def __getitem__(self, chosen: np.ndarray) -> Rows:
        return Rows(self.index[chosen], self.hidden[chosen], self.shallow[chosen], self.deep[chosen])


@dataclass(frozen=True)
class Noise:
    """How predictions move, and by which share of the largest value of each tensor."""

    shallow: Moved
    deep: Moved
    largest: dict[str, float]


def self_checks(
    pair: EnginePair, text: Text, whole: Rows, hidden: np.ndarray, arithmetic: Arithmetic
) -> Iterator[Check]:
    """`whole` and `hidden` [B, W, d] are what the engines gave for all rows at once. In fp32 the largest difference is
    judged, else what predictions are (see freeexport.verification.row_noise)."""
    noise = measure_noise(pair, text, STEP[arithmetic])
    exact = arithmetic == "fp32"
    stepped = in_calls(pair, text, range(text.width + 1))
    name = "stepping against prefill"
    if exact:
        yield _largest(name, "shallow hidden", stepped.hidden, whole.hidden, noise)
        yield _largest(name, "deep logits", stepped.deep, whole.deep, noise)
    else:
        tokens = text.following(whole.index)
        yield from row_checks(
            name, "shallow logits", Moved.between(whole.shallow, stepped.shallow, tokens), noise.shallow
        )
        yield from row_checks(name, "deep logits", Moved.between(whole.deep, stepped.deep, tokens), noise.deep)
    for size, together, singles, tokens in _sync_passes(pair, text, hidden):
        name = f"sync pass of {size}"
        if exact:
            yield _largest(name, "deep logits", together, singles, noise)
        else:
            yield from row_checks(name, "deep logits", Moved.between(singles, together, tokens), noise.deep)


def measure_noise(pair: EnginePair, text: Text, step: float) -> Noise:
    """What the engines give for the text in growing pieces, against the same with what they read changed by up to
    `step` of itself: hidden states, and the caches of every layer."""
    bounds = [0, *(1 << power for power in range(text.width.bit_length()) if 1 << power < text.width), text.width]
    before = in_calls(pair, text, bounds)
    # The first row reads no cache, so nothing changes in its shallow prediction.
    later = np.flatnonzero(before.index % text.width > 0) if text.width > 1 else np.arange(len(before.index))
    before = before[later]
    tokens, largest = text.following(before.index), {"shallow hidden": 0.0, "deep logits": 0.0}
    moved: dict[str, list[Moved]] = {"shallow": [], "deep": []}
    for draw in range(DRAWS):
        after = in_calls(pair, text, bounds, _Change(step, draw))[later]
        moved["shallow"].append(Moved.between(before.shallow, after.shallow, tokens))
        moved["deep"].append(Moved.between(before.deep, after.deep, tokens))
        for tensor, ours, theirs in (
            ("shallow hidden", after.hidden, before.hidden),
            ("deep logits", after.deep, before.deep),
        ):
            largest[tensor] = float(np.maximum(largest[tensor], _share(ours, theirs)))
    return Noise(Moved.joined(moved["shallow"]), Moved.joined(moved["deep"]), largest)


class _Change:
    """Changes numbers by up to `step` of themselves."""

    def __init__(self, step: float, seed: int) -> None:
        self._step, self._generator = step, np.random.default_rng(seed)

    def __call__(self, array: np.ndarray) -> np.ndarray:
        factors = 1 + self._step * self._generator.uniform(-1, 1, array.shape)
        return (array * factors).astype(array.dtype)


def in_calls(pair: EnginePair, text: Text, bounds: Sequence[int], change: _Change | None = None) -> Rows:
    """All valid rows of the text, in calls over the columns between two bounds."""
    pair.trim(0)
    parts, previous = [], 0
    for start, end in pairwise(bounds):
        count = np.clip(text.lengths - start, 0, end - start).astype(np.int32)
        if change is not None:
            _change_caches(pair, change, previous, start)
        shallow = pair.shallow(text.tokens[:, start:end], count)
        hidden = shallow["hidden"] if change is None else change(shallow["hidden"])
        deep = pair.deep(hidden, count)["logits"]
        row, column = np.nonzero(np.arange(end - start) < count[:, None])
        parts.append(Rows.of_call(row * text.width + start + column, row * (end - start) + column, shallow, deep))
        previous = start
    return Rows.joined(parts)


def _change_caches(pair: EnginePair, change: _Change, start: int, end: int) -> None:
    for cache in pair.caches.values():
        for array in cache.arrays.values():
            array[:, :, start:end] = change(array[:, :, start:end])


def _sync_passes(
    pair: EnginePair, text: Text, hidden: np.ndarray
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """For each size: logits [n, V] of a deep pass over up to so many rows of each text, and of passes over one row,
    with a past before them; and the tokens [n] that follow."""
    # Each text has a past of its own length: a pass reads rows of different positions, as in a batch.
    past = np.maximum(1, text.lengths // 3).astype(np.int32)
    for size in SYNC_SIZES:
        count = np.clip(text.lengths - past, 0, size).astype(np.int32)
        if size > min(pair.manifest.max_pending, int(count.max(initial=0))):
            break
        columns = np.minimum(past[:, None] + np.arange(size), text.width - 1)
        rows = np.take_along_axis(hidden, columns[..., None], axis=1)
        _after(pair, hidden, past)
        together = pair.deep(rows, count)["logits"].reshape(pair.rows, size, -1)
        _after(pair, hidden, past)
        singles = [
            pair.deep(rows[:, place : place + 1], (count > place).astype(np.int32))["logits"] for place in range(size)
        ]
        row, place = np.nonzero(np.arange(size) < count[:, None])
        tokens = text.following(row * text.width + columns[row, place])
        yield size, together[row, place], np.stack(singles, axis=1)[row, place], tokens


def _after(pair: EnginePair, hidden: np.ndarray, past: np.ndarray) -> None:
    pair.trim(0)
    pair.deep(hidden[:, : int(past.max())], past)


def _largest(name: str, tensor: str, ours: np.ndarray, theirs: np.ndarray, noise: Noise) -> Check:
    limit = max(LEAST, FACTOR * noise.largest[tensor])
    return Check(name, tensor, _share(ours, theirs), limit, scale=scale_of(theirs))


def _share(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max(initial=0.0) / scale_of(theirs))


def scale_of(values: np.ndarray) -> float:
    """The largest value, at least 1: what differences are shares of."""
    return max(1.0, float(np.abs(values).max(initial=0.0)))
