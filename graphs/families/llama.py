"""Llama and its kin: Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen3; and rotary frequencies with the scaling rules that
checkpoints name in `rope_parameters` or `rope_scaling` (RoFormer, arXiv 2104.09864; YaRN, arXiv 2309.00071; the
frequency bands of the Llama 3.1 model card)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from graphs.description import (
    ACTIVATIONS,
    MLP,
    Attention,
    Decoder,
    Description,
    Embedding,
    Head,
    Layer,
    Linear,
    Norm,
    Rotary,
)
from graphs.errors import UnsupportedModelError
from graphs.shapes import positive, vocabulary_size
from graphs.weights import Weights

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
REQUIRED = ("num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings", "rms_norm_eps")
EMBEDDING = "model.embed_tokens.weight"


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
        decoder=Decoder(Embedding(EMBEDDING), layers, head, max_positions=int(config["max_position_embeddings"])),
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


def rotary(config: Mapping[str, Any], head_dim: int) -> Rotary:
    """The rotary positions of a configuration. UnsupportedModelError where the scaling rule is unknown."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedModelError("partial rotary positions (partial_rotary_factor != 1) are not supported")
    if str(kind) not in RULES:
        raise UnsupportedModelError(f"rope scaling {kind!r} is not supported; known are {', '.join(sorted(RULES))}")
    if head_dim % 2:
        raise UnsupportedModelError(f"attention heads of size {head_dim} cannot be rotated; head_dim must be even")
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / (np.float32(theta) ** exponents)).astype(np.float32)
    what = f"rope scaling {kind!r}"
    try:
        with np.errstate(all="ignore"):
            scaled, scale = RULES[kind](frequencies, {"rope_theta": theta, **rope}, config)
    except KeyError as error:
        raise UnsupportedModelError(f"{what} has no {error.args[0]}; add it to config.json") from None
    return Rotary(positive(tuple(map(float, scaled)), what), scale)


def _llama3(frequencies: np.ndarray, rope: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = float(rope["original_max_position_embeddings"]) * frequencies / np.float32(2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - blend) * frequencies / factor + blend * frequencies).astype(np.float32), 1.0


def _yarn(frequencies: np.ndarray, rope: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Frequencies that turn often within the original context are kept, slow ones stretched, a ramp between."""
    factor = float(rope["factor"])
    original = float(rope.get("original_max_position_embeddings") or config["max_position_embeddings"])
    pairs, base = len(frequencies), float(rope["rope_theta"])

    def pair_of(rotations: float) -> float:
        return pairs * math.log(original / (rotations * 2 * math.pi)) / math.log(base)

    low, high = pair_of(float(rope.get("beta_fast") or 32)), pair_of(float(rope.get("beta_slow") or 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    ramp = np.clip((np.arange(pairs, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    return (frequencies * (1 - ramp) + frequencies / factor * ramp).astype(np.float32), _yarn_scale(factor, rope)


def _yarn_scale(factor: float, rope: Mapping[str, Any]) -> float:
    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return grown(float(rope["mscale"])) / grown(float(rope["mscale_all_dim"]))
    return grown(1.0)


RULES: dict[str, Callable[[np.ndarray, Mapping[str, Any], Mapping[str, Any]], tuple[np.ndarray, float]]] = {
    "default": lambda frequencies, rope, config: (frequencies, 1.0),
    "linear": lambda frequencies, rope, config: (frequencies / np.float32(rope["factor"]), 1.0),
    "llama3": _llama3,
    "yarn": _yarn,
}
