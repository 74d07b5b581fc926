"""Gemma 1, 2 and 3 (text).

Differs from Llama in norms of 1 + w and an embedding scaled by the root of its width. Gemma 2 and 3
also normalize the outputs of blocks. Gemma 2 caps scores and logits. Gemma 3 normalizes query and
key, and its local layers have their own rotary base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graphs.description import Description, Embedding, Head, Layer
from graphs.errors import UnsupportedModelError
from graphs.families import llama
from graphs.weights import Weights

MODEL_TYPES = ("gemma", "gemma2", "gemma3_text")
REQUIRED = (*llama.REQUIRED, "head_dim")


def describe(config: Mapping[str, Any], weights: Weights) -> Description:
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModelError(
            "use_bidirectional_attention is not supported; models that generate are causal"
        )
    activation = config.get("hidden_activation") or config.get("hidden_act") or "gelu_pytorch_tanh"
    config = {**config, "hidden_act": activation}
    tied = config.get("tie_word_embeddings", True)
    head = Head(
        llama.rms_norm(config, "model.norm"),
        llama.EMBEDDING if tied else "lm_head.weight",
        softcap=config.get("final_logit_softcapping"),
    )
    embedding = Embedding(llama.EMBEDDING, scale=int(config["hidden_size"]) ** 0.5)
    layers = tuple(_layer(config, weights, number) for number in range(config["num_hidden_layers"]))
    return llama.description(config, weights, embedding, layers, head)


def _layer(config: Mapping[str, Any], weights: Weights, number: int) -> Layer:
    layer = llama.decoder_layer(config, weights, number)
    if config["model_type"] == "gemma":
        return layer
    name = f"model.layers.{number}"
    attention = replace(
        layer.attention,
        scale=float(config.get("query_pre_attn_scalar") or layer.attention.head_dim) ** -0.5,
        softcap=config.get("attn_logit_softcapping"),
    )
    return replace(
        layer,
        attention=attention,
        attention_out=layer.mlp_norm,  # despite its name, it normalizes attention
        mlp_norm=llama.rms_norm(config, f"{name}.pre_feedforward_layernorm"),
        mlp_out=llama.rms_norm(config, f"{name}.post_feedforward_layernorm"),
    )
