"""CALM (Schuster et al. 2022, arXiv 2207.07061) as a baseline of evaluations.

A token may exit after any layer. Its state is copied to the skipped layers, which compute their
keys and values from it. `CalmDecoder.decode` returns the fields of a record of `evaluate`, so that
rows of CALM can stand beside those of other methods:

    decoder = CalmDecoder(bundle, checkpoint, directory)
    setting = Setting("calm", 0.8)
    record = Record(name, setting.name, line, 0, busy=0.0, **decoder.decode(setting, prompt, 128))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from freeexport.evaluate.settings import Setting
from runtime.bundle.bundle import Bundle
from runtime.engines.backend import cache_sizes
from runtime.engines.kv_cache import KVCache
from runtime.engines.onnx import Call, OnnxEngine
from runtime.engines.runner import Encoder
from runtime.errors import OptionError
from runtime.kernels import reading_prompt
from runtime.text.tokenizer import Tokenizer
from tools.paper.calm_engines import write_calm

# Exits after any layer, the same with a threshold that decays along the sequence, and an exit after
# the bundle's exit layer only, which differs from FREE only in its copied states.
CALM = ("calm", "calm-decay", "calm-single")
# Loss that trains the exits of all layers.
CALM_LOSS = "weighted-ce"
# Weight and temperature of the decaying part of the paper's threshold.
DECAYING = 0.1
TEMPERATURE = 4.0


@dataclass(frozen=True)
class CalmResult:
    """Output of CALM.

    Attributes:
        layers: Layers per token. The first token of a decoder-only model takes all, as in other
            modes.
        seconds: Seconds of the whole request.
        first_seconds: Seconds to the first token.
    """

    token_ids: tuple[int, ...]
    layers: tuple[int, ...]
    seconds: float
    first_seconds: float


class Calm:
    """Decodes one sequence at a time."""

    def __init__(self, bundle: Bundle, directory: Path, least: int, threads: int) -> None:
        manifest = bundle.manifest
        self._manifest = manifest
        self.least = least
        self._layers = range(least, manifest.layers)

        def engine(path: Path) -> OnnxEngine:
            return OnnxEngine(path, threads, kernels=manifest.kernels)

        names = [
            "shallow",
            "deep",
            *(f"{kind}.{layer}" for layer in self._layers for kind in ("layer", "fill")),
        ]
        self._engines = {name: engine(directory / f"{name}.onnx") for name in names}
        encoder = [
            engine(bundle.path / f"{name}.onnx")
            for name in ("encoder", "prologue")
            if manifest.encoder_decoder
        ]
        self._encoder = Encoder(*encoder) if encoder else None
        self._cache = KVCache(**cache_sizes(manifest, range(manifest.layers), 1, manifest.capacity))
        self._token = np.zeros(1, np.int64)
        self._confidence = np.zeros(1, np.float32)
        self._input = np.zeros((1, 1), np.int64)
        self._calls: dict[str, Call] = {}

    def generate(
        self,
        prompt: np.ndarray,
        max_new_tokens: int,
        threshold: float,
        decays: bool = False,
        single: bool = False,
    ) -> CalmResult:
        """Decode a prompt greedily. A token exits after the first layer above the threshold.

        Args:
            prompt: Token ids int64 [n].
            max_new_tokens: Most tokens to generate.
            threshold: Threshold t of the confidence.
            decays: Use the decaying threshold clip(0.9 t + 0.1 exp(-4 n / N)) at token n of N.
            single: Exit only after layer `least`. The further layers are one call.
        """
        began = perf_counter()
        manifest = self._manifest
        self._cache.trim(0, 0)
        ids: list[int] = []
        layers: list[int] = []
        if self._encoder is None:
            self._bind_calls({})
            ids = [self._prefill(prompt)]
            layers = [manifest.layers]
            read = len(prompt)
        else:
            self._bind_calls(self._encoder.run(prompt))
            read = 1
        first = perf_counter()
        limit = min(max_new_tokens, manifest.capacity - read + 1)
        while not ids or (len(ids) < limit and ids[-1] not in manifest.eos_token_ids):
            bar = decaying_threshold(threshold, len(ids), limit) if decays else threshold
            token, taken = self._step(
                ids[-1] if ids else manifest.decoder_start_token_id or 0, bar, single
            )
            ids.append(token)
            layers.append(taken)
            if len(ids) == 1:
                first = perf_counter()
        return CalmResult(tuple(ids), tuple(layers), perf_counter() - began, first - began)

    def _prefill(self, tokens: np.ndarray) -> int:
        """Run all layers over the prompt in two calls, and the head for the last row only."""
        rows = len(tokens)
        none = np.zeros(0, np.int64)
        state = np.zeros((1, rows, self._manifest.hidden_size), np.float32)
        lengths = self._lengths(rows)
        shallow = range(self.least)
        first = self._engines["shallow"].bind(
            {"input_ids": tokens[None], **lengths, "head_rows": none,
             **self._arrays("past", shallow)},
            {"hidden": state, "token": self._token[:0], "confidence": self._confidence[:0],
             **self._arrays("present", shallow)},
        )  # fmt: skip
        with reading_prompt(not self._manifest.encoder_decoder):
            first.run()
            self._deep(state, np.array([rows - 1], np.int64), lengths, {}).run()
        self._cache.extend(0, rows)
        return int(self._token[0])

    def _step(self, token: int, bar: float, single: bool) -> tuple[int, int]:
        """Return the next token and its number of layers."""
        self._input[0, 0] = token
        self._calls["shallow"].run()
        taken = self.least
        if single and not float(self._confidence[0]) > bar:
            self._calls["deep"].run()
            taken = self._manifest.layers
        while taken < self._manifest.layers and not float(self._confidence[0]) > bar:
            self._calls[f"layer.{taken}"].run()
            taken += 1
        if taken < self._manifest.layers:
            self._calls[f"fill.{taken}"].run()
        self._cache.extend(0, 1)
        return int(self._token[0]), taken

    def _bind_calls(self, cross: Mapping[str, Any]) -> None:
        """Bind the calls of one row. Later requests rebind only the cross-attention inputs."""
        most = self._manifest.layers
        calls = self._calls
        reads = {"shallow": range(self.least), "deep": self._layers}
        reads |= {f"layer.{layer}": range(layer, layer + 1) for layer in self._layers}
        if calls:
            for name, layers in reads.items() if cross else ():
                calls[name].rebind(_cross(cross, layers), {})
            return
        shape = (1, 1, self._manifest.hidden_size)
        head = np.zeros(1, np.int64)
        states = {layer: np.zeros(shape, np.float32) for layer in range(self.least, most + 1)}
        for name, layers in reads.items():
            if name == "deep":
                calls[name] = self._deep(states[self.least], head, self._lengths(1), cross)
                continue
            first = (
                {"input_ids": self._input} if name == "shallow" else {"state": states[layers.start]}
            )
            rows = {**self._lengths(1), "head_rows": head, **_cross(cross, layers)}
            outputs = {
                "hidden": states[layers.stop],
                "token": self._token,
                "confidence": self._confidence,
            }
            calls[name] = self._engines[name].bind(
                {**first, **rows, **self._arrays("past", layers)},
                {**outputs, **self._arrays("present", layers)},
            )
        for layer in self._layers:
            skipped = range(layer, most)
            calls[f"fill.{layer}"] = self._engines[f"fill.{layer}"].bind(
                {"state": states[layer], **self._lengths(1), **self._arrays("past", skipped)},
                self._arrays("present", skipped),
            )

    def _deep(
        self,
        state: np.ndarray,
        head_rows: np.ndarray,
        lengths: Mapping[str, Any],
        cross: Mapping[str, Any],
    ) -> Call:
        given = {
            "hidden": state,
            **lengths,
            "head_rows": head_rows,
            "emitted": np.zeros(1, np.int64),
        }
        return self._engines["deep"].bind(
            {**given, **self._arrays("past", self._layers), **_cross(cross, self._layers)},
            {"token": self._token, **self._arrays("present", self._layers)},
        )

    def _lengths(self, rows: int) -> dict[str, np.ndarray]:
        return {"past_lengths": self._cache.lengths, "query_lengths": np.array([rows], np.int32)}

    def _arrays(self, prefix: str, layers: range) -> dict[str, np.ndarray]:
        names = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
        return {f"{prefix}.{name}": self._cache.arrays[name] for name in names}


def _cross(cross: Mapping[str, Any], layers: range) -> dict[str, Any]:
    names = [f"cross.{layer}.{part}" for layer in layers for part in ("key", "value")]
    return {name: cross[name] for name in ("cross_lengths", *names)} if cross else {}


def decaying_threshold(threshold: float, token: int, limit: int) -> float:
    """Return the decaying threshold at token `token` of `limit` (section 3.2 of the paper)."""
    decayed = (1 - DECAYING) * threshold + DECAYING * math.exp(-TEMPERATURE * token / limit)
    return min(1.0, max(0.0, decayed))


class CalmDecoder:
    """Decodes the settings of CALM with the engines of one bundle.

    Args:
        directory: Directory of the engines, which are written unless it has them.
        least: First layer after which `calm` and `calm-decay` may exit. `calm-single` exits after
            the bundle's exit layer.

    Raises:
        OptionError: If the checkpoint, the layer or the bundle does not fit.
        CheckpointError: If the checkpoint cannot be read.
    """

    def __init__(
        self, bundle: Bundle, checkpoint: str, directory: Path, least: int = 1, threads: int = 1
    ) -> None:
        self._bundle = bundle
        self._checkpoint = checkpoint
        self._directory = directory
        self._least = least
        self._threads = threads
        self._tokenizer = Tokenizer.load(bundle.path, bundle.manifest.files)
        self._calm: dict[int, Calm] = {}
        self._loss = ""
        self._engines(least)

    def _engines(self, least: int) -> Calm:
        if least not in self._calm:
            directory = self._directory / f"calm-{least}"
            self._loss = write_calm(self._checkpoint, self._bundle.manifest, least, directory)
            self._calm[least] = Calm(self._bundle, directory, least, self._threads)
        return self._calm[least]

    @property
    def notes(self) -> list[str]:
        """Notes on the training of the checkpoint."""
        if self._loss == CALM_LOSS:
            return []
        return [
            f"calm ran on a checkpoint that was trained with {self._loss or 'an unknown loss'}, "
            f"not {CALM_LOSS}: exits that no loss trained show what such exits give, "
            "not what CALM can do"
        ]

    def decode(self, setting: Setting, prompt: np.ndarray, most: int) -> dict[str, Any]:
        """Decode a prompt greedily, and return the fields of its record."""
        if setting.method not in CALM or setting.threshold is None:
            raise OptionError(
                f"{setting.name!r} is no setting of CALM; choose {', '.join(CALM)} and a threshold"
            )
        manifest = self._bundle.manifest
        single = setting.method == "calm-single"
        calm = self._engines(manifest.exit_layer if single else self._least)
        result = calm.generate(
            prompt, most, setting.threshold, decays=setting.method == "calm-decay", single=single
        )
        ended = result.token_ids[-1] in manifest.eos_token_ids
        written = result.token_ids[:-1] if ended else result.token_ids
        return {
            "seconds": round(result.seconds, 7),
            "decode_seconds": round(result.seconds - result.first_seconds, 7),
            "first_seconds": round(result.first_seconds, 7),
            "tokens": len(result.token_ids),
            "text": "" if self._tokenizer is None else self._tokenizer.decode(list(written)),
            "token_ids": result.token_ids,
            "exited": tuple(layers < manifest.layers for layers in result.layers),
            "finish_reason": "eos" if ended else "length",
            "layers": sum(result.layers[0 if manifest.encoder_decoder else 1 :]),
        }
