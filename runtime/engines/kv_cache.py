"""The KV cache of one engine: one array per layer and part, a row per slot, written in place by the engine; what
cross-attention reads, of all sequences that share calls; and the memory that both may take."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from runtime.bundle.manifest import Manifest
from runtime.errors import CapacityError
from runtime.machine.machine import available_memory, lazy_zeros

logger = logging.getLogger(__name__)

PARTS = ("key", "value")
# Arrays for cross-attention have a power of two positions up to MOST_DOUBLED, then multiples of CROSS_STEP, so that a
# longer prompt seldom means another array: to bind a call again takes 0.2 ms.
LEAST_DOUBLED, MOST_DOUBLED, CROSS_STEP = 64, 512, 32


class KVCache:
    """`arrays["{layer}.{part}"]` is [slots, kv_heads, rows, head_dim]; `lengths` int32 [slots] counts valid rows.
    `zeros(shape, dtype)` makes an array; by default in the host's memory. `fixed`: the engine takes no other number of
    rows. `own_exit`: some of the layers are the exit's own, needed only where an exit may be taken. What lies behind
    the valid rows is unspecified and never read."""

    def __init__(
        self,
        layers: Sequence[int | str],
        slots: int,
        kv_heads: int,
        rows: int,
        head_dim: int,
        dtype: np.dtype | type,
        zeros: Callable[..., Any] = lazy_zeros,
        fixed: bool = False,
    ) -> None:
        self.rows, self._zeros, self._fixed = rows, zeros, fixed
        self._layers, self._kv_heads, self._head_dim, self._dtype = layers, kv_heads, head_dim, dtype
        self.own_exit = any(isinstance(layer, str) for layer in layers)
        self.lengths = np.zeros(slots, np.int32)
        self._counts: Any = self.lengths.data  # the same, for single numbers
        # Zeroed memory is not resident until an engine writes to it, and holds no NaN that a mask would let through.
        self.arrays = {
            f"{layer}.{part}": zeros((slots, kv_heads, rows, head_dim), dtype) for layer in layers for part in PARTS
        }

    def attended(self, cross: dict[str, Any]) -> dict[str, Any]:
        """Choose what these layers read of `cross.{layer}.key|value` and `cross_lengths`."""
        layers = {name.split(".")[0] for name in self.arrays}
        return {name: array for name, array in cross.items() if name == "cross_lengths" or name.split(".")[1] in layers}

    def slot(self, slot: int) -> Iterator[tuple[str, np.ndarray]]:
        """Name and view [1, kv_heads, rows, head_dim] of every array of a slot."""
        for name, array in self.arrays.items():
            yield name, array[slot : slot + 1]

    def length(self, slot: int) -> int:
        """Valid rows of a slot."""
        count: int = self._counts[slot]
        return count

    def extend(self, slot: int, count: int) -> None:
        """Count the rows that an engine has just written. CapacityError where they are more than there is room for."""
        length = self._counts[slot] + count
        if length > self.rows:
            raise CapacityError(f"a sequence of {length} positions does not fit a KV cache of {self.rows} rows")
        self._counts[slot] = length

    def trim(self, slot: int, length: int) -> None:
        """Forget all but the first `length` rows: the only way back."""
        self._counts[slot] = min(self._counts[slot], length)

    def copy_rows(self, source: int, target: int) -> None:
        """Make slot `target` a copy of slot `source`."""
        length = int(self.lengths[source])
        for array in self.arrays.values():
            array[target, :, :length] = array[source, :, :length]
        self.lengths[target] = length

    def read(self, slot: int, first: int, count: int, own: bool) -> np.ndarray:
        """A copy of `count` rows, [arrays, kv_heads, count, head_dim], of the model's layers or the exit's `own`."""
        parts = [array[slot, :, first : first + count] for array in self._arrays_of(own)]
        return np.stack(parts) if parts else np.zeros((0, self._kv_heads, count, self._head_dim), self._dtype)

    def write(self, slot: int, first: int, rows: np.ndarray, own: bool) -> None:
        """Make what `read` gave the last rows of a slot, of which the first `first` are valid."""
        count = rows.shape[2]
        for array, new in zip(self._arrays_of(own), rows, strict=True):
            array[slot, :, first : first + count] = new
        self.lengths[slot] = first + count

    def row_bytes(self, own: bool) -> int:
        """Bytes of a position in all arrays that `read` gives."""
        return sum(array[0, :, 0].nbytes for array in self._arrays_of(own))

    def _arrays_of(self, own: bool) -> list[np.ndarray]:
        return [array for name, array in self.arrays.items() if name.startswith("exit.") == own]

    def gather(self, sources: np.ndarray) -> None:
        """Make every slot i a copy of what slot `sources[i]` was."""
        changed = np.flatnonzero(sources != np.arange(len(sources)))
        if len(changed) == 0:
            return
        length = int(self.lengths.max())
        for array in self.arrays.values():
            array[changed, :, :length] = array[sources[changed], :, :length]
        self.lengths[:] = self.lengths[sources]

    def resized(self, slots: int, rows: int) -> KVCache:
        """An empty cache of the same layers, of at least so many rows."""
        rows = self.rows if self._fixed else rows
        sizes = self._layers, slots, self._kv_heads, rows, self._head_dim, self._dtype
        return type(self)(*sizes, self._zeros, self._fixed)

    def grown(self, rows: int) -> KVCache:
        """A cache of at least so many rows that holds what this one does."""
        other, length = self.resized(len(self.lengths), rows), int(self.lengths.max())
        for name, array in self.arrays.items():
            other.arrays[name][:, :, :length] = array[:, :, :length]
        other.lengths[:] = self.lengths
        return other


class FeatureCache(KVCache):
    """The cache of an exit that is an engine of its own, with what this reads at each position: the `states` after the
    exit layer, float32 [slots, rows, d], or tokens int64 [slots, rows] that it `embeds`, and the `features` float32
    [slots, rows + 1, d] of the position before; zeros at the first. The exit's own layers may be behind: rows after
    their `lengths` are read when a prediction is wanted."""

    def __init__(self, *sizes: Any, width: int, embeds: bool = False) -> None:
        super().__init__(*sizes)
        self.own_exit = False  # all of its layers are
        slots = len(self.lengths)
        kept = ((), np.int64) if embeds else ((width,), np.float32)
        self.states = self._zeros((slots, self.rows, *kept[0]), kept[1])
        self.features = self._zeros((slots, self.rows + 1, width), np.float32)
        self._ends = np.zeros(slots, np.int32)  # how many states each slot has

    def put(self, slot: int, first: int, states: np.ndarray | Sequence[int]) -> None:
        """Keep the states [n, d], or tokens, of the positions from `first` on."""
        end = first + len(states)
        if len(states) == 1:  # as at every step: a row is written sooner than a slice
            self.states[slot, first] = states[0]
        else:
            self.states[slot, first:end] = states
        self._ends[slot] = end

    def copy_rows(self, source: int, target: int) -> None:
        super().copy_rows(source, target)
        self._ends[target] = end = self._ends[source]
        self.states[target, :end] = self.states[source, :end]
        self.features[target, : end + 1] = self.features[source, : end + 1]

    def read(self, slot: int, first: int, count: int, own: bool) -> np.ndarray:
        """A copy of `count` rows, and of the features that they left: bytes of both. All are the exit's `own`."""
        rows, features = super().read(slot, first, count, own), self.features[slot, first + 1 : first + 1 + count]
        return np.concatenate([rows.view(np.uint8).ravel(), features.view(np.uint8).ravel()])

    def write(self, slot: int, first: int, rows: np.ndarray, own: bool) -> None:
        """Make what `read` gave the last rows of a slot, of which the first `first` are valid. States are not needed:
        these rows are never read again."""
        shape = self.features.shape[2]
        each = super().row_bytes(own)
        count = len(rows) // (each + 4 * shape)
        (_, heads, _, size), dtype = next(iter(self.arrays.values())).shape, next(iter(self.arrays.values())).dtype
        keys = rows[: count * each].view(dtype).reshape(len(self.arrays), heads, count, size)
        super().write(slot, first, keys, own)
        self.features[slot, first + 1 : first + 1 + count] = rows[count * each :].view(np.float32).reshape(count, shape)

    def row_bytes(self, own: bool) -> int:
        return super().row_bytes(own) + 4 * int(self.features.shape[2])


