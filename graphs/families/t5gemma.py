"""T5Gemma and T5Gemma 2: an encoder and a decoder with the layers of Gemma 2 or Gemma 3.

Encoder layers attend in both directions. In T5Gemma (arXiv 2504.06225) decoder layers have a
cross-attention with its own norms. In T5Gemma 2 it is one with the self-attention, and one table
serves both stacks and the head. The vision tower of T5Gemma 2 is not read: prompts are text.
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

MODEL_TYPES = ("t5gemma", "t5gemma2")
REQUIRED = ("encoder", "decoder")


def describe(config: Mapping[str, Any], weights: Weights) -> Description:
    second = config["model_type"] == "t5gemma2"
    encoder = _stack(config, "encoder")
    decoder = _stack(config, "decoder")
    width = int(decoder["hidden_size"])
    if encoder["hidden_size"] != width:
        raise UnsupportedModelError(
            f"the encoder's hidden_size is {encoder['hidden_size']} and the decoder's {width}; "
            "stacks of two widths are not supported, use a model with one"
        )
    encoder_name = "model.encoder.text_model" if second else "model.encoder"
    table = f"{encoder_name}.embed_tokens.weight"
    scale = width**0.5
    embedding = Embedding(table if second else "model.decoder.embed_tokens.weight", scale)
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
            _layers(decoder, weights, "model.decoder"),
            head,
            max_positions=int(decoder["max_position_embeddings"]),
        ),
        encoder=EncoderStack(
            Embedding(table, scale),
            _layers(encoder, weights, encoder_name),
            llama.rms_norm(encoder, f"{encoder_name}.norm"),
            max_positions=int(encoder["max_position_embeddings"]),
        ),
    )


def _stack(config: Mapping[str, Any], side: str) -> dict[str, Any]:
    """Return the configuration of "encoder" or "decoder", as one of Gemma 2 or 3."""
    stack = config[side]
    kind = "gemma2"
    if config["model_type"] == "t5gemma2":
        kind = "gemma3_text"
        if side == "encoder" and isinstance(stack, Mapping):
            stack = stack.get("text_config")
    if not isinstance(stack, Mapping):
        raise UnsupportedModelError(f"{side} is no object in the configuration; correct it")
    check_config(stack, gemma.REQUIRED)
    activation = stack.get("hidden_activation") or "gelu_pytorch_tanh"
    return {**stack, "model_type": kind, "hidden_act": activation}


def _layers(stack: Mapping[str, Any], weights: Weights, name: str) -> tuple[Layer, ...]:
    names = [f"{name}.layers.{number}" for number in range(stack["num_hidden_layers"])]
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
        # In transformers, T5Gemma's encoder sees this many positions on either side of a query's
        # own, and T5Gemma 2's as many in all.
        back, ahead = (window + 1, window)
        if stack["model_type"] == "gemma3_text":
            back, ahead = ((window + 1) // 2, window // 2)
        return replace(layer, attention=replace(attention, window=back, ahead=ahead))
    if stack["model_type"] == "gemma3_text":
        return replace(layer, cross=replace(attention, rotary=None, window=None))
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
