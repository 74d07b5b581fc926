"""Run a bundle's engines on padded batches of several sequences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from freeexport.verification.batches import Batch
from graphs.layers import SUPPRESSED
from runtime.bundle.bundle import Bundle
from runtime.engines.backend import cache_sizes
from runtime.engines.kv_cache import KVCache
from runtime.engines.onnx import OnnxEngine, value
from runtime.engines.runner import Encoder
from runtime.machine.machine import usable_cores


def encode_prompts(
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
        engines = {"shallow": manifest.shallow_caches, "deep": manifest.deep_layers}
        if manifest.exit_engine:
            engines["exit"] = manifest.exit_names
        # Features of the newest positions.
        self._before = np.zeros((rows, 1, manifest.feature_size), np.float32)
        for name, layers in engines.items():
            self._engines[name] = OnnxEngine(bundle.engine(name), threads, kernels=manifest.kernels)
            self.caches[name] = KVCache(**cache_sizes(manifest, layers, rows, manifest.capacity))

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
            skips = self.manifest.exit_skips
            if skips and not self.caches["exit"].lengths.any():
                shallow |= self._after_the_first(inputs, lengths, tokens.shape[1])
            else:
                shallow |= self._run("exit", inputs, {}, lengths=lengths, width=tokens.shape[1])
        return shallow, deep

    def _after_the_first(
        self, inputs: dict[str, np.ndarray], lengths: np.ndarray, width: int
    ) -> dict[str, np.ndarray]:
        """Run an EAGLE-3 head from the second position on.

        At the first position, the logits of its tokens and the confidence are 0.
        """
        if width == 1:
            found = self._run(
                "exit", inputs, {}, lengths=lengths, width=1
            )  # the next call overwrites its row
        else:
            later = {name: array[:, 1:] for name, array in inputs.items()}
            self.caches["exit"].lengths[:] = 1
            found = self._run("exit", later, {}, lengths=lengths - 1, width=width - 1)
        for name, array in found.items():
            shaped = array.reshape(self.rows, max(1, width - 1), -1)
            first = np.where(shaped[:, :1] < SUPPRESSED / 2, shaped[:, :1], 0)
            both = np.concatenate([first, shaped], axis=1)[:, :width]
            found[name] = both.reshape(self.rows * width, *array.shape[1:])
        return found

    def shallow(self, tokens: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
        """Run the shallow engine on `tokens` int64 [B, q], right-padded to `lengths` [B].

        Returns `hidden` [B, q, d]. If the engine has the head, also `logits`, `token` and
        `confidence` of all rows [B * q].
        """
        hidden = np.zeros((*tokens.shape, self.manifest.hidden_size), np.float32)
        return self._run(
            "shallow",
            {"input_ids": tokens},
            {"hidden": hidden},
            lengths=lengths,
            width=tokens.shape[1],
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
        return self._run("deep", inputs, outputs, lengths=lengths, width=hidden.shape[1])

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
