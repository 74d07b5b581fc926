"""The KV cache of one engine in the memory of a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.engines.kv_cache import KVCache


class CudaKVCache(KVCache):
    """`lengths` stay with the host; a call takes them along."""

    _spare: Any = None

    def gather(self, sources: np.ndarray) -> None:
        """Through spare memory: a device does not copy in place."""
        if (sources == np.arange(len(sources))).all():
            return
        length = int(self.lengths.max())
        if self._spare is None:
            shape = next(iter(self.arrays.values())).shape
            self._spare = self._zeros(shape, self._dtype)
        spare = self._spare[:, :, :length]
        for array in self.arrays.values():
            kept = array[:, :, :length]
            spare.copy_from(kept)
            for slot, source in enumerate(sources):
                if slot != source:
                    kept[slot] = spare[int(source)]
        self.lengths[:] = self.lengths[sources]
