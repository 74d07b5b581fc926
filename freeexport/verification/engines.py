"""Run a bundle's engines in several ways: all rows at once, one by one, and in sync passes.

8- and 4-bit weights come with 8-bit activations. Kernels and processors may round the last bit of
attention differently. Now and then that moves an activation to its next step, and after a few
layers every row differs. By how much depends on the model and the precision, so it is measured:
caches and hidden states are changed by less than one step of the engines' arithmetic. The largest
difference depends on chance, so it is not judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from typing import Literal

import numpy as np

from freeexport.verification.checks import Check, Measure
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import FloatType, Manifest
from runtime.engines.kv_cache import KVCache
from runtime.engines.onnx import OnnxEngine, value
from runtime.engines.runner import Encoder
from runtime.machine.machine import usable_cores
from runtime.text.sampler import log_softmax
from runtime.text.tokenizer import Tokenizer

# Limit of a comparison, relative to noise. Faults (a shifted position, another row's cache) exceed
# noise by a factor of 15 to 1000.
FACTOR = 4.0
# Shares of rows that may exceed even that: by another best token, and by their divergence.
BEST = 0.01
ROWS = 0.02
# Smallest tolerance in nats. In fp32 noise is almost zero, and a different order of summation in
# kernels exceeds it.
LEAST = 1e-4
SOUNDS = 2  # windows to run if a bundle reads speech
# Rows whose log probabilities are in memory at once.
_BLOCK = 64
# Largest relative change of the engines' inputs for measuring noise: the last bit of their
# arithmetic. In fp32 it is the difference of attention between kernels (5e-7). With 8-bit
# activations, noise is the same from 6e-8 to 4e-3 in a model of 30 layers. In a model of few
# layers, smaller changes move too few activations.
Arithmetic = FloatType | Literal["8 bits"]
STEP: dict[Arithmetic, float] = {"fp32": 2**-21, "fp16": 2**-10, "bf16": 2**-8, "8 bits": 2**-12}


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
        found: np.ndarray = np.roll(self.tokens, -1, axis=1).reshape(-1)[index]
        return found


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


def rows_of(lengths: np.ndarray | None, width: int) -> np.ndarray:
    """Return flat indices of the valid rows of a padded batch."""
    assert lengths is not None
    return np.flatnonzero(mask_of(lengths, width))


def encode(
    bundle: Bundle, batch: Batch, threads: int | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Return the cross-attention inputs of a padded batch, and the encoder's output.

    For a decoder-only bundle, they are empty and None.
    """
    if batch.prompts is None or batch.prompt_lengths is None:
        return {}, None
    kernels = bundle.manifest.kernels
    threads = threads or usable_cores()
    engines = [
        OnnxEngine(bundle.engine(name), threads, kernels=kernels)
        for name in ("encoder", "prologue")
    ]
    return Encoder(*engines).run_padded(batch.prompts, batch.prompt_lengths)


