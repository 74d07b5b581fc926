"""KV caches: self-attention of one engine, cross-attention of all slots, and their memory.

A self-attention cache has one array per layer and part, with one row per slot. Engines write to it
in place.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypedDict

import numpy as np

from runtime.bundle.manifest import Manifest
from runtime.errors import CapacityError
from runtime.machine.machine import available_memory, lazy_zeros

logger = logging.getLogger(__name__)

PARTS = ("key", "value")
# Cross-attention arrays have a power of two positions up to MAX_DOUBLED, then multiples of
# CROSS_STEP. Longer prompts then seldom need another array, for which a call must be bound again
# (0.2 ms).
MIN_DOUBLED = 64
MAX_DOUBLED = 512
CROSS_STEP = 32


class CacheSizes(TypedDict):
    """Sizes of a KVCache. See there."""

    layers: Sequence[int | str]
    slots: int
    kv_heads: int
    rows: int
    width: int
    dtype: np.dtype | type


class KVCache:
    """Self-attention cache of one engine.

    `arrays["{layer}.{part}"]` is [slots, kv_heads, rows, width]. `lengths` int32 [slots] counts
    the valid rows of each slot. Rows after them are unspecified and never read. `own_exit` is True
    if some of the layers are the exit's, needed only if an exit may be taken.

    Args:
        layers: Names of the layers.
        slots: Number of slots.
        kv_heads: Heads of keys and values.
        rows: Rows per slot.
        width: Elements of a row of a head: its values, with int8 also the bytes of their scale.
        dtype: Type of the elements.
        zeros: Allocates an array of a shape and type. Default: in host memory.
        fixed: The engine requires exactly `rows` rows.
    """

    def __init__(
        self,
        layers: Sequence[int | str],
        slots: int,
        kv_heads: int,
        rows: int,
        width: int,
        dtype: np.dtype | type,
        zeros: Callable[..., Any] = lazy_zeros,
        fixed: bool = False,
    ) -> None:
        self.rows = rows
        self._zeros = zeros
        self._fixed = fixed
        self._layers = layers
        self._kv_heads = kv_heads
        self._width = width
        self._dtype = dtype
        self.own_exit = any(isinstance(layer, str) for layer in layers)
        self.lengths = np.zeros(slots, np.int32)
        self._counts: Any = self.lengths.data  # faster access to single numbers
        # Zeroed memory is not resident until written, and has no NaN, which would pass a mask.
        self.arrays = {
            f"{layer}.{part}": zeros((slots, kv_heads, rows, width), dtype)
            for layer in layers
            for part in PARTS
        }

    def attended(self, cross: dict[str, Any]) -> dict[str, Any]:
        """Select the `cross.{layer}.key|value` and `cross_lengths` that these layers read."""
        layers = {name.split(".")[0] for name in self.arrays}
        read = {}
        for name, array in cross.items():
            if name == "cross_lengths" or name.split(".")[1] in layers:
                read[name] = array
        return read

    def slot(self, slot: int) -> Iterator[tuple[str, np.ndarray]]:
        """Yield name and view [1, kv_heads, rows, width] of every array of a slot."""
        for name, array in self.arrays.items():
            yield name, array[slot : slot + 1]

    def length(self, slot: int) -> int:
        """Return the number of valid rows of a slot."""
        count: int = self._counts[slot]
        return count

    def extend(self, slot: int, count: int) -> None:
        """Count rows that an engine has just written.

        Raises:
            CapacityError: If the slot has too few rows.
        """
        length = self._counts[slot] + count
        if length > self.rows:
            raise CapacityError(
                f"a sequence of {length} positions does not fit a KV cache of {self.rows} rows"
            )
        self._counts[slot] = length

    def trim(self, slot: int, length: int) -> None:
        """Drop all rows after the first `length`. This is the only way to rewind."""
        self._counts[slot] = min(self._counts[slot], length)

    def copy_rows(self, source: int, target: int, first: int = 0) -> None:
        """Copy slot `source` to slot `target`, which already has its first `first` rows."""
        length = int(self.lengths[source])
        for array in self.arrays.values():
            array[target, :, first:length] = array[source, :, first:length]
        self.lengths[target] = length

    def read(self, slot: int, first: int, count: int, own: bool) -> np.ndarray:
        """Return a copy of `count` rows, [arrays, kv_heads, count, width].

        The rows are those of the model's layers, or with `own` those of the exit's layers.
        """
        places = self._places(first, count)
        parts = [array[slot][:, places] for array in self._arrays_of(own)]
        if not parts:
            return np.zeros((0, self._kv_heads, count, self._width), self._dtype)
        return np.stack(parts)

    def write(self, slot: int, first: int, rows: np.ndarray, own: bool) -> None:
        """Write rows returned by `read` after the first `first` rows of a slot."""
        count = rows.shape[2]
        places = self._places(first, count)
        for array, new in zip(self._arrays_of(own), rows, strict=True):
            array[slot][:, places] = new
        self.lengths[slot] = first + count

    def row_bytes(self, own: bool) -> int:
        """Return the bytes per position that `read` copies."""
        return sum(array[0, :, 0].nbytes for array in self._arrays_of(own))

    def _places(self, first: int, count: int) -> slice | np.ndarray:
        """Return the rows of `count` positions from `first`."""
        return slice(first, first + count)

    def _arrays_of(self, own: bool) -> list[np.ndarray]:
        return [array for name, array in self.arrays.items() if name.startswith("exit.") == own]

    def resized(self, slots: int, rows: int) -> KVCache:
        """Return an empty cache of the same layers with at least `rows` rows."""
        return type(self)(
            self._layers,
            slots,
            self._kv_heads,
            rows=self.rows if self._fixed else rows,
            width=self._width,
            dtype=self._dtype,
            zeros=self._zeros,
            fixed=self._fixed,
        )

    def grown(self, rows: int) -> KVCache:
        """Return a copy with at least `rows` rows."""
        other = self.resized(len(self.lengths), rows)
        length = int(np.max(self.lengths))
        for name, array in self.arrays.items():
            other.arrays[name][:, :, :length] = array[:, :, :length]
        other.lengths[:] = self.lengths
        return other


class FeatureCache(KVCache):
    """Cache of an exit that is an engine of its own, with the inputs of its layers.

    `states` are the states after the exit layer, float32 [slots, rows, d], or tokens int64 [slots,
    rows]. `features` float32 [slots, rows + 1, f] are those of the previous position, zeros for the
    first. The exit's layers may lag: rows after their `lengths` are computed when a prediction is
    needed.

    Args:
        state_size: d.
        feature_size: f, a multiple of d.
        embeds: The exit reads tokens, which are in host memory.
        skips: Number of first positions that the exit does not read: 1 for an EAGLE-3 head.
            They count as valid, but have no rows: position p is in row p - `skips`.
        **others: See KVCache.
    """

    def __init__(
        self,
        layers: Sequence[int | str],
        slots: int,
        kv_heads: int,
        rows: int,
        width: int,
        dtype: np.dtype | type,
        state_size: int,
        feature_size: int,
        embeds: bool = False,
        skips: int = 0,
        **others: Any,
    ) -> None:
        super().__init__(layers, slots, kv_heads, rows=rows, width=width, dtype=dtype, **others)
        self.own_exit = False  # all layers are the exit's
        self.embeds = embeds
        self.skips = skips
        if embeds:
            self.states = lazy_zeros((slots, rows), np.int64)
        else:
            self.states = self._zeros((slots, rows, state_size), np.float32)
        self.features = self._zeros((slots, rows + 1, feature_size), np.float32)
        self._ends = np.zeros(slots, np.int32)  # number of states in each slot

    def put(self, slot: int, first: int, states: np.ndarray | Sequence[int]) -> None:
        """Store states [n, d], or tokens, at positions from `first`."""
        end = first + len(states)
        if len(states) == 1:  # every step writes one row, which is faster than a slice
            self.states[slot, first] = states[0]
        else:
            self.states[slot, first:end] = states
        self._ends[slot] = end
        if self._counts[slot] < self.skips:
            self._counts[slot] = self.skips

    def copy_rows(self, source: int, target: int, first: int = 0) -> None:
        super().copy_rows(source, target, max(0, first - self.skips))
        self._ends[target] = end = self._ends[source]
        self.states[target, :end] = self.states[source, :end]
        self.features[target, : end + 1] = self.features[source, : end + 1]

    def read(self, slot: int, first: int, count: int, own: bool) -> np.ndarray:
        """Return `count` rows and their features, as bytes. All layers are the exit's own."""
        rows = super().read(slot, first, count, own)
        features = self.features[slot, first + 1 : first + 1 + count]
        return np.concatenate([rows.view(np.uint8).ravel(), features.view(np.uint8).ravel()])

    def write(self, slot: int, first: int, rows: np.ndarray, own: bool) -> None:
        """Write rows returned by `read` after the first `first` rows of a slot.

        States are not restored, because these rows are never recomputed.
        """
        width = self.features.shape[2]
        row_bytes = super().row_bytes(own)
        count = len(rows) // (row_bytes + 4 * width)
        shape = (len(self.arrays), self._kv_heads, count, self._width)
        keys = rows[: count * row_bytes].view(self._dtype).reshape(shape)
        super().write(slot, first, keys, own)
        features = rows[count * row_bytes :].view(np.float32).reshape(count, width)
        self.features[slot, first + 1 : first + 1 + count] = features

    def row_bytes(self, own: bool) -> int:
        return super().row_bytes(own) + 4 * int(self.features.shape[2])

    def _places(self, first: int, count: int) -> slice | np.ndarray:
        """Return the rows of positions. Skipped ones, which have none, share that of the next."""
        if not self.skips:
            return super()._places(first, count)
        return np.maximum(np.arange(first, first + count) - self.skips, 0)


