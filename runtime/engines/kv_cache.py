"""The KV cache of one engine: one array per layer and part, a row per slot, written in place by the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from runtime.errors import CapacityError
from runtime.machine.machine import lazy_zeros

PARTS = ("key", "value")


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

    def slot(self, slot: int) -> Iterator[tuple[str, np.ndarray]]:
        """Name and view [1, kv_heads, rows, head_dim] of every array of a slot."""
        for name, array in self.arrays.items():
            yield name, array[slot : slot + 1]

    def extend(self, slot: int, count: int) -> None:
        """Count the rows that an engine has just written. CapacityError where they are more than there is room for."""
        length = self._counts[slot] + count
        if length > self.rows:
            raise CapacityError(f"a sequence of {length} positions does not fit a KV cache of {self.rows} rows")
        self._counts[slot] = length

    def trim(self, slot: int, length: int) -> None:
        """Forget all but the first `length` rows: the only way back."""
        self.lengths[slot] = min(int(self.lengths[slot]), length)

    def copy_rows(self, source: int, target: int) -> None:
        """Make slot `target` a copy of slot `source`."""
        length = int(self.lengths[source])
        for array in self.arrays.values():
            array[target, :, :length] = array[source, :, :length]
        self.lengths[target] = length

    def read(self, slot: int, first: int, count: int, exits: bool) -> np.ndarray:
        """A copy of `count` rows, [arrays, kv_heads, count, head_dim]; the exit's own layers where it `exits`."""
        return np.stack([array[slot, :, first : first + count] for array in self._arrays_of(exits)])

    def write(self, slot: int, first: int, rows: np.ndarray) -> None:
        """Make what `read` gave the last rows of a slot, of which the first `first` are valid."""
        count = rows.shape[2]
        for array, new in zip(self.arrays.values(), rows, strict=False):  # the exit's own layers are the last
            array[slot, :, first : first + count] = new
        self.lengths[slot] = first + count

    def row_bytes(self, exits: bool) -> int:
        """Bytes of a position in all arrays that `read` gives."""
        return sum(array[0, :, 0].nbytes for array in self._arrays_of(exits))

    def _arrays_of(self, exits: bool) -> list[np.ndarray]:
        return [array for name, array in self.arrays.items() if exits or not name.startswith("exit.")]

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
    """The cache of an exit that is an engine of its own, with what this reads at each position, float32: the `states`
    [slots, rows, d] after the exit layer, and the `features` [slots, rows + 1, d], of the position before; zeros at the
    first. The exit's own layers may be behind: rows after their `lengths` are read when a prediction is wanted."""

    def __init__(self, *sizes: Any, width: int) -> None:
        super().__init__(*sizes)
        self.own_exit = False  # all of its layers are
        slots = len(self.lengths)
        self.states = self._zeros((slots, self.rows, width), np.float32)
        self.features = self._zeros((slots, self.rows + 1, width), np.float32)
        self._ends = np.zeros(slots, np.int32)  # how many states each slot has

    def put(self, slot: int, first: int, states: np.ndarray) -> None:
        """Keep the states [n, d] of the positions from `first` on."""
        end = first + len(states)
        self.states[slot, first:end] = states
        self._ends[slot] = end

    def copy_rows(self, source: int, target: int) -> None:
        super().copy_rows(source, target)
        self._ends[target] = end = self._ends[source]
        self.states[target, :end] = self.states[source, :end]
        self.features[target, : end + 1] = self.features[source, : end + 1]

    def read(self, slot: int, first: int, count: int, exits: bool) -> np.ndarray:
        """A copy of `count` rows, and of the features that they left: bytes of both."""
        own, features = super().read(slot, first, count, exits), self.features[slot, first + 1 : first + 1 + count]
        return np.concatenate([own.view(np.uint8).ravel(), features.view(np.uint8).ravel()])

    def write(self, slot: int, first: int, rows: np.ndarray) -> None:
        """Make what `read` gave the last rows of a slot, of which the first `first` are valid. States are not needed:
        these rows are never read again."""
        shape = self.features.shape[2]
        each = super().row_bytes(True)
        count = len(rows) // (each + 4 * shape)
        (_, heads, _, size), dtype = next(iter(self.arrays.values())).shape, next(iter(self.arrays.values())).dtype
        own = rows[: count * each].view(dtype).reshape(len(self.arrays), heads, count, size)
        super().write(slot, first, own)
        self.features[slot, first + 1 : first + 1 + count] = rows[count * each :].view(np.float32).reshape(count, shape)

    def row_bytes(self, exits: bool) -> int:
        return super().row_bytes(exits) + 4 * int(self.features.shape[2])