class EnginePair:
    """Shallow and deep engine over `rows` sequences, and the exit's engine if there is one.

    Each call extends the caches by the query lengths of its rows.
    """

    def __init__(
        self, bundle: Bundle, rows: int, threads: int, cross: dict[str, np.ndarray] | None = None
    ) -> None:
        self.manifest = manifest = bundle.manifest
        self.rows = rows
        self.cross = cross or {}
        self.caches = dict[str, KVCache]()
        self._engines = dict[str, OnnxEngine]()
        dtype = np.float16 if manifest.cache_type == "fp16" else np.float32
        length = manifest.capacity + manifest.max_pending
        engines = {"shallow": manifest.shallow_caches, "deep": manifest.deep_layers}
        if manifest.exit_engine:
            engines["exit"] = manifest.exit_names
        # Features of the newest positions.
        self._before = np.zeros((rows, 1, manifest.feature_size), np.float32)
        for name, layers in engines.items():
            self._engines[name] = OnnxEngine(bundle.engine(name), threads, kernels=manifest.kernels)
            self.caches[name] = KVCache(
                layers, rows, manifest.kv_heads, length, manifest.head_dim, dtype
            )

    def both(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        changed: Callable[[np.ndarray], np.ndarray] = np.asarray,
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Run all engines, and return the outputs of the shallow and the deep engine.

        `changed` is applied to the hidden states and features that engines read. If the exit has
        its own engine, that provides the shallow predictions.
        """
        shallow = self.shallow(tokens, lengths)
        deep = self.deep(changed(shallow["hidden"]), lengths)
        if self.manifest.exit_engine:
            features = np.concatenate([self._before, deep["features"]], axis=1)
            self._before = np.take_along_axis(
                features, lengths[:, None, None].astype(np.int64), axis=1
            )
            reads = (
                {"input_ids": tokens}
                if self.manifest.exit_embeds
                else {"hidden": shallow["hidden"]}
            )
            inputs = {**reads, "features": changed(features[:, :-1])}
            shallow |= self._run("exit", inputs, {}, lengths, tokens.shape[1])
        return shallow, deep

    def shallow(self, tokens: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
        """Run the shallow engine on `tokens` int64 [B, q], right-padded to `lengths` [B].

        Returns `hidden` [B, q, d]. If the engine has the head, also `logits`, `token` and
        `confidence` of all rows [B * q].
        """
        hidden = np.zeros((*tokens.shape, self.manifest.hidden_size), np.float32)
        return self._run(
            "shallow", {"input_ids": tokens}, {"hidden": hidden}, lengths, tokens.shape[1]
        )

    def deep(self, hidden: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
        """Run the deep engine on `hidden` float32 [B, k, d].

        Returns `logits`, `token`, `confidence` and `nll` of all rows [B * k], and `features` [B, k,
        f] if the exit has its own engine.
        """
        count = self.rows * hidden.shape[1]
        inputs = {"hidden": hidden, "emitted": np.zeros(count, np.int64)}
        outputs = {"nll": np.zeros(count, np.float32)}
        if self.manifest.exit_engine:
            size = self.manifest.feature_size
            outputs["features"] = np.zeros((*hidden.shape[:2], size), np.float32)
        return self._run("deep", inputs, outputs, lengths, hidden.shape[1])

    def trim(self, length: int) -> None:
        if not length:
            self._before[:] = 0
        for cache in self.caches.values():
            for row in range(self.rows):
                cache.trim(row, length)

    def _run(
        self,
        name: str,
        inputs: dict[str, np.ndarray],
        outputs: dict[str, np.ndarray],
        lengths: np.ndarray,
        width: int,
    ) -> dict[str, np.ndarray]:
        count = self.rows * width
        cache = self.caches[name]
        past = {part: value(array) for part, array in cache.arrays.items()}
        layers = {part.split(".")[0] for part in past}
        cross = {
            n: a for n, a in self.cross.items() if n == "cross_lengths" or n.split(".")[1] in layers
        }
        heads = {}
        if name != "shallow" or not self.manifest.exit_engine:
            heads["head_rows"] = np.arange(count)
            outputs["token"] = np.zeros(count, np.int64)
            outputs["confidence"] = np.zeros(count, np.float32)
            outputs["logits"] = np.zeros((count, self.manifest.vocab_size), np.float32)
        call = self._engines[name].bind(
            {
                **{name: np.ascontiguousarray(array) for name, array in inputs.items()},
                "past_lengths": cache.lengths,
                "query_lengths": lengths.astype(np.int32),
                **(
                    {"exit_lengths": lengths.astype(np.int32)}
                    if cache.own_exit and name == "shallow"
                    else {}
                ),
                **heads,
                **cross,
                **{f"past.{part}": item for part, item in past.items()},
            },
            {**outputs, **{f"present.{part}": item for part, item in past.items()}},
        )
        call.run()
        for row, length in enumerate(lengths):
            cache.extend(row, int(length))
        return outputs


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
        parts = [cls(none, none, none, none, none > 0, none)]
        for start in range(0, len(before), _BLOCK):
            old, new, said = (array[start : start + _BLOCK] for array in (before, after, tokens))
            rows = np.arange(len(old))
            second, best = np.argpartition(old, -2, -1)[:, -2:].T
            gap = (old[rows, best] - old[rows, second]).astype(np.float64)
            gap_moved = np.abs(gap - (new[rows, best] - new[rows, second]))
            ours = log_softmax(new)
            theirs = log_softmax(old)
            # Values below 0 are float64's rounding errors.
            divergence = np.maximum((np.exp(theirs) * (theirs - ours)).sum(-1), 0)
            nll = -theirs[rows, said]
            other_best = new.argmax(-1) != old.argmax(-1)
            parts.append(cls(divergence, -ours[rows, said] - nll, gap, gap_moved, other_best, nll))
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
        after = in_calls(pair, text, bounds, step, np.random.default_rng(draw))[later]
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
                array[:, :, previous:start] = changed(array[:, :, previous:start])
        shallow, found = pair.both(text.tokens[:, start:end], count, changed)
        deep = found["logits"]
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
        return Check(name, tensor, float(error), float(tolerance), measure)

    def limit(values: np.ndarray) -> float:
        """Return the tolerance for a measure of noise.

        It is FACTOR times the sum of the mean and the standard error for this number of rows, at
        least LEAST. Unlike max, np.maximum keeps NaN.
        """
        mean = np.abs(values.mean()) + values.std() / np.sqrt(len(moved.divergence))
        return float(np.maximum(LEAST, FACTOR * mean))

    yield check("divergence", moved.divergence.mean(), limit(noise.divergence))
    yield check("nats", np.abs(moved.nats.mean()), limit(noise.nats))
    clear = moved.gap > FACTOR * noise.gap_moved.max(initial=0.0)
    yield check("best", (moved.other_best & clear).sum() / max(1, clear.sum()), BEST)
    near = moved.divergence <= max(LEAST, FACTOR * noise.divergence.max(initial=0.0))
    yield check("rows", 1 - near.mean(), ROWS)
