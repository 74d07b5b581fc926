"""Llama and its kin: Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphs.description import MLP, Activation, Attention, Decoder, Description, Head, Layer, Linear, Norm
from graphs.errors import UnsupportedModelError
from graphs.families.rotary import rotary
from graphs.limits import vocabulary_size
from graphs.weights import Weights

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
REQUIRED = ("num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings", "rms_norm_eps")
EMBEDDING = "model.embed_tokens.weight"
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
}


def describe(config: Mapping[str, Any], weights: Weights) -> Description:
    if str(config.get("hidden_act", "silu")) not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"hidden_act {config['hidden_act']!r} is not supported; known are {list(ACTIVATIONS)}"
        )
    head = Head(_norm(config, "model.norm"), EMBEDDING if config.get("tie_word_embeddings") else "lm_head.weight")
    width = int(config["hidden_size"])
    layers = tuple(_layer(config, weights, number) for number in range(config["num_hidden_layers"]))
    return Description(
        family="llama",
        vocab_size=vocabulary_size(weights, EMBEDDING, width),
        hidden_size=width,
        decoder=Decoder(EMBEDDING, layers, head, max_positions=int(config["max_position_embeddings"])),
    )


def _layer(config: Mapping[str, Any], weights: Weights, number: int) -> Layer:
    name = f"model.layers.{number}"
    return Layer(
        attention_norm=_norm(config, f"{name}.input_layernorm"),
        attention=_attention(config, weights, number, f"{name}.self_attn"),
        mlp_norm=_norm(config, f"{name}.post_attention_layernorm"),
        mlp=MLP(
            activation=ACTIVATIONS[config.get("hidden_act", "silu")],
            gate=_linear(weights, f"{name}.mlp.gate_proj"),
            up=_linear(weights, f"{name}.mlp.up_proj"),
            down=_linear(weights, f"{name}.mlp.down_proj"),
        ),
    )


def _attention(config: Mapping[str, Any], weights: Weights, number: int, name: str) -> Attention:
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    normed = config["model_type"] == "qwen3"
    return Attention(
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        query=_linear(weights, f"{name}.q_proj"),
        key=_linear(weights, f"{name}.k_proj"),
        value=_linear(weights, f"{name}.v_proj"),
        output=_linear(weights, f"{name}.o_proj"),
        rotary=rotary(config, head_dim),
        query_norm=_norm(config, f"{name}.q_norm") if normed else None,
        key_norm=_norm(config, f"{name}.k_norm") if normed else None,
        window=_window(config, number),
    )


def _window(config: Mapping[str, Any], layer: int) -> int | None:
    """Sliding window of a layer. Qwen switches it on apart, and by layer."""
    window = config.get("sliding_window")
    if window is None or not config.get("use_sliding_window", True):
        return None
    kinds = config.get("layer_types")
    if kinds:
        return int(window) if kinds[layer] == "sliding_attention" else None
    return int(window) if layer >= int(config.get("max_window_layers") or 0) else None


def _linear(weights: Weights, name: str) -> Linear:
    bias = f"{name}.bias"
    return Linear(f"{name}.weight", bias if bias in weights else None)


def _norm(config: Mapping[str, Any], name: str) -> Norm:
    return Norm(f"{name}.weight", float(config["rms_norm_eps"]))
