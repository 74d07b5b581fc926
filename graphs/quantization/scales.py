"""Scales of rounded weights in the type that an operator wants them in."""

from __future__ import annotations

import numpy as np


def at_least(exact: np.ndarray, type_: np.dtype) -> np.ndarray:
    """Float32 scales as the least numbers of a type that are not smaller, so that no value leaves its range; 1 for 0,
    the scale of weights that are all 0, which would be divided by."""
    found = np.where(exact > 0, exact, 1).astype(type_)
    above = np.nextafter(found, np.array(np.inf, type_))
    return np.where(found.astype(np.float32) < exact, above, found)
