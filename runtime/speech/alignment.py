"""The cross-attention of a Whisper decoder over a whole transcript, for the times of its words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from runtime.bundle.manifest import Manifest
from runtime.engines.contract import contract
from runtime.engines.kv_cache import KVCache
from runtime.engines.matmul import product
from runtime.engines.onnx import OnnxEngine
from runtime.text.sampler import softmax


class Aligner:
    """Runs a decoder over transcripts, with caches of its own. Safe to call from many threads.

    Args:
        manifest: Manifest of the bundle.
        shallow: The shallow engine.
        deep: The deep engine.
    """

    def __init__(self, manifest: Manifest, shallow: OnnxEngine, deep: OnnxEngine) -> None:
        self._manifest = manifest
        self._engines = {"shallow": shallow, "deep": deep}

    def weights(self, tokens: Sequence[int], cross: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the weights of the alignment heads, float32 [heads, n, E].

        Args:
            tokens: Tokens that the decoder reads, at most as many as a slot has positions.
            cross: Keys and values of a window, `cross.{layer}.key|value` [1, heads, E, cache
                width].
        """
        manifest = self._manifest
        speech = manifest.speech
        assert speech is not None
        count = len(tokens)
        size = manifest.head_dim
        given = {
            **cross,
            "input_ids": np.array([tokens], np.int64),
            "hidden": np.zeros((1, count, manifest.hidden_size), np.float32),
            "past_lengths": np.zeros(1, np.int32),
            "query_lengths": np.array([count], np.int32),
            "exit_lengths": np.zeros(1, np.int32),
            "head_rows": np.zeros(0, np.int64),
            "emitted": np.zeros(0, np.int64),
        }
        dtype = np.float16 if manifest.float_type == "fp16" else np.float32
        queries = {
            f"query.{layer}": np.zeros((count, manifest.heads * size), dtype)
            for layer in manifest.query_layers
        }
        for name, engine in self._engines.items():
            inputs, outputs = contract(manifest, name)
            layers = manifest.shallow_caches if name == "shallow" else manifest.deep_layers
            kind = cross["cross.0.key"].dtype
            cache = KVCache(
                layers,
                slots=1,
                kv_heads=manifest.kv_heads,
                rows=count,
                width=manifest.cache_width,
                dtype=kind,
            ).arrays
            read = {part: array for part, array in given.items() if part in inputs}
            read |= {f"past.{part}": array for part, array in cache.items()}
            written = {part: array for part, array in queries.items() if part in outputs}
            written |= {f"present.{part}": array for part, array in cache.items()}
            if name == "shallow":
                written["hidden"] = given["hidden"]
            engine.bind(read, written).run()
        weights = np.empty(
            (len(speech.alignment_heads), count, manifest.encoder_capacity), np.float32
        )
        for place, (layer, head) in enumerate(speech.alignment_heads):
            query = queries[f"query.{layer}"][:, head * size : (head + 1) * size]
            key = in_floats(cross[f"cross.{layer}.key"][0, head], size)
            scores = product(query.astype(np.float32, order="C"), key.T)
            weights[place] = softmax(scores * np.float32(size**-0.5))
        return weights


def in_floats(keys: np.ndarray, size: int) -> np.ndarray:
    """Return keys of a cache [E, cache width] as float32 [E, size]."""
    if keys.dtype != np.int8:
        return keys.astype(np.float32)
    scales = np.ascontiguousarray(keys[:, size:]).view(np.float32)
    return keys[:, :size] * scales
