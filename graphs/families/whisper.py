"""Whisper, from tiny to large-v3-turbo, English-only and multilingual.

An encoder of spectrograms and a decoder that writes the transcript (Radford et al. 2022, arXiv
2212.04356).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphs import description as parts
from graphs.families.bart import biased_linear, layer_norm, layers
from graphs.shapes import vocabulary_size
from graphs.weights import Weights

MODEL_TYPES = ("whisper",)
REQUIRED = (
    "d_model",
    "encoder_layers",
    "decoder_layers",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "num_mel_bins",
    "max_source_positions",
    "max_target_positions",
)
EMBEDDING = "model.decoder.embed_tokens.weight"


def describe(config: Mapping[str, Any], weights: Weights) -> parts.Description:
    config = {"activation_function": "gelu", **config}
    width = int(config["d_model"])
    bins = int(config["num_mel_bins"])
    # transformers 5 also saves a tied head under its own name.
    tied = config.get("tie_word_embeddings", True) or "proj_out.weight" not in weights
    return parts.Description(
        family="whisper",
        vocab_size=vocabulary_size(weights, EMBEDDING, width),
        hidden_size=width,
        decoder=parts.DecoderStack(
            parts.Embedding(
                EMBEDDING, 1.0, _positions("decoder", int(config["max_target_positions"]))
            ),
            layers(config, "decoder", key_bias=False),
            parts.Head(
                layer_norm("model.decoder.layer_norm"), EMBEDDING if tied else "proj_out.weight"
            ),
            max_positions=int(config["max_target_positions"]),
        ),
        encoder=parts.EncoderStack(
            parts.Spectrogram(
                bins,
                (biased_linear("model.encoder.conv1"), biased_linear("model.encoder.conv2")),
                _positions("encoder", int(config["max_source_positions"])),
            ),
            layers(config, "encoder", key_bias=False),
            layer_norm("model.encoder.layer_norm"),
        ),
    )


def _positions(side: str, count: int) -> parts.Positions:
    return parts.Positions(count, f"model.{side}.embed_positions.weight")
