"""T5 and its variants: T5 1.0 and 1.1, Flan-T5, mT5, UMT5, ByT5 and LongT5 (foreign encoder)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from graphs.description import (
    ACTIVATIONS,
    MLP,
    Attention,
    DecoderStack,
    Description,
    Embedding,
    EncoderStack,
    ForeignEncoder,
    Head,
    Layer,
    Linear,
    Norm,
)
from graphs.description import RelativeBias as Bias
from graphs.errors import UnsupportedModelError
from graphs.shapes import vocabulary_size
from graphs.weights import Weights

MODEL_TYPES = ("t5", "mt5", "umt5", "longt5")
REQUIRED = (
    "d_model",
    "d_kv",
    "num_heads",
    "num_layers",
    "relative_attention_num_buckets",
    "layer_norm_epsilon",
)
# Names of the embedding matrix. Checkpoints keep one of them or more.
EMBEDDINGS = ("shared.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight")


def describe(config: Mapping[str, Any], weights: Weights) -> Description:
    decoder_layers = config.get("num_decoder_layers") or config["num_layers"]
    embedding = next((n for n in EMBEDDINGS if n in weights), "shared.weight")
    # transformers 5 sets tie_word_embeddings in every checkpoint, so look for the head's weights.
    tied = "lm_head.weight" not in weights
    width = int(config["d_model"])
    head = Head(
        _norm(config, "decoder.final_layer_norm"),
        embedding if tied else "lm_head.weight",
        width**-0.5 if _scaled(config) else 1.0,
    )
    return Description(
        family="t5",
        vocab_size=vocabulary_size(weights, embedding, width),
        hidden_size=width,
        decoder=DecoderStack(
            Embedding(embedding),
            tuple(_layer(config, "decoder", n) for n in range(decoder_layers)),
            head,
        ),
        encoder=_encoder(config, embedding),
    )


def _encoder(config: Mapping[str, Any], embedding: str) -> EncoderStack | ForeignEncoder:
    if config["model_type"] == "longt5":
        # Local attention works in blocks of local_radius + 1 tokens, global attention on sums over
        # blocks of global_block_size.
        block = int(config["local_radius"]) + 1
        if config["encoder_attention_type"] == "transient-global":
            block = math.lcm(block, int(config["global_block_size"]))
        return ForeignEncoder(block)
    layers = tuple(_layer(config, "encoder", n) for n in range(config["num_layers"]))
    return EncoderStack(Embedding(embedding), layers, _norm(config, "encoder.final_layer_norm"))


def _scaled(config: Mapping[str, Any]) -> bool:
    """Return True if the head's input is scaled, as in the original T5 with a tied head.

    transformers 4 infers this from tie_word_embeddings, transformers 5 has a separate option.
    """
    tied = bool(config.get("tie_word_embeddings", True)) and config["model_type"] != "mt5"
    return bool(config.get("scale_decoder_outputs", tied))


def _layer(config: Mapping[str, Any], side: str, number: int) -> Layer:
    parts = f"{side}.block.{number}.layer"
    decoder = side == "decoder"
    mlp = 2 if decoder else 1
    # UMT5 has a bias table in every layer, all others only in the first.
    owner = number if config["model_type"] == "umt5" else 0
    table = f"{side}.block.{owner}.layer.0.SelfAttention.relative_attention_bias.weight"
    buckets = int(config["relative_attention_num_buckets"])
    bias = Bias(
        table,
        buckets,
        int(config.get("relative_attention_max_distance", 128)),
        bidirectional=not decoder,
    )
    return Layer(
        attention_norm=_norm(config, f"{parts}.0.layer_norm"),
        attention=_attention(config, f"{parts}.0.SelfAttention", bias),
        cross_norm=_norm(config, f"{parts}.1.layer_norm") if decoder else None,
        cross=_attention(config, f"{parts}.1.EncDecAttention", None) if decoder else None,
        mlp_norm=_norm(config, f"{parts}.{mlp}.layer_norm"),
        mlp=_mlp(config, f"{parts}.{mlp}.DenseReluDense"),
    )


def _attention(config: Mapping[str, Any], name: str, bias: Bias | None) -> Attention:
    heads = int(config["num_heads"])
    return Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=int(config["d_kv"]),
        scale=1.0,  # T5 folds the scale into its initialisation
        query=Linear(f"{name}.q.weight"),
        key=Linear(f"{name}.k.weight"),
        value=Linear(f"{name}.v.weight"),
        output=Linear(f"{name}.o.weight"),
        relative_bias=bias,
    )


def _mlp(config: Mapping[str, Any], name: str) -> MLP:
    projection = str(config.get("feed_forward_proj", "relu"))
    gated = projection.startswith("gated-")
    kind = "gelu_new" if projection == "gated-gelu" else projection.removeprefix("gated-")
    if kind not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"feed_forward_proj {projection!r} is not supported; known are {', '.join(ACTIVATIONS)}"
        )
    return MLP(
        activation=ACTIVATIONS[kind],
        up=Linear(f"{name}.wi_1.weight" if gated else f"{name}.wi.weight"),
        gate=Linear(f"{name}.wi_0.weight") if gated else None,
        down=Linear(f"{name}.wo.weight"),
        fp32=True,
    )


def _norm(config: Mapping[str, Any], name: str) -> Norm:
    return Norm(f"{name}.weight", float(config["layer_norm_epsilon"]))
