"""CALM (Schuster et al. 2022, arXiv 2207.07061), to compare with: a token may exit after any layer, and its state is
copied to the layers that it skips, whose keys and values are computed from that."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from runtime.bundle.bundle import Bundle
from runtime.engines.backend import cache_sizes
from runtime.engines.encoder import Encoder
from runtime.engines.kv_cache import KVCache
from runtime.engines.onnx import Call, OnnxEngine

# The paper's decaying threshold: how much of the given one decays, and the temperature of it.
DECAYING, TEMPERATURE = 0.1, 4.0


@dataclass(frozen=True)
class CalmResult:
    """`layers`: that each token took; a decoder-only model's first takes all, as in the other modes. Seconds of all, of
    decoding without prompt and encoder, and to the first token."""

    token_ids: tuple[int, ...]
    layers: tuple[int, ...]
    seconds: float
    decode_seconds: float
    first_seconds: float


class Calm:
    """One sequence at a time. `directory`: what `write_calm` wrote for the bundle, whose exits begin after layer
    `least`. Engines are loaded with `threads`. `single`: that is the only exit, and the further layers are one call."""

    def __init__(self, bundle: Bundle, directory: Path, least: int, threads: int, single: bool = False) -> None:
        manifest = bundle.manifest
        self._single = single
        self._manifest, self._least = manifest, least
        self._layers = range(least, manifest.layers)

        def engine(path: Path) -> OnnxEngine:
            return OnnxEngine(path, threads, kernels=manifest.kernels)

        self._first = engine(directory / "shallow.onnx")
        self._rest = engine(directory / "deep.onnx")
        self._steps = {layer: engine(directory / f"layer.{layer}.onnx") for layer in self._layers}
        self._fills = {layer: engine(directory / f"fill.{layer}.onnx") for layer in self._layers}
        self._encoder = (
            Encoder(engine(bundle.path / "encoder.onnx"), engine(bundle.path / "prologue.onnx"))
            if manifest.encoder_decoder
            else None
        )
        self._cache = KVCache(*cache_sizes(manifest, range(manifest.layers), 1, manifest.capacity))
        self._token, self._confidence = np.zeros(1, np.int64), np.zeros(1, np.float32)
        self._input = np.zeros((1, 1), np.int64)
        self._bound: dict[str, Call] | None = None

    def generate(self, prompt: np.ndarray, max_new_tokens: int, threshold: float, decays: bool = False) -> CalmResult:
        """Greedy. A token exits after the first layer whose confidence is above the threshold: the given one, or with
        `decays` one that falls as the sequence grows, clip(0.9 t + 0.1 exp(-4 n / N)) at token n of N."""
        began = perf_counter()
        manifest = self._manifest
        cross = {} if self._encoder is None else self._encoder.run(prompt)
        start = np.array([manifest.decoder_start_token_id or 0], np.int64) if manifest.encoder_decoder else prompt
        self._cache.trim(0, 0)
        ids, layers, times = list[int](), list[int](), list[float]()
        if self._encoder is None:
            ids, layers, times = [self._prefill(start)], [manifest.layers], [perf_counter()]
        self._attend(cross)
        decoding = perf_counter()
        limit = min(max_new_tokens, manifest.capacity - len(start) + 1)
        while len(ids) < limit and not (ids and ids[-1] in manifest.eos_token_ids):
            bar = threshold_at(threshold, len(ids), limit) if decays else threshold
            token, taken = self._step(ids[-1] if ids else int(start[0]), bar)
            ids.append(token)
            layers.append(taken)
            times.append(perf_counter())
        return CalmResult(tuple(ids), tuple(layers), times[-1] - began, times[-1] - decoding, times[0] - began)

    def _prefill(self, tokens: np.ndarray) -> int:
        """Run all layers over the prompt in two calls, as in the other modes; the head for its last row."""
        rows, none = len(tokens), np.zeros(0, np.int64)
        state = np.zeros((1, rows, self._manifest.hidden_size), np.float32)
        shared = {**self._lengths(rows), "head_rows": none}
        first = self._first.bind(
            {"input_ids": tokens[None], **shared, **self._arrays("past", range(self._least))},
            {"hidden": state, "token": self._token[:0], "confidence": self._confidence[:0],
             **self._arrays("present", range(self._least))},
        )  # fmt: skip
        last = {**shared, "head_rows": np.array([rows - 1], np.int64), "emitted": np.zeros(1, np.int64)}
        rest = self._rest.bind(
            {"hidden": state, **last, **self._arrays("past", self._layers)},
            {"token": self._token, **self._arrays("present", self._layers)},
        )
        for call in (first, rest):
            call.run()
        self._cache.extend(0, rows)
        return int(self._token[0])

    def _step(self, token: int, bar: float) -> tuple[int, int]:
        """The next token, and the layers that it took."""
        assert self._bound is not None
        self._input[0, 0] = token
        self._bound["first"].run()
        taken = self._least
        if self._single and not float(self._confidence[0]) > bar:
            self._bound["rest"].run()
            taken = self._manifest.layers
        while taken < self._manifest.layers and not float(self._confidence[0]) > bar:
            self._bound[f"layer.{taken}"].run()
            taken += 1
        if taken < self._manifest.layers:
            self._bound[f"fill.{taken}"].run()
        self._cache.extend(0, 1)
        return int(self._token[0]), taken

    def _attend(self, cross: Mapping[str, Any]) -> None:
        """Calls of one row stay bound; only what they read of the prompt changes."""
        if self._bound is None:
            self._bound = self._one_row(cross)
        elif cross:
            for name, call in self._bound.items():
                if not name.startswith("fill"):
                    parts = {"first": range(self._least), "rest": self._layers}
                    layers = parts.get(name) or [int(name.partition(".")[2])]
                    call.rebind(_cross(cross, layers), {})

    def _one_row(self, cross: Mapping[str, Any]) -> dict[str, Call]:
        shape, most = (1, 1, self._manifest.hidden_size), self._manifest.layers
        states = {layer: np.zeros(shape, np.float32) for layer in range(self._least, most + 1)}
        inputs, state = {"input_ids": self._input}, states[self._least]
        made = {"first": self._bind(self._first, range(self._least), inputs, state, cross)}
        one = {**self._lengths(1), "head_rows": np.zeros(1, np.int64), "emitted": np.zeros(1, np.int64)}
        made["rest"] = self._rest.bind(
            {"hidden": state, **one, **self._arrays("past", self._layers), **_cross(cross, self._layers)},
            {"token": self._token, **self._arrays("present", self._layers)},
        )
        for layer in self._layers:
            before, after, skipped = states[layer], states[layer + 1], range(layer, most)
            only = range(layer, layer + 1)
            made[f"layer.{layer}"] = self._bind(self._steps[layer], only, {"state": before}, after, cross)
            made[f"fill.{layer}"] = self._fills[layer].bind(
                {"state": before, **self._lengths(1), **self._arrays("past", skipped)}, self._arrays("present", skipped)
            )
        return made

    def _bind(
        self, engine: OnnxEngine, layers: range, inputs: Mapping[str, Any], state: np.ndarray, cross: Mapping[str, Any]
    ) -> Call:
        """Of one row, for which the head runs."""
        rows = {**self._lengths(1), "head_rows": np.zeros(1, np.int64)}
        outputs = {"hidden": state, "token": self._token, "confidence": self._confidence}
        return engine.bind(
            {**inputs, **rows, **self._arrays("past", layers), **_cross(cross, layers)},
            {**outputs, **self._arrays("present", layers)},
        )

    def _lengths(self, rows: int) -> dict[str, np.ndarray]:
        return {"past_lengths": self._cache.lengths, "query_lengths": np.array([rows], np.int32)}

    def _arrays(self, prefix: str, layers: range) -> dict[str, np.ndarray]:
        return {
            f"{prefix}.{layer}.{part}": self._cache.arrays[f"{layer}.{part}"]
            for layer in layers
            for part in ("key", "value")
        }


def _cross(cross: Mapping[str, Any], layers: Any) -> dict[str, Any]:
    if not cross:
        return {}
    return {
        "cross_lengths": cross["cross_lengths"],
        **{f"cross.{layer}.{part}": cross[f"cross.{layer}.{part}"] for layer in layers for part in ("key", "value")},
    }


def threshold_at(threshold: float, token: int, limit: int) -> float:
    """The decaying threshold at one of `limit` tokens (section 3.2 of the paper)."""
    decayed = (1 - DECAYING) * threshold + DECAYING * math.exp(-TEMPERATURE * token / limit)
    return min(1.0, max(0.0, decayed))