class CrossCache:
    """Cross-attention keys and values of all slots, padded to one width.

    Calls need their rows in one array, [slots, heads, E, head_dim]. `cross_lengths` is int32
    [slots]. Values after a prompt are never read. `version` changes when arrays are replaced. Empty
    until sequences first share a call.

    Args:
        slots: Number of slots.
        zeros: Allocates an array of a shape and type.
    """

    def __init__(self, slots: int, zeros: Callable[..., Any] = lazy_zeros) -> None:
        self._zeros = zeros
        self.arrays: dict[str, np.ndarray] = {}
        self.version = 0
        self._lengths = np.ones(slots, np.int32)
        self._placed: dict[int, dict[str, np.ndarray]] = {}
        self._width = 0

    def place(self, slot: int, cross: dict[str, np.ndarray]) -> None:
        """Copy a sequence's `cross.{layer}.key|value` [1, heads, E, head_dim] into a slot."""
        if not cross or self._placed.get(slot) is cross:
            return
        self._placed[slot] = cross
        needed = cross_width(max(int(rows["cross_lengths"][0]) for rows in self._placed.values()))
        if needed > self._width or (self._width > MAX_DOUBLED and 2 * needed <= self._width):
            self._resize(needed, cross)
        else:
            self._write(slot, cross)

    def forget(self, slot: int) -> None:
        """Release a slot. Its values may be overwritten, and are not copied to wider arrays."""
        self._placed.pop(slot, None)

    def rows(self, first: int, count: int) -> dict[str, np.ndarray]:
        """Return the arrays of `count` slots from `first`."""
        return {name: array[first : first + count] for name, array in self.arrays.items()}

    def _resize(self, width: int, like: dict[str, np.ndarray]) -> None:
        slots = len(self._lengths)
        self._width = width
        self.version += 1
        self.arrays = {
            name: self._zeros((slots, array.shape[1], width, array.shape[3]), array.dtype)
            for name, array in like.items()
            if name != "cross_lengths"
        }
        self.arrays["cross_lengths"] = self._lengths
        self._lengths[:] = 1  # engines also check the lengths of idle rows
        for slot, cross in self._placed.items():
            self._write(slot, cross)

    def _write(self, slot: int, cross: dict[str, np.ndarray]) -> None:
        self._lengths[slot] = length = int(cross["cross_lengths"][0])
        for name, array in self.arrays.items():
            if name != "cross_lengths":
                array[slot, :, :length] = cross[name][0, :, :length]


