"""T5Gemma: an encoder and a decoder with the layers of Gemma 2.

Encoder layers attend in both directions. Decoder layers have a cross-attention with its own norms,
without rotary positions. See arXiv 2504.06225.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graphs.description import (
    MLP,
    Attention,
    DecoderStack,
    Description,
    Embedding,
    EncoderStack,
    Head,
    Layer,
)
from graphs.errors import UnsupportedModelError
from graphs.families import gemma, llama
from graphs.shapes import activation_of, check_config, vocabulary_size
from graphs.weights import Weights

MODEL_TYPES = ("t5gemma",)
REQUIRED = ("encoder", "decoder")


def describe(config: Mapping[str, Any], weights: Weights) -> Description:
    encoder = _stack(config, "encoder")
    decoder = _stack(config, "decoder")
    width = int(decoder["hidden_size"])
    if encoder["hidden_size"] != width:
        raise UnsupportedModelError(
            f"the encoder's hidden_size is {encoder['hidden_size']} and the decoder's {width}; "
            "stacks of two widths are not supported, use a model with one"
        )
    embedding = _embedding(decoder, "decoder")
    tied = config.get("tie_word_embeddings", True)
    head = Head(
        llama.rms_norm(decoder, "model.decoder.norm"),
        embedding.table if tied else "lm_head.out_proj.weight",
        softcap=decoder.get("final_logit_softcapping"),
    )
    return Description(
        family="t5gemma",
        vocab_size=vocabulary_size(weights, embedding.table, width),
        hidden_size=width,
        decoder=DecoderStack(
            embedding,
            _layers(decoder, weights, "decoder"),
            head,
            max_positions=int(decoder["max_position_embeddings"]),
        ),
        encoder=EncoderStack(
            _embedding(encoder, "encoder"),
            _layers(encoder, weights, "encoder"),
            llama.rms_norm(encoder, "model.encoder.norm"),
            max_positions=int(encoder["max_position_embeddings"]),
        ),
    )


def _stack(config: Mapping[str, Any], side: str) -> dict[str, Any]:
    """Return the configuration of "encoder" or "decoder", as one of Gemma 2."""
    stack = config[side]
    if not isinstance(stack, Mapping):
        raise UnsupportedModelError(f"{side} is no object in the configuration; correct it")
    check_config(stack, gemma.REQUIRED)
    activation = stack.get("hidden_activation") or "gelu_pytorch_tanh"
    return {**stack, "model_type": "gemma2", "hidden_act": activation}


def _embedding(stack: Mapping[str, Any], side: str) -> Embedding:
    return Embedding(f"model.{side}.embed_tokens.weight", scale=int(stack["hidden_size"]) ** 0.5)


def _layers(stack: Mapping[str, Any], weights: Weights, side: str) -> tuple[Layer, ...]:
    names = [f"model.{side}.layers.{number}" for number in range(stack["num_hidden_layers"])]
    return tuple(_layer(stack, weights, number, name) for number, name in enumerate(names))


def _layer(stack: Mapping[str, Any], weights: Weights, number: int, name: str) -> Layer:
    attention = _attention(stack, weights, number, f"{name}.self_attn")
    gate, up, down = (
        llama.linear(weights, f"{name}.mlp.{part}_proj") for part in ("gate", "up", "down")
    )
    layer = Layer(
        attention_norm=llama.rms_norm(stack, f"{name}.pre_self_attn_layernorm"),
        attention=attention,
        attention_out=llama.rms_norm(stack, f"{name}.post_self_attn_layernorm"),
        mlp_norm=llama.rms_norm(stack, f"{name}.pre_feedforward_layernorm"),
        mlp=MLP(activation_of(stack, "hidden_act"), up, down, gate),
        mlp_out=llama.rms_norm(stack, f"{name}.post_feedforward_layernorm"),
    )
    if ".encoder." in name:
        if (window := attention.window) is None:
            return layer
        # transformers counts an encoder's window without the query's own position.
        return replace(layer, attention=replace(attention, window=window + 1, ahead=window))
    cross = _attention(stack, weights, number, f"{name}.cross_attn")
    return replace(
        layer,
        cross_norm=llama.rms_norm(stack, f"{name}.pre_cross_attn_layernorm"),
        cross=replace(cross, rotary=None, window=None),
        cross_out=llama.rms_norm(stack, f"{name}.post_cross_attn_layernorm"),
    )


def _attention(stack: Mapping[str, Any], weights: Weights, number: int, name: str) -> Attention:
    return replace(
        llama.attention(stack, weights, number, name),
        scale=float(stack.get("query_pre_attn_scalar") or stack["head_dim"]) ** -0.5,
        softcap=stack.get("attn_logit_softcapping"),
    )
