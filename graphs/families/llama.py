"""Llama and its variants.

These are Llama 2 and 3, SmolLM2, SmolLM3, Mistral, Qwen2, Qwen3, Granite, Phi-3 and Phi-4-mini.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graphs.description import (
    MLP,
    Attention,
    DecoderStack,
    Description,
    Embedding,
    Head,
    Layer,
    Linear,
    Norm,
)
from graphs.families.rotary import rotary
from graphs.shapes import activation_of, vocabulary_size
from graphs.weights import View, Weights

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "phi3")
REQUIRED = (
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_size",
    "max_position_embeddings",
    "rms_norm_eps",
)
EMBEDDING = "model.embed_tokens.weight"


def describe(config: Mapping[str, Any], weights: Weights) -> Description:
    head = Head(
        rms_norm(config, "model.norm"),
        EMBEDDING if config.get("tie_word_embeddings") else "lm_head.weight",
        scale=1.0 / float(config.get("logits_scaling") or 1.0),  # Granite's
    )
    embedding = Embedding(EMBEDDING, scale=float(config.get("embedding_multiplier") or 1.0))
    layers = tuple(
        decoder_layer(config, weights, number) for number in range(config["num_hidden_layers"])
    )
    return description(config, weights, embedding, layers, head)


def description(
    config: Mapping[str, Any],
    weights: Weights,
    embedding: Embedding,
    layers: tuple[Layer, ...],
    head: Head,
) -> Description:
    """Return the description of Llama, and of families that build on it."""
    width = int(config["hidden_size"])
    return Description(
        family="llama",
        vocab_size=vocabulary_size(weights, EMBEDDING, width),
        hidden_size=width,
        decoder=DecoderStack(
            embedding, layers, head, max_positions=int(config["max_position_embeddings"])
        ),
    )


def decoder_layer(config: Mapping[str, Any], weights: Weights, number: int) -> Layer:
    """Return layer `number`, counted from 0."""
    name = f"model.layers.{number}"
    activation = activation_of(config, "hidden_act", "silu")
    if config["model_type"] == "phi3":
        inner = int(config["intermediate_size"])
        gate, up = _rows_of(f"{name}.mlp.gate_up_proj.weight", [inner])
    else:
        gate, up = (linear(weights, f"{name}.mlp.{part}_proj") for part in ("gate", "up"))
    return Layer(
        attention_norm=rms_norm(config, f"{name}.input_layernorm"),
        attention=attention(config, weights, number, f"{name}.self_attn"),
        mlp_norm=rms_norm(config, f"{name}.post_attention_layernorm"),
        mlp=MLP(activation, up, _output(config, weights, f"{name}.mlp.down_proj"), gate),
    )


def attention(config: Mapping[str, Any], weights: Weights, number: int, name: str) -> Attention:
    """Return the self-attention of layer `number`, whose weights begin with `name`."""
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    model_type = config["model_type"]
    if model_type == "phi3":
        parts = _rows_of(f"{name}.qkv_proj.weight", [heads * head_dim, kv_heads * head_dim])
    else:
        parts = [linear(weights, f"{name}.{part}_proj") for part in "qkv"]
    normed = model_type in ("qwen3", "gemma3_text")
    # SmolLM3 has layers without rotary positions.
    rotates = config["no_rope_layers"][number] if config.get("no_rope_layers") else True
    # In Gemma 3 each kind of layer has its own rotary positions.
    kind = config["layer_types"][number] if model_type == "gemma3_text" else ""
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=float(config.get("attention_multiplier") or head_dim**-0.5),  # Granite's
        query=parts[0],
        key=parts[1],
        value=parts[2],
        output=_output(config, weights, f"{name}.o_proj"),
        rotary=rotary(config, head_dim, model_type == "phi3", kind) if rotates else None,
        query_norm=rms_norm(config, f"{name}.q_norm") if normed else None,
        key_norm=rms_norm(config, f"{name}.k_norm") if normed else None,
        window=_window(config, number),
    )


def _window(config: Mapping[str, Any], layer: int) -> int | None:
    """Return a layer's sliding window. Qwen enables it by a separate option and by layer."""
    window = config.get("sliding_window")
    if window is None or not config.get("use_sliding_window", True):
        return None
    kinds = config.get("layer_types")
    if kinds:
        return int(window) if kinds[layer] == "sliding_attention" else None
    return int(window) if layer >= int(config.get("max_window_layers") or 0) else None


def linear(weights: Weights, name: str) -> Linear:
    """Return a linear layer, with its bias if the checkpoint has one."""
    bias = f"{name}.bias"
    return Linear(f"{name}.weight", bias if bias in weights else None)


def _rows_of(name: str, sizes: Sequence[int]) -> list[Linear]:
    """Split one weight (Phi) into layers of the given output sizes, then one of the other rows."""
    ends = [sum(sizes[:count]) for count in range(len(sizes) + 1)]
    return [
        Linear(str(View(name, start=start, stop=stop)))
        for start, stop in zip(ends, [*ends[1:], None], strict=True)
    ]


def _output(config: Mapping[str, Any], weights: Weights, name: str) -> Linear:
    """Return a block's last layer, its weights scaled by Granite's residual multiplier."""
    plain = linear(weights, name)
    factor = float(config.get("residual_multiplier") or 1.0)
    bias = plain.bias and str(View(plain.bias, factor=factor))
    return Linear(str(View(plain.weight, factor=factor)), bias)


def rms_norm(config: Mapping[str, Any], name: str) -> Norm:
    """Return a norm. Gemma's weights are offsets from 1."""
    offset = 1.0 if config["model_type"].startswith("gemma") else 0.0
    return Norm(str(View(f"{name}.weight", offset=offset)), float(config["rms_norm_eps"]))
