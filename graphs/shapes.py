"""Limits of a checkpoint, checked before anything of that size is made: the values of its configuration, and the
shapes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from graphs.description import ACTIVATIONS, Activation, Description, Encoder, Linear, Norm, Spectrogram
from graphs.errors import UnsupportedModelError
from graphs.exit_head import EXIT_LAYERS, EXIT_MAP, own_layers
from graphs.weights import Weights
from runtime.bundle.manifest import ExitInput

Shape = tuple[int, ...]
MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_HEAD_SIZE = 4096
MAX_WIDTH = 1 << 17
MAX_MLP_WIDTH = 1 << 20
MAX_VOCABULARY = 1 << 22
MAX_POSITIONS = 1 << 27
MAX_BUCKETS = 1 << 16
# Whole numbers, from 1.
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
# Numbers above the first and up to the second.
RANGES: dict[str, tuple[float, float]] = {
    "rms_norm_eps": (0.0, 1.0),
    "layer_norm_epsilon": (0.0, 1.0),
    "max_window_layers": (-1.0, MAX_LAYERS),
    "rope_theta": (1.0, 1e12),
    "rope_local_base_freq": (1.0, 1e12),
    "query_pre_attn_scalar": (0.0, 1e6),
    "attn_logit_softcapping": (0.0, 1e6),
    "final_logit_softcapping": (0.0, 1e6),
    **dict.fromkeys(("embedding_multiplier", "attention_multiplier", "residual_multiplier"), (0.0, 1e6)),
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


def check_config(config: Mapping[str, Any], required: tuple[str, ...] = ()) -> None:
    """UnsupportedModelError where a value of config.json is out of range, or sizes do not go together. A value that is
    not there, or null, is left to the defaults, unless its name is in `required`."""
    for name in required:
        if config.get(name) is None:
            raise UnsupportedModelError(f"{name} is missing in the configuration; add it to config.json")
    for name in ROPE:
        if config.get(name) is not None and not isinstance(config[name], Mapping):
            raise _refused(config, name, "it must be an object")
    ropes = [config.get(name) or {} for name in ROPE]
    # Gemma 3 has those of each kind of layer.
    ropes += [part for rope in ropes for part in rope.values() if isinstance(part, Mapping)]
    for part in (config, *ropes):
        for name, most in SIZES.items():
            if part.get(name) is not None and not (type(part[name]) is int and 1 <= part[name] <= most):
                raise _refused(part, name, f"it must be a whole number from 1 to {most}")
        for name, (low, high) in RANGES.items():
            # NaN is in no range.
            if part.get(name) is not None and not (type(part[name]) in (int, float) and low < part[name] <= high):
                raise _refused(part, name, f"it must be a number above {low:g}, at most {high:g}")
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    width = config.get("hidden_size")
    if heads and kv_heads and heads % kv_heads:
        raise UnsupportedModelError(
            f"num_attention_heads is {heads} in the configuration, not a multiple of num_key_value_heads, {kv_heads}"
        )
    if heads and width and not config.get("head_dim") and width % heads:
        raise UnsupportedModelError(
            f"hidden_size is {width} in the configuration, not a multiple of num_attention_heads, {heads}; add head_dim"
        )
    layers, kinds = config.get("num_hidden_layers"), config.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or (layers is not None and len(kinds) != layers)):
        raise _refused(config, "layer_types", f"it must name {layers} layers, as num_hidden_layers")
    turned = config.get("no_rope_layers")
    if turned is not None and (not isinstance(turned, list) or (layers is not None and len(turned) < layers)):
        raise _refused(config, "no_rope_layers", f"it must have a value for each of {layers} layers")
    width = config.get("n_embd")
    if width and config.get("n_head") and width % config["n_head"]:
        raise _refused(config, "n_embd", f"it must be a multiple of n_head, {config['n_head']}")


def _refused(config: Mapping[str, Any], name: str, wanted: str) -> UnsupportedModelError:
    text = repr(config[name])
    shown = text if len(text) <= 40 else text[:37] + "..."
    return UnsupportedModelError(f"{name} is {shown} in the configuration; {wanted}")


def activation_of(config: Mapping[str, Any], field: str, default: str = "") -> Activation:
    """The activation that a field of a configuration names. Raises UnsupportedModelError for an unknown one."""
    name = str(config.get(field, default))
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(f"{field} {name!r} is not supported; known are {list(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def vocabulary_size(weights: Weights, embedding: str, width: int) -> int:
    """Rows of the embedding. UnsupportedModelError where it is not [vocabulary, width]."""
    shape = weights.shape(embedding)
    if len(shape) != 2 or shape[1] != width or not 1 <= shape[0] <= MAX_VOCABULARY:
        raise UnsupportedModelError(
            f"weight {embedding} is {list(shape)}; it must be [vocabulary, {width}], of at most {MAX_VOCABULARY} tokens"
        )
    return shape[0]


def positive(values: tuple[float, ...], what: str) -> tuple[float, ...]:
    """Rotary frequencies. UnsupportedModelError where one is not above 0 and finite."""
    for value in values:
        if not 0 < value < math.inf:
            raise UnsupportedModelError(f"{what} gives the frequency {value}, not a number above 0; correct its values")
    return values


def check_weights(description: Description, weights: Weights, inner: int | None = None) -> None:
    """UnsupportedModelError where a tensor has not the shape that the configuration says; `weights` refuses one that is
    missing. `inner` is the width of the MLPs, None for that of the weights."""
    for name, shape in _shapes(description, weights, inner):
        found = weights.shape(name)
        if found != shape:
            raise UnsupportedModelError(f"weight {name} is {list(found)}, the configuration says {list(shape)}")


def check_checkpoint(config: Mapping[str, Any], description: Description, weights: Weights) -> None:
    """The vocabulary, and `check_weights`: transformers allocates what a configuration says before it reads weights."""
    vocabulary = config.get("vocab_size", description.vocab_size)
    if vocabulary != description.vocab_size:
        raise UnsupportedModelError(
            f"vocab_size is {vocabulary} in the configuration, the embedding has {description.vocab_size} rows; "
            "correct config.json"
        )
    inner = config.get("intermediate_size") or config.get("d_ff") or config.get("n_inner")
    check_weights(description, weights, inner or (4 * description.hidden_size if "n_inner" in config else None))


def weight_names(description: Description, weights: Weights) -> list[str]:
    """The tensors that the description reads, each once, in an order that does not depend on their names."""
    return list(dict.fromkeys(name for name, _ in _shapes(description, weights, None)))


def own_shapes(description: Description, weights: Weights, count: int, reads: ExitInput = "state") -> dict[str, Shape]:
    """The tensors of an exit with `count` layers of its own, which read this, its norm apart: shapes are those of the
    last layers."""
    layers = own_layers(description, count)
    if not layers:
        return {}
    width, decoder = description.hidden_size, replace(description.decoder, exit_layers=layers)
    inner = weights.shape(description.decoder.layers[-1].mlp.down.weight)[-1]
    found = dict(_shapes(replace(description, decoder=decoder), weights, inner))
    own = {name: shape for name, shape in found.items() if name.startswith(EXIT_LAYERS)}
    return {EXIT_MAP: (width, width if reads == "state" else 2 * width), **own}


def _shapes(description: Description, weights: Weights, inner: int | None) -> Iterator[tuple[str, Shape]]:
    width, decoder = description.hidden_size, description.decoder
    embeddings = [decoder.embedding]
    yield decoder.head.weight, (description.vocab_size, width)
    if decoder.head.bias is not None:
        yield decoder.head.bias, (*weights.shape(decoder.head.bias)[:-1], description.vocab_size)
    norms: list[tuple[Norm | None, int]] = [(decoder.head.norm, width)]
    linears: list[tuple[Linear | None, int, int]] = [(decoder.exit_map, width, decoder.exit_inputs * width)]
    layers = decoder.layers + decoder.exit_layers
    if decoder.exit_head is not None:
        norms.append((decoder.exit_head.norm, width))
        linears.append((decoder.exit_head.other, 1, width))
        if (adapter := decoder.exit_head.adapter) is not None:
            rank = weights.shape(adapter.down.weight)[0]
            norms.append((adapter.norm, width))
            linears += [(adapter.down, rank, width), (adapter.up, width, rank)]
    if isinstance(description.encoder, Encoder):
        norms.append((description.encoder.norm, width))
        layers += description.encoder.layers
        sound = description.encoder.embedding
        if isinstance(sound, Spectrogram):
            table, inputs = sound.positions.table, sound.bins
            assert table is not None
            yield table, (sound.positions.count, width)
            for convolution in sound.convolutions:
                assert convolution.bias is not None
                yield convolution.weight, (width, inputs, 3)
                yield convolution.bias, (width,)
                inputs = width
        else:
            embeddings.append(sound)
    for embedding in embeddings:
        yield embedding.table, (description.vocab_size, width)
        norms.append((embedding.norm, width))
        if (positions := embedding.positions) is not None and positions.table is not None:
            yield positions.table, (positions.offset + positions.count, width)
    for layer in layers:
        norms += [(norm, width) for norm in (layer.attention_norm, layer.cross_norm, layer.mlp_norm)]
        norms += [(norm, width) for norm in (layer.attention_out, layer.mlp_out)]
        for attention in filter(None, (layer.attention, layer.cross)):
            queries, keys = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
            linears += [(attention.query, queries, width), (attention.output, width, queries)]
            linears += [(linear, keys, width) for linear in (attention.key, attention.value)]
            norms += [(norm, attention.head_dim) for norm in (attention.query_norm, attention.key_norm)]
            if (bias := attention.relative_bias) is not None:
                yield bias.table, (bias.buckets, attention.heads)
        wide = inner or weights.shape(layer.mlp.down.weight)[-1]
        linears += [(layer.mlp.down, width, wide), (layer.mlp.up, wide, width), (layer.mlp.gate, wide, width)]
    for norm, size in norms:
        if norm is not None:
            yield from ((name, (size,)) for name in (norm.weight, norm.bias) if name is not None)
    for linear, outputs, inputs in linears:
        if linear is not None:
            yield linear.weight, (outputs, inputs)
            if linear.bias is not None:
                yield linear.bias, (outputs,)
