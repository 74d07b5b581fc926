"""Limits of a checkpoint, checked before anything is allocated.

Covers the values of its configuration and the shapes of its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from graphs.description import (
    ACTIVATIONS,
    Activation,
    Attention,
    Description,
    EncoderStack,
    Linear,
    Norm,
    Spectrogram,
)
from graphs.errors import UnsupportedModelError
from graphs.exit_head import EXIT_LAYERS, EXIT_MAP, own_layers
from graphs.weights import Weights
from runtime.bundle.manifest import FEATURE_STATES, ExitInput

Shape = tuple[int, ...]
MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_HEAD_SIZE = 4096
MAX_WIDTH = 1 << 17
MAX_MLP_WIDTH = 1 << 20
MAX_VOCABULARY = 1 << 22
MAX_POSITIONS = 1 << 27
MAX_BUCKETS = 1 << 16
# Upper limits of integers, which must be at least 1.
SIZES: dict[str, int] = {
    "num_hidden_layers": MAX_LAYERS,
    "num_layers": MAX_LAYERS,
    "num_decoder_layers": MAX_LAYERS,
    "num_attention_heads": MAX_HEADS,
    "num_key_value_heads": MAX_HEADS,
    "num_heads": MAX_HEADS,
    "encoder_layers": MAX_LAYERS,
    "decoder_layers": MAX_LAYERS,
    "encoder_attention_heads": MAX_HEADS,
    "decoder_attention_heads": MAX_HEADS,
    "encoder_ffn_dim": MAX_MLP_WIDTH,
    "decoder_ffn_dim": MAX_MLP_WIDTH,
    "hidden_size": MAX_WIDTH,
    "d_model": MAX_WIDTH,
    "head_dim": MAX_HEAD_SIZE,
    "n_layer": MAX_LAYERS,
    "n_head": MAX_HEADS,
    "n_embd": MAX_WIDTH,
    "n_inner": MAX_MLP_WIDTH,
    "n_positions": MAX_POSITIONS,
    "d_kv": MAX_HEAD_SIZE,
    "intermediate_size": MAX_MLP_WIDTH,
    "d_ff": MAX_MLP_WIDTH,
    "vocab_size": MAX_VOCABULARY,
    "max_position_embeddings": MAX_POSITIONS,
    "original_max_position_embeddings": MAX_POSITIONS,
    "sliding_window": MAX_POSITIONS,
    "relative_attention_num_buckets": MAX_BUCKETS,
    "relative_attention_max_distance": MAX_POSITIONS,
    "local_radius": MAX_POSITIONS,
    "global_block_size": MAX_POSITIONS,
    "max_source_positions": MAX_POSITIONS,
    "max_target_positions": MAX_POSITIONS,
    "num_mel_bins": MAX_HEAD_SIZE,
}
# Ranges of numbers: above the first value, at most the second.
RANGES: dict[str, tuple[float, float]] = {
    "rms_norm_eps": (0.0, 1.0),
    "layer_norm_epsilon": (0.0, 1.0),
    "max_window_layers": (-1.0, MAX_LAYERS),
    "rope_theta": (1.0, 1e12),
    "rope_local_base_freq": (1.0, 1e12),
    "query_pre_attn_scalar": (0.0, 1e6),
    "attn_logit_softcapping": (0.0, 1e6),
    "final_logit_softcapping": (0.0, 1e6),
    **dict.fromkeys(
        ("embedding_multiplier", "attention_multiplier", "residual_multiplier"), (0.0, 1e6)
    ),
    "logits_scaling": (0.0, 1e6),
    "partial_rotary_factor": (0.0, 1.0),
    "factor": (0.0, 1e6),
    "low_freq_factor": (0.0, 1e6),
    "high_freq_factor": (0.0, 1e6),
    "beta_fast": (0.0, 1e6),
    "beta_slow": (0.0, 1e6),
    "attention_factor": (0.0, 1e6),
    "mscale": (0.0, 1e6),
    "mscale_all_dim": (0.0, 1e6),
}
ROPE = ("rope_parameters", "rope_scaling")
STACKS = ("encoder", "decoder", "text_config")  # nested configurations of T5Gemma


def check_config(config: Mapping[str, Any], required: tuple[str, ...] = ()) -> None:
    """Check the values of config.json, and that sizes go together.

    Args:
        config: Content of config.json. Missing or null values have defaults.
        required: Names that must have a value.

    Raises:
        UnsupportedModelError: If a value is missing or out of range.
    """
    for name in required:
        if config.get(name) is None:
            raise UnsupportedModelError(
                f"{name} is missing in the configuration; add it to config.json"
            )
    for part in (config.get(name) for name in STACKS):
        if isinstance(part, Mapping):
            check_config(part)
    for name in ROPE:
        if config.get(name) is not None and not isinstance(config[name], Mapping):
            raise _refused(config, name, "it must be an object")
    ropes = [config.get(name) or {} for name in ROPE]
    # Gemma 3 has one object for each kind of layer.
    ropes += [part for rope in ropes for part in rope.values() if isinstance(part, Mapping)]
    for part in (config, *ropes):
        for name, most in SIZES.items():
            value = part.get(name)
            if value is not None and not (type(value) is int and 1 <= value <= most):
                raise _refused(part, name, f"it must be a whole number from 1 to {most}")
        for name, (low, high) in RANGES.items():
            value = part.get(name)
            # NaN is in no range.
            if value is not None and not (type(value) in (int, float) and low < value <= high):
                raise _refused(part, name, f"it must be a number above {low:g}, at most {high:g}")
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads")
    width = config.get("hidden_size")
    if heads and kv_heads and heads % kv_heads:
        raise UnsupportedModelError(
            f"num_attention_heads is {heads} in the configuration, "
            f"not a multiple of num_key_value_heads, {kv_heads}"
        )
    if heads and width and not config.get("head_dim") and width % heads:
        raise UnsupportedModelError(
            f"hidden_size is {width} in the configuration, "
            f"not a multiple of num_attention_heads, {heads}; add head_dim"
        )
    layers = config.get("num_hidden_layers")
    kinds = config.get("layer_types")
    is_list = kinds is None or isinstance(kinds, list)
    if not is_list or (kinds is not None and layers is not None and len(kinds) != layers):
        raise _refused(config, "layer_types", f"it must name {layers} layers, as num_hidden_layers")
    rotated = config.get("no_rope_layers")
    is_list = rotated is None or isinstance(rotated, list)
    if not is_list or (rotated is not None and layers is not None and len(rotated) < layers):
        wanted = f"it must have a value for each of {layers} layers"
        raise _refused(config, "no_rope_layers", wanted)
    width = config.get("n_embd")
    if width and config.get("n_head") and width % config["n_head"]:
        raise _refused(config, "n_embd", f"it must be a multiple of n_head, {config['n_head']}")


def _refused(config: Mapping[str, Any], name: str, wanted: str) -> UnsupportedModelError:
    text = repr(config[name])
    shown = text if len(text) <= 40 else text[:37] + "..."
    return UnsupportedModelError(f"{name} is {shown} in the configuration; {wanted}")


def activation_of(config: Mapping[str, Any], field: str, default: str = "") -> Activation:
    """Return the activation that a field of a configuration names.

    Raises:
        UnsupportedModelError: If it is unknown.
    """
    name = str(config.get(field, default))
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"{field} {name!r} is not supported; known are {list(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def vocabulary_size(weights: Weights, embedding: str, width: int) -> int:
    """Return the number of rows of the embedding.

    Raises:
        UnsupportedModelError: If it is not [vocabulary, width].
    """
    shape = weights.shape(embedding)
    if len(shape) != 2 or shape[1] != width or not 1 <= shape[0] <= MAX_VOCABULARY:
        raise UnsupportedModelError(
            f"weight {embedding} is {list(shape)}; "
            f"it must be [vocabulary, {width}], of at most {MAX_VOCABULARY} tokens"
        )
    return shape[0]


def positive(values: tuple[float, ...], what: str) -> tuple[float, ...]:
    """Check that rotary frequencies are positive and finite, and return them.

    Raises:
        UnsupportedModelError: If one is not.
    """
    for value in values:
        if not 0 < value < math.inf:
            raise UnsupportedModelError(
                f"{what} gives the frequency {value}, not a number above 0; correct its values"
            )
    return values


def check_weights(
    description: Description, weights: Weights, inner: tuple[int | None, int | None] = (None, None)
) -> None:
    """Check the shapes of all tensors that a description reads.

    Args:
        inner: Width of the MLPs in decoder and encoder. Default: that of the weights.

    Raises:
        UnsupportedModelError: If a tensor has another shape than the configuration requires.
            `weights` raises its own error for a missing tensor.
    """
    for name, shape in _shapes(description, weights, inner):
        found = weights.shape(name)
        if found != shape:
            raise UnsupportedModelError(
                f"weight {name} is {list(found)}, the configuration says {list(shape)}"
            )


def check_checkpoint(config: Mapping[str, Any], description: Description, weights: Weights) -> None:
    """Check vocabulary and weights before transformers reads them.

    transformers allocates what a configuration requires, whatever the size of the weights.

    Raises:
        UnsupportedModelError: If sizes differ.
    """
    encoder = decoder = config
    if isinstance(config.get("encoder"), Mapping):
        encoder = config["encoder"].get("text_config") or config["encoder"]
        decoder = config["decoder"]
    for stack in (decoder, encoder):
        vocabulary = stack.get("vocab_size", description.vocab_size)
        if vocabulary != description.vocab_size:
            raise UnsupportedModelError(
                f"vocab_size is {vocabulary} in the configuration, "
                f"the embedding has {description.vocab_size} rows; correct config.json"
            )

    def inner(stack: Mapping[str, Any]) -> int | None:
        width = stack.get("intermediate_size") or stack.get("d_ff") or stack.get("n_inner")
        return 4 * description.hidden_size if not width and "n_inner" in stack else width

    check_weights(description, weights, (inner(decoder), inner(encoder)))


def weight_names(description: Description, weights: Weights) -> list[str]:
    """Return the tensors that a description reads, each once, in an order independent of their
    names.
    """
    return list(dict.fromkeys(name for name, _ in _shapes(description, weights)))


def own_shapes(
    description: Description, weights: Weights, count: int, reads: ExitInput = "state"
) -> dict[str, Shape]:
    """Return the shapes of the tensors of an exit with `count` layers, without its norm.

    Its layers have the shapes of the model's last layers.

    Args:
        reads: Input of the layers.
    """
    layers = own_layers(description, count)
    if not layers:
        return {}
    width = description.hidden_size
    decoder = replace(description.decoder, exit_layers=layers)
    inner = weights.shape(description.decoder.layers[-1].mlp.down.weight)[-1]
    found = dict(_shapes(replace(description, decoder=decoder), weights, (inner, None)))
    shapes = {name: shape for name, shape in found.items() if name.startswith(EXIT_LAYERS)}
    return {EXIT_MAP: (width, (1 + FEATURE_STATES[reads]) * width), **shapes}


def _shapes(
    description: Description, weights: Weights, inner: tuple[int | None, int | None] = (None, None)
) -> Iterator[tuple[str, Shape]]:
    width = description.hidden_size
    decoder = description.decoder
    embeddings = [decoder.embedding]
    yield decoder.head.weight, (description.vocab_size, width)
    if decoder.head.bias is not None:
        yield decoder.head.bias, (*weights.shape(decoder.head.bias)[:-1], description.vocab_size)
    norms: list[tuple[Norm | None, int]] = [(decoder.head.norm, width)]
    linears: list[tuple[Linear | None, int, int]] = []
    linears.append((decoder.exit_map, width, decoder.exit_inputs * width))
    layers = [(layer, inner[0]) for layer in decoder.layers + decoder.exit_layers]
    if decoder.exit_fusion is not None:
        linears.append((decoder.exit_fusion.linear, width, len(decoder.exit_fusion.layers) * width))
    if decoder.exit_head is not None:
        head = decoder.exit_head
        norms.append((head.norm, width))
        if head.weight != decoder.head.weight:
            yield head.weight, (len(head.tokens) or description.vocab_size, width)
        linears.append((decoder.exit_head.other, 1, width))
    if isinstance(description.encoder, EncoderStack):
        norms.append((description.encoder.norm, width))
        layers += [(layer, inner[1]) for layer in description.encoder.layers]
        if isinstance(description.encoder.embedding, Spectrogram):
            yield from _spectrogram_shapes(description.encoder.embedding, width)
        else:
            embeddings.append(description.encoder.embedding)
    for embedding in embeddings:
        yield embedding.table, (description.vocab_size, width)
        norms.append((embedding.norm, width))
        if (positions := embedding.positions) is not None and positions.table is not None:
            yield positions.table, (positions.offset + positions.count, width)
    for layer, mlp_width in layers:
        norms += [
            (layer.attention_norm, width),
            (layer.cross_norm, width),
            (layer.mlp_norm, width),
            (layer.attention_out, width),
            (layer.cross_out, width),
            (layer.mlp_out, width),
            (layer.embedding_norm, width),
        ]
        inputs = width if layer.embedding_norm is None else 2 * width
        for attention in filter(None, (layer.attention, layer.cross)):
            linears += _projections(attention, width, inputs)
            norms.append((attention.query_norm, attention.head_dim))
            norms.append((attention.key_norm, attention.head_dim))
            if (bias := attention.relative_bias) is not None:
                yield bias.table, (bias.buckets, attention.heads)
        wide = mlp_width or weights.shape(layer.mlp.down.weight)[-1]
        linears += [
            (layer.mlp.down, width, wide),
            (layer.mlp.up, wide, width),
            (layer.mlp.gate, wide, width),
        ]
    for norm, size in norms:
        if norm is not None:
            yield from ((name, (size,)) for name in (norm.weight, norm.bias) if name is not None)
    for linear, outputs, inputs in linears:
        if linear is not None:
            yield linear.weight, (outputs, inputs)
            if linear.bias is not None:
                yield linear.bias, (outputs,)


def _projections(attention: Attention, width: int, inputs: int) -> list[tuple[Linear, int, int]]:
    queries = attention.heads * attention.head_dim
    keys = attention.kv_heads * attention.head_dim
    return [
        (attention.query, queries, inputs),
        (attention.output, width, queries),
        (attention.key, keys, inputs),
        (attention.value, keys, inputs),
    ]


def _spectrogram_shapes(spectrogram: Spectrogram, width: int) -> Iterator[tuple[str, Shape]]:
    assert spectrogram.positions.table is not None
    yield spectrogram.positions.table, (spectrogram.positions.count, width)
    inputs = spectrogram.bins
    for convolution in spectrogram.convolutions:
        assert convolution.bias is not None
        yield convolution.weight, (width, inputs, 3)
        yield convolution.bias, (width,)
        inputs = width
