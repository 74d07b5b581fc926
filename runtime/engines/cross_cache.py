"""Keys and values that cross-attention reads, of all sequences that share engine calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from runtime.machine.machine import lazy_zeros

# Widths are multiples of this, so that a longer prompt seldom means another array.
STEP = 32


class CrossCache:
    """Keys and values of every slot, padded to one width, [slots, heads, E, head_dim]: rows of a call must stand
    together. `version` changes where the arrays do. Holds nothing until sequences are first run together.
    `zeros(shape, dtype)` makes an array."""

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
        needed = -(-max(int(rows["cross_lengths"][0]) for rows in self._placed.values()) // STEP) * STEP
        if needed > self._width or 2 * needed <= self._width:
            self._resize(needed, cross)
        else:
            self._write(slot, cross)

    def forget(self, slot: int) -> None:
        """The slot's sequence has left."""
        self._placed.pop(slot, None)
        self._lengths[slot] = 1  # engines check the lengths of idle rows, too, against arrays that may become narrower

    def rows(self, layers: set[str], first: int, count: int) -> dict[str, np.ndarray]:
        """Arrays that an engine of these layers reads for `count` slots from `first` on."""
        if not self.arrays:
            return {}
        views = {name: array for name, array in self.arrays.items() if name.split(".")[1] in layers}
        views["cross_lengths"] = self._lengths
        return {name: view[first : first + count] for name, view in views.items()}

    def _resize(self, width: int, like: dict[str, np.ndarray]) -> None:
        slots = len(self._lengths)
        self._width, self.version = width, self.version + 1
        self.arrays = {
            name: self._zeros((slots, array.shape[1], width, array.shape[3]), array.dtype)
            for name, array in like.items()
            if name != "cross_lengths"
        }
        for slot, cross in self._placed.items():
            self._write(slot, cross)

    def _write(self, slot: int, cross: dict[str, np.ndarray]) -> None:
        self._lengths[slot] = length = int(cross["cross_lengths"][0])
        for name, array in self.arrays.items():
            array[slot, :, :length] = cross[name][0, :, :length]
