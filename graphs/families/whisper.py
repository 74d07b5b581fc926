"""Whisper, from tiny to large-v3-turbo, English-only and multilingual: an encoder of spectrograms, and a decoder that
writes what was said (Radford et al. 2022, arXiv 2212.04356)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphs import description as parts
from graphs.errors import UnsupportedModelError
from graphs.shapes import vocabulary_size
from graphs.weights import Weights

MODEL_TYPES = ("whisper",)
REQUIRED = (
    *("d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"),
    *("num_mel_bins", "max_source_positions", "max_target_positions"),
)
EMBEDDING = "model.decoder.embed_tokens.weight"
EPSILON = 1e-5  # PyTorch's own: no configuration names it


def describe(config: Mapping[str, Any], weights: Weights) -> parts.Description:
    activation = str(config.get("activation_function", "gelu"))
    if activation not in parts.ACTIVATIONS:
        raise UnsupportedModelError(
            f"activation_function {activation!r} is not supported; known are {', '.join(parts.ACTIVATIONS)}"
        )
    width, bins = int(config["d_model"]), int(config["num_mel_bins"])
    for side in ("encoder", "decoder"):
        if width % int(config[f"{side}_attention_heads"]):
            heads = config[f"{side}_attention_heads"]
            raise UnsupportedModelError(f"d_model is {width} in the configuration, not a multiple of {heads} heads")
    scale = width**0.5 if config.get("scale_embedding") else 1.0
    # transformers 5 saves the head under its own name, too, where it is tied.
    tied = config.get("tie_word_embeddings", True) or "proj_out.weight" not in weights
    return parts.Description(
        family="whisper",
        vocab_size=vocabulary_size(weights, EMBEDDING, width),
        hidden_size=width,
        decoder=parts.Decoder(
            parts.Embedding(EMBEDDING, scale, _positions("decoder", int(config["max_target_positions"]))),
            tuple(_layer(config, "decoder", number) for number in range(config["decoder_layers"])),
            parts.Head(_norm("model.decoder.layer_norm"), EMBEDDING if tied else "proj_out.weight"),
            max_positions=int(config["max_target_positions"]),
        ),
        encoder=parts.Encoder(
            parts.Spectrogram(
                bins,
                (_linear("model.encoder.conv1"), _linear("model.encoder.conv2")),
                _positions("encoder", int(config["max_source_positions"])),
            ),
            tuple(_layer(config, "encoder", number) for number in range(config["encoder_layers"])),
            _norm("model.encoder.layer_norm"),
        ),
    )


def _layer(config: Mapping[str, Any], side: str, number: int) -> parts.Layer:
    name, decoder = f"model.{side}.layers.{number}", side == "decoder"
    return parts.Layer(
        attention_norm=_norm(f"{name}.self_attn_layer_norm"),
        attention=_attention(config, side, f"{name}.self_attn"),
        cross_norm=_norm(f"{name}.encoder_attn_layer_norm") if decoder else None,
        cross=_attention(config, side, f"{name}.encoder_attn") if decoder else None,
        mlp_norm=_norm(f"{name}.final_layer_norm"),
        mlp=parts.MLP(
            activation=parts.ACTIVATIONS[str(config.get("activation_function", "gelu"))],
            up=_linear(f"{name}.fc1"),
            down=_linear(f"{name}.fc2"),
        ),
    )


def _attention(config: Mapping[str, Any], side: str, name: str) -> parts.Attention:
    heads = int(config[f"{side}_attention_heads"])
    head_dim = int(config["d_model"]) // heads
    return parts.Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        query=_linear(f"{name}.q_proj"),
        key=parts.Linear(f"{name}.k_proj.weight"),  # a bias of the keys would change no softmax
        value=_linear(f"{name}.v_proj"),
        output=_linear(f"{name}.out_proj"),
    )


def _positions(side: str, count: int) -> parts.Positions:
    return parts.Positions(count, f"model.{side}.embed_positions.weight")


def _linear(name: str) -> parts.Linear:
    return parts.Linear(f"{name}.weight", f"{name}.bias")


def _norm(name: str) -> parts.Norm:
    return parts.Norm(f"{name}.weight", EPSILON, "layer", f"{name}.bias")
