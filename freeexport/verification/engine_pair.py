"""The two decoder engines of a bundle on a padded batch, with every output: for checks and measurements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.bundle.bundle import Bundle
from runtime.engines.kv_cache import KVCache
from runtime.engines.onnx import OnnxEngine, value


class EnginePair:
    """Shallow and deep engine over `rows` sequences. Calls extend the caches by each row's query length."""

    def __init__(self, bundle: Bundle, rows: int, threads: int, cross: dict[str, np.ndarray] | None = None) -> None:
        self.manifest = bundle.manifest
        self.rows = rows
        self.cross = cross or {}
        kernels = self.manifest.kernels
        self._engines = {
            name: OnnxEngine(bundle.engine(name), threads, kernels=kernels) for name in ("shallow", "deep")
        }
        self.caches = {
            "shallow": self._cache(self.manifest.shallow_caches),
            "deep": self._cache(self.manifest.deep_layers),
        }

    def shallow(self, tokens: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
        """`tokens` int64 [B, q], right-padded to `lengths` [B]. `hidden` [B, q, d], and logits, token, confidence of
        all rows [B * q]."""
        hidden = np.zeros((*tokens.shape, self.manifest.hidden_size), np.float32)
        return self._run("shallow", {"input_ids": tokens}, {"hidden": hidden}, lengths, tokens.shape[1])

    def deep(self, hidden: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
        """`hidden` float32 [B, k, d]. Logits, token, confidence and nll of all rows [B * k]."""
        count = self.rows * hidden.shape[1]
        inputs = {"hidden": np.ascontiguousarray(hidden), "emitted": np.zeros(count, np.int64)}
        return self._run("deep", inputs, {"nll": np.zeros(count, np.float32)}, lengths, hidden.shape[1])

    def trim(self, length: int) -> None:
        for cache in self.caches.values():
            for row in range(self.rows):
                cache.trim(row, length)

    def _cache(self, layers: Sequence[int | str]) -> KVCache:
        manifest = self.manifest
        dtype = np.float16 if manifest.float_type == "fp16" else np.float32
        length = manifest.capacity + manifest.max_pending
        return KVCache(layers, self.rows, manifest.kv_heads, length, manifest.head_dim, dtype)

    def _run(
        self,
        name: str,
        inputs: dict[str, np.ndarray],
        outputs: dict[str, np.ndarray],
        lengths: np.ndarray,
        width: int,
    ) -> dict[str, np.ndarray]:
        count, cache = self.rows * width, self.caches[name]
        past = {part: value(array) for part, array in cache.arrays.items()}
        layers = {part.split(".")[0] for part in past}
        cross = {n: a for n, a in self.cross.items() if n == "cross_lengths" or n.split(".")[1] in layers}
        outputs = {
            **outputs,
            "token": np.zeros(count, np.int64),
            "confidence": np.zeros(count, np.float32),
            "logits": np.zeros((count, self.manifest.vocab_size), np.float32),
        }
        call = self._engines[name].bind(
            {
                **inputs,
                "past_lengths": cache.lengths,
                "query_lengths": lengths.astype(np.int32),
                **({"exit_lengths": lengths.astype(np.int32)} if cache.own_exit else {}),
                "head_rows": np.arange(count),
                **cross,
                **{f"past.{part}": item for part, item in past.items()},
            },
            {**outputs, **{f"present.{part}": item for part, item in past.items()}},
        )
        call.run()
        for row, length in enumerate(lengths):
            cache.extend(row, int(length))
        return outputs
