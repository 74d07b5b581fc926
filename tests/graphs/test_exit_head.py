"""The exit's own norm and adapter change the shallow prediction, as computed in numpy, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CASES, Case

from freeexport.checkpoints.checkpoint import Checkpoint, open_checkpoint
from freeexport.verification.engines import EnginePair
from graphs.engine_options import EngineOptions
from graphs.engines import EngineBuilder
from graphs.exit_head import ADAPTER_DOWN, ADAPTER_NORM, ADAPTER_UP, EXIT_NORM, with_exit
from graphs.families import describe
from graphs.weights import WeightFile
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import Dialect, Manifest

LLAMA = next(case for case in CASES if case.name.startswith("llama"))


class WithExit:
    """A checkpoint with exit parameters of rank 4 beside it."""

    def __init__(self, checkpoint: Checkpoint, width: int) -> None:
        generator = np.random.default_rng(3)
        self.checkpoint = checkpoint
        self.exit = {
            EXIT_NORM: generator.uniform(0.5, 1.5, width).astype(np.float32),
            ADAPTER_NORM: generator.uniform(0.5, 1.5, width).astype(np.float32),
            ADAPTER_DOWN: generator.standard_normal((4, width)).astype(np.float32),
            ADAPTER_UP: generator.standard_normal((width, 4)).astype(np.float32),
        }

    def __contains__(self, name: str) -> bool:
        return name in self.exit or name in self.checkpoint

    def shape(self, name: str) -> tuple[int, ...]:
        return self.exit[name].shape if name in self.exit else self.checkpoint.shape(name)

    def read(self, name: str) -> np.ndarray:
        return self.exit[name] if name in self.exit else self.checkpoint.read(name)


def rms(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight


@pytest.mark.parametrize("dialect", ["ort", "standard"])
def test_the_shallow_head_has_the_exits_norm_and_adapter(
    tmp_path: Path, checkpoint: Callable[[Case], Path], dialect: Dialect
) -> None:
    plain = open_checkpoint(str(checkpoint(LLAMA)))
    width = int(plain.config["hidden_size"])
    source = WithExit(plain, width)
    own = describe(plain.config, plain)
    assert with_exit(own, plain) is own
    description = with_exit(own, source)
    with WeightFile(tmp_path / "weights.data") as weights:
        builder = EngineBuilder(description, EngineOptions(1, 32, 4, dialect=dialect), source, weights, tmp_path)
        builder.shallow()
        builder.deep()
    attention, head = description.attention, description.decoder.head
    manifest = Manifest(
        schema_version=1, family="llama", dialect=dialect, precision="fp32", layers=LLAMA.layers, exit_layer=1,
        hidden_size=width, vocab_size=description.vocab_size, heads=attention.heads, kv_heads=attention.kv_heads,
        head_dim=attention.head_dim, capacity=32, max_pending=4, encoder_capacity=0, confidence="softmax",
        threshold=1.0, eos_token_ids=(), bos_token_id=None, pad_token_id=None, decoder_start_token_id=None,
        verified=False, source="", source_sha256="", weight_bytes=0, files={},
    )  # fmt: skip
    pair = EnginePair(Bundle(tmp_path, manifest, ""), 1, 1)
    out = pair.shallow(np.array([[5, 9, 7]]), np.array([3]))
    hidden = out["hidden"][0]
    inner = rms(hidden, source.exit[ADAPTER_NORM], head.norm.epsilon) @ source.exit[ADAPTER_DOWN].T
    adapted = hidden + (inner / (1 + np.exp(-inner))) @ source.exit[ADAPTER_UP].T
    expected = rms(adapted, source.exit[EXIT_NORM], head.norm.epsilon) @ plain.read(head.weight).T
    np.testing.assert_allclose(out["logits"], expected, rtol=1e-4, atol=1e-4)
