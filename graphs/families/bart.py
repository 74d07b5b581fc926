"""BART and variants: BART, mBART, Marian, M2M100, NLLB, Pegasus. See `KINDS` for differences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from graphs.description import (
    MLP,
    Attention,
    DecoderStack,
    Description,
    Embedding,
    EncoderStack,
    Head,
    Layer,
    Linear,
    Norm,
    Positions,
)
from graphs.errors import UnsupportedModelError
from graphs.shapes import activation_of, vocabulary_size
from graphs.weights import Weights


@dataclass(frozen=True)
class Architecture:
    """Differences between the architectures.

    Attributes:
        order: Order of norms and blocks in a layer.
        embedding_norm: Normalize the embedding.
        final_norm: Normalize the output of the last layer.
        positions: Learned positions, or sines as computed by Marian or by Tensor2Tensor.
    """

    order: Literal["pre", "post"]
    embedding_norm: bool
    final_norm: bool
    positions: Literal["learned", "marian", "tensor2tensor"]


KINDS = {
    "bart": Architecture("post", True, False, "learned"),
    "mbart": Architecture("pre", True, True, "learned"),
    "marian": Architecture("post", False, False, "marian"),
    "m2m_100": Architecture("pre", False, True, "tensor2tensor"),
    "pegasus": Architecture("pre", False, True, "marian"),
}
MODEL_TYPES = tuple(KINDS)
REQUIRED = (
    "d_model",
    "encoder_layers",
    "decoder_layers",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "max_position_embeddings",
    "activation_function",
)
# Names of the embedding matrix. Checkpoints keep one of them or more.
EMBEDDINGS = (
    "model.shared.weight",
    "model.decoder.embed_tokens.weight",
    "model.encoder.embed_tokens.weight",
)
LEARNED_OFFSET = 2  # table row of the first position
EPSILON = 1e-5  # PyTorch's default


def describe(config: Mapping[str, Any], weights: Weights) -> Description:
    if not config.get("share_encoder_decoder_embeddings", True):
        raise UnsupportedModelError(
            "share_encoder_decoder_embeddings is False; separate vocabularies for prompt and "
            "output are not supported, use a model that shares them"
        )
    kind = KINDS[config["model_type"]]
    width = int(config["d_model"])
    table = next((name for name in EMBEDDINGS if name in weights), EMBEDDINGS[0])
    # If the head is not tied, encoder and decoder may have tables of their own.
    tied = config.get("tie_word_embeddings", True) or "lm_head.weight" not in weights
    names = {side: f"model.{side}.embed_tokens.weight" for side in ("encoder", "decoder")}
    tables = {side: table if tied or name not in weights else name for side, name in names.items()}
    head = Head(
        layer_norm("model.decoder.layer_norm") if kind.final_norm else None,
        table if tied else "lm_head.weight",
        bias="final_logits_bias" if "final_logits_bias" in weights else None,
    )
    decoder, encoder = (layers(config, side, kind.order) for side in ("decoder", "encoder"))
    return Description(
        family="bart",
        vocab_size=vocabulary_size(weights, table, width),
        hidden_size=width,
        decoder=DecoderStack(
            _embedding(config, weights, "decoder", tables),
            decoder,
            head,
            int(config["max_position_embeddings"]),
        ),
        encoder=EncoderStack(
            _embedding(config, weights, "encoder", tables),
            encoder,
            layer_norm("model.encoder.layer_norm") if kind.final_norm else None,
        ),
    )


def _embedding(
    config: Mapping[str, Any], weights: Weights, side: str, tables: Mapping[str, str]
) -> Embedding:
    kind = KINDS[config["model_type"]]
    width = int(config["d_model"])
    count = int(config["max_position_embeddings"])
    # Published Marian checkpoints store the sines.
    name = f"model.{side}.embed_positions.weight"
    if kind.positions == "learned":
        positions = Positions(count, name, LEARNED_OFFSET)
    elif kind.positions == "marian":
        frequencies = tuple(10000.0 ** -(2 * step / width) for step in range((width + 1) // 2))
        positions = Positions(count, frequencies=frequencies)
        if name in weights:
            positions = Positions(count, name)
    else:
        half = width // 2
        step = np.float32(-math.log(10000) / max(1, half - 1))
        frequencies = tuple(map(float, np.exp(np.arange(half, dtype=np.float32) * step)))
        # The first position follows that of padding.
        offset = int(config["pad_token_id"]) + 1
        positions = Positions(count, offset=offset, frequencies=frequencies)
    return Embedding(
        tables[side],
        scale=math.sqrt(width) if config.get("scale_embedding") else 1.0,
        positions=positions,
        norm=layer_norm(f"model.{side}.layernorm_embedding") if kind.embedding_norm else None,
    )


def layers(
    config: Mapping[str, Any],
    side: str,
    order: Literal["pre", "post"] = "pre",
    key_bias: bool = True,
) -> tuple[Layer, ...]:
    """Return the layers of `side`, "encoder" or "decoder".

    Args:
        key_bias: Attention keys have a bias. Whisper's do not.
    """
    heads = int(config[f"{side}_attention_heads"])
    activation = activation_of(config, "activation_function")
    if config["d_model"] % heads:
        raise UnsupportedModelError(
            f"d_model is {config['d_model']} in the configuration, not a multiple of "
            f"{side}_attention_heads, {heads}"
        )

    def attention(name: str) -> Attention:
        size = int(config["d_model"]) // heads
        key = biased_linear(f"{name}.k_proj")
        return Attention(
            heads=heads,
            kv_heads=heads,
            head_dim=size,
            scale=size**-0.5,
            query=biased_linear(f"{name}.q_proj"),
            key=key if key_bias else Linear(key.weight),
            value=biased_linear(f"{name}.v_proj"),
            output=biased_linear(f"{name}.out_proj"),
        )

    def layer(name: str) -> Layer:
        crosses = side == "decoder"
        return Layer(
            attention_norm=layer_norm(f"{name}.self_attn_layer_norm"),
            attention=attention(f"{name}.self_attn"),
            cross_norm=layer_norm(f"{name}.encoder_attn_layer_norm") if crosses else None,
            cross=attention(f"{name}.encoder_attn") if crosses else None,
            mlp_norm=layer_norm(f"{name}.final_layer_norm"),
            mlp=MLP(activation, up=biased_linear(f"{name}.fc1"), down=biased_linear(f"{name}.fc2")),
            order=order,
        )

    count = int(config[f"{side}_layers"])
    return tuple(layer(f"model.{side}.layers.{number}") for number in range(count))


def biased_linear(name: str) -> Linear:
    return Linear(f"{name}.weight", f"{name}.bias")


def layer_norm(name: str) -> Norm:
    return Norm(f"{name}.weight", EPSILON, "layer", f"{name}.bias")