def cross_width(count: int) -> int:
    """Return the width of cross-attention arrays for prompts of `count` tokens."""
    doubled = max(MIN_DOUBLED, 1 << (count - 1).bit_length())
    return doubled if doubled <= MAX_DOUBLED else -(-count // CROSS_STEP) * CROSS_STEP


def check_memory(manifest: Manifest, capacity: int, slots: int, prefixes: int = 0) -> None:
    """Check that all caches fit into available memory when they are full.

    Counts self-attention, cross-attention for the longest prompts, and `prefixes` bytes for stored
    prefixes.

    Raises:
        CapacityError: If they do not.
    """
    # glibc's heaps, one per thread, keep memory of closed sessions: 30 MB after SmolLM2 (477 MB)
    # was opened 16 times.
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
    rows = capacity + manifest.max_pending
    each = manifest.kv_bytes_per_token + manifest.feature_bytes_per_token
    longest = manifest.encoder_capacity
    need = slots * rows * each
    what = f"{slots} slots x {rows} positions x {each} bytes"
    # Cross-attention: every sequence's arrays, and a copy if several share calls (CrossCache).
    read = slots * (longest and cross_width(longest)) * (2 if slots > 1 else 1)
    if read:
        need += read * each
        what += f", and {read} positions of prompts"
    if prefixes:
        need += prefixes
        what += f", and {prefixes // 1_000_000} MB of prefixes"
    logger.info("KV cache: %.1f MB (%s)", need / 1e6, what)
    available = available_memory()
    if need > available:
        remedy = "capacity or slots"
        if read:
            remedy = "slots, or convert with a lower --encoder-capacity"
        if prefixes:
            remedy = f"prefix_cache_mb, {remedy}"
        raise CapacityError(
            f"the KV cache needs {need / 1e9:.1f} GB ({what}), "
            f"{available / 1e9:.1f} GB is available; lower {remedy}"
        )


def check_beams(manifest: Manifest, beams: int, positions: int) -> None:
    """Check that the caches of a beam search fit into available memory.

    Raises:
        CapacityError: If they do not.
    """
    need = beams * positions * manifest.kv_bytes_per_token
    available = available_memory()
    if need > available:
        raise CapacityError(
            f"{beams} beams of {positions} positions need {need / 1e9:.1f} GB, "
            f"{available / 1e9:.1f} GB is available; lower num_beams or max_new_tokens"
        )