class CrossCache:
    """Keys and values of every slot, padded to one width, [slots, heads, E, head_dim], and `cross_lengths` int32
    [slots]: rows of a call must stand together. `version` changes where the arrays do. Holds nothing until sequences
    are first run together. `zeros(shape, dtype)` makes an array. What stands behind a prompt is not read."""

    def __init__(self, slots: int, zeros: Callable[..., Any] = lazy_zeros) -> None:
        self._zeros = zeros
        self.arrays: dict[str, np.ndarray] = {}
        self.version = 0
        self._lengths = np.ones(slots, np.int32)
        self._placed: dict[int, dict[str, np.ndarray]] = {}
        self._width = 0

    def place(self, slot: int, cross: dict[str, np.ndarray]) -> None:
        """Make a slot's row what a sequence alone reads: `cross.{layer}.key|value` [1, heads, E, head_dim]."""
        if not cross or self._placed.get(slot) is cross:
            return
        self._placed[slot] = cross
        needed = cross_width(max(int(rows["cross_lengths"][0]) for rows in self._placed.values()))
        if needed > self._width or (self._width > MOST_DOUBLED and 2 * needed <= self._width):
            self._resize(needed, cross)
        else:
            self._write(slot, cross)

    def forget(self, slot: int) -> None:
        """The slot's sequence has left: what it read may be overwritten, and is not kept for wider arrays."""
        self._placed.pop(slot, None)

    def rows(self, first: int, count: int) -> dict[str, np.ndarray]:
        """The arrays of `count` slots from `first` on."""
        return {name: array[first : first + count] for name, array in self.arrays.items()}

    def _resize(self, width: int, like: dict[str, np.ndarray]) -> None:
        slots = len(self._lengths)
        self._width, self.version = width, self.version + 1
        self.arrays = {
            name: self._zeros((slots, array.shape[1], width, array.shape[3]), array.dtype)
            for name, array in like.items()
            if name != "cross_lengths"
        }
        self.arrays["cross_lengths"] = self._lengths
        self._lengths[:] = 1  # engines check the lengths of idle rows, too
        for slot, cross in self._placed.items():
            self._write(slot, cross)

    def _write(self, slot: int, cross: dict[str, np.ndarray]) -> None:
        self._lengths[slot] = length = int(cross["cross_lengths"][0])
        for name, array in self.arrays.items():
            if name != "cross_lengths":
                array[slot, :, :length] = cross[name][0, :, :length]


