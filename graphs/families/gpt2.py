"""GPT-2: layer norms, learned positions, and linear layers stored as [inputs, outputs] (Conv1D).

Query, key and value share one weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphs.description import (
    MLP,
    Activation,
    Attention,
    DecoderStack,
    Description,
    Embedding,
    Head,
    Layer,
    Linear,
    Norm,
    Positions,
)
from graphs.errors import UnsupportedModelError
from graphs.shapes import activation_of, vocabulary_size
from graphs.weights import View, Weights

MODEL_TYPES = ("gpt2",)
REQUIRED = ("n_layer", "n_head", "n_embd", "n_positions", "layer_norm_epsilon")


def describe(config: Mapping[str, Any], weights: Weights) -> Description:
    if config.get("add_cross_attention") or not config.get("scale_attn_weights", True):
        field = "add_cross_attention" if config.get("add_cross_attention") else "scale_attn_weights"
        raise UnsupportedModelError(f"{field} {config[field]} is not supported for gpt2")
    activation = activation_of(config, "activation_function", "gelu_new")
    # Early checkpoints use the names of the model without a head.
    prefix = "transformer." if "transformer.wte.weight" in weights else ""
    width = int(config["n_embd"])
    table = f"{prefix}wte.weight"
    tied = config.get("tie_word_embeddings", True) or "lm_head.weight" not in weights
    positions = Positions(int(config["n_positions"]), f"{prefix}wpe.weight")
    layers = tuple(
        _layer(config, activation, f"{prefix}h.{number}", number)
        for number in range(config["n_layer"])
    )
    head = Head(_norm(config, f"{prefix}ln_f"), table if tied else "lm_head.weight")
    return Description(
        family="gpt2",
        vocab_size=vocabulary_size(weights, table, width),
        hidden_size=width,
        decoder=DecoderStack(
            Embedding(table, positions=positions), layers, head, max_positions=positions.count
        ),
    )


def _layer(config: Mapping[str, Any], activation: Activation, name: str, number: int) -> Layer:
    heads = int(config["n_head"])
    width = int(config["n_embd"])
    scale = (width // heads) ** -0.5
    if config.get("scale_attn_by_inverse_layer_idx"):
        scale /= number + 1
    attention = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        scale=scale,
        query=_linear(f"{name}.attn.c_attn", 0, width),
        key=_linear(f"{name}.attn.c_attn", width, 2 * width),
        value=_linear(f"{name}.attn.c_attn", 2 * width),
        output=_linear(f"{name}.attn.c_proj"),
    )
    return Layer(
        attention_norm=_norm(config, f"{name}.ln_1"),
        attention=attention,
        mlp_norm=_norm(config, f"{name}.ln_2"),
        mlp=MLP(activation, _linear(f"{name}.mlp.c_fc"), _linear(f"{name}.mlp.c_proj")),
    )


def _linear(name: str, start: int = 0, stop: int | None = None) -> Linear:
    weight = View(f"{name}.weight", transposed=True, start=start, stop=stop)
    return Linear(str(weight), str(View(f"{name}.bias", start=start, stop=stop)))


def _norm(config: Mapping[str, Any], name: str) -> Norm:
    return Norm(f"{name}.weight", float(config["layer_norm_epsilon"]), "layer", f"{name}.bias")
