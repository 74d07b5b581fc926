"""T5's relative position bias as a table over distances (Raffel et al., JMLR 2020, section 2.1)."""

from __future__ import annotations

import numpy as np

from graphs.description import RelativeBias


def buckets(distance: np.ndarray, bias: RelativeBias) -> np.ndarray:
    """Bucket of each signed distance key - query. Half the buckets are exact, the others grow logarithmically."""
    count, offset = bias.buckets, np.zeros_like(distance)
    if bias.bidirectional:
        count //= 2
        offset = np.where(distance > 0, count, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = count // 2
    # In float32, operation by operation, as the models were trained: the edges of buckets depend on it.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    grown = ratio / np.float32(np.log(bias.max_distance / exact)) * np.float32(count - exact)
    far = np.minimum(exact + grown.astype(np.int64), count - 1)
    return offset + np.where(distance < exact, distance, far)


def by_distance(table: np.ndarray, bias: RelativeBias) -> np.ndarray:
    """The bias of every distance that has its own: [max_distance + 1, heads] by query - key, or
    [2 max_distance + 1, heads] by key - query + max_distance where bidirectional. `table` [buckets, heads]."""
    reach = bias.max_distance
    distance = np.arange(-reach, reach + 1) if bias.bidirectional else -np.arange(reach + 1)
    return np.ascontiguousarray(table[buckets(distance, bias)])