def cross_width(count: int) -> int:
    """Positions of an array for prompts of so many."""
    doubled = max(LEAST_DOUBLED, 1 << (count - 1).bit_length())
    return doubled if doubled <= MOST_DOUBLED else -(-count // CROSS_STEP) * CROSS_STEP


def check_memory(manifest: Manifest, capacity: int, slots: int, prefixes: int = 0) -> None:
    """CapacityError where the caches, full, are more than the memory that is available: self-attention's, of an
    encoder-decoder what cross-attention reads, with prompts as long as the bundle allows, and `prefixes`, the bytes of
    prompts that are kept."""
    # What glibc's heaps, one a thread, keep of closed sessions: 30 MB of 477 once SmolLM2 was opened 16 times.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    rows, each, longest = capacity + manifest.max_pending, manifest.kv_bytes_per_token, manifest.encoder_capacity
    each += manifest.feature_bytes_per_token
    need, what = slots * rows * each, f"{slots} slots x {rows} positions x {each} bytes"
    # Prompts of an encoder: each sequence's own, and a copy where several share calls (CrossCache).
    read = slots * (longest and cross_width(longest)) * (2 if slots > 1 else 1)
    if read:
        need += read * each
        what += f", and {read} positions of prompts"
    if prefixes:
        need += prefixes
        what += f", and {prefixes // 1_000_000} MB of prefixes"
    logger.info("KV cache: %.1f MB (%s)", need / 1e6, what)
    available = available_memory()
    if available is not None and need > available:
        raise CapacityError(
            f"the KV cache needs {need / 1e9:.1f} GB ({what}), {available / 1e9:.1f} GB is available; "
            f"lower {'prefix_cache_mb, ' if prefixes else ''}"
            f"{'slots, or convert with a lower --encoder-capacity' if read else 'capacity or slots'}"
        )


def check_beams(manifest: Manifest, beams: int, positions: int) -> None:
    """CapacityError where the caches of a beam search, should it come to so many positions, are more than the memory
    that is available."""
    need, available = beams * positions * manifest.kv_bytes_per_token, available_memory()
    if available is not None and need > available:
        raise CapacityError(
            f"{beams} beams of {positions} positions need {need / 1e9:.1f} GB, {available / 1e9:.1f} GB is available; "
            "lower num_beams or max_new_tokens"
        )
