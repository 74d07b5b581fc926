"""EAGLE-3 heads with random weights, and their reference: plain torch without caches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file

HIDDEN = 64
HEADS = 4
KV_HEADS = 2
WIDTH = HIDDEN // HEADS
INNER = 80
EPSILON = 1e-5


def eagle_config(vocabulary: int = 288, tokens: int = 120) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": EPSILON,
        "vocab_size": vocabulary,
        "draft_vocab_size": tokens,
        "rope_theta": 5000.0,
    }


def eagle_tensors(vocabulary: int = 288, tokens: int = 120) -> dict[str, np.ndarray]:
    """Return random tensors. The head predicts `tokens` of the vocabulary, or without d2t all of it."""
    draw = np.random.default_rng(5)
    shapes = {
        "fc": (HIDDEN, 3 * HIDDEN),
        "lm_head": (tokens, HIDDEN),
        "midlayer.self_attn.q_proj": (HEADS * WIDTH, 2 * HIDDEN),
        **{f"midlayer.self_attn.{part}_proj": (KV_HEADS * WIDTH, 2 * HIDDEN) for part in "kv"},
        "midlayer.self_attn.o_proj": (HIDDEN, HEADS * WIDTH),
        **{f"midlayer.mlp.{part}_proj": (INNER, HIDDEN) for part in ("gate", "up")},
        "midlayer.mlp.down_proj": (HIDDEN, INNER),
    }
    found = {f"{name}.weight": draw.standard_normal(shape) * shape[1] ** -0.5 for name, shape in shapes.items()}
    found["lm_head.weight"] *= 3
    for name in ("norm", *(f"midlayer.{part}norm" for part in ("input_layer", "hidden_", "post_attention_layer"))):
        found[f"{name}.weight"] = 1 + 0.2 * draw.standard_normal(HIDDEN)
    tensors = {name: value.astype(np.float32) for name, value in found.items()}
    if tokens < vocabulary:
        chosen = np.sort(draw.choice(vocabulary, tokens, replace=False))
        tensors |= {"d2t": chosen - np.arange(tokens), "t2d": np.isin(np.arange(vocabulary), chosen)}
    return tensors


def write_eagle(
    directory: Path, config: dict[str, Any] | None = None, tensors: dict[str, np.ndarray] | None = None
) -> Path:
    """Write a head. Default: `eagle_config` and `eagle_tensors`."""
    directory.mkdir()
    save_file(eagle_tensors() if tensors is None else tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(eagle_config() if config is None else config))
    return directory


class PlainEagle:
    """A head and its model. Everything is computed anew at each token, as the paper describes it.

    Args:
        model: The Hugging Face model.
        tensors: Tensors of the head.
        taps: Layers after which the head reads the model's states.
    """

    def __init__(self, model: Any, tensors: dict[str, np.ndarray], taps: Sequence[int] = (2, 4, 5)) -> None:
        self.model = model
        self.taps = taps
        self.weights = {name: torch.from_numpy(np.asarray(value)) for name, value in tensors.items()}
        rows = len(self.weights["lm_head.weight"])
        self.tokens = torch.arange(rows) + self.weights.get("d2t", torch.zeros(rows, dtype=torch.int64))

    @torch.no_grad()
    def features(self, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the feature of each position [n, d], and the logits of the model [n, V]."""
        out = self.model(torch.tensor([list(ids)]), output_hidden_states=True, use_cache=False)
        taps = torch.cat([out.hidden_states[layer][0] for layer in self.taps], dim=-1)
        return taps @ self.weights["fc.weight"].T, out.logits[0]

    @torch.no_grad()
    def head(self, ids: Sequence[int], features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states before the norm [n - 1, d] and logits [n - 1, draft tokens], of the second token on.

        Row i reads token i + 1 and `features[i]`.
        """
        residual = features[: len(ids) - 1]
        embedded = self.model.get_input_embeddings().weight[torch.tensor(list(ids[1:]))]
        read = torch.cat(
            [self._normed(embedded, "midlayer.input_layernorm"), self._normed(residual, "midlayer.hidden_norm")], -1
        )
        query, key, value = (
            (read @ self.weights[f"midlayer.self_attn.{part}_proj.weight"].T).unflatten(-1, (-1, WIDTH)).transpose(0, 1)
            for part in "qkv"
        )
        groups = HEADS // KV_HEADS
        key, value = (part.repeat_interleave(groups, dim=0) for part in (_rotated(key), value))
        scores = _rotated(query) @ key.transpose(1, 2) / WIDTH**0.5
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
        attended = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value
        output = attended.transpose(0, 1).flatten(1) @ self.weights["midlayer.self_attn.o_proj.weight"].T
        residual = residual + output
        read = self._normed(residual, "midlayer.post_attention_layernorm")
        gate, up = (read @ self.weights[f"midlayer.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        residual = residual + (F.silu(gate) * up) @ self.weights["midlayer.mlp.down_proj.weight"].T
        return residual, self._normed(residual, "norm") @ self.weights["lm_head.weight"].T

    def _normed(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * self.weights[f"{name}.weight"]


def _rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotate [heads, n, WIDTH] by its positions, from 0."""
    frequencies = 5000.0 ** -(torch.arange(0, WIDTH, 2) / WIDTH)
    angles = torch.outer(torch.arange(x.shape[1]), frequencies).repeat(1, 2)
    low, high = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-high, low], dim=-1) * angles.sin()
