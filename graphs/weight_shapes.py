"""The tensors that a configuration promises, compared with those that a checkpoint has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from graphs.description import Attention, Description, Encoder, Linear
from graphs.errors import UnsupportedModelError
from graphs.families import describe
from graphs.weights import Weights

Shape = tuple[int, ...]


def check_weights(config: Mapping[str, Any], weights: Weights) -> None:
    """UnsupportedModelError where a tensor has not the shape that the configuration says.

    Whoever makes a model of a configuration takes its memory before it looks at the weights. A tensor that is missing
    `weights` refuses itself.
    """
    description = describe(config, weights)
    vocabulary = config.get("vocab_size", description.vocab_size)
    if vocabulary != description.vocab_size:
        raise UnsupportedModelError(
            f"vocab_size is {vocabulary} in the configuration, the embedding has {description.vocab_size} rows; "
            "correct config.json"
        )
    inner = config.get("intermediate_size") or config.get("d_ff")
    for name, shape in _shapes(description, weights, inner):
        found = weights.shape(name)
        if found != shape:
            raise UnsupportedModelError(f"weight {name} is {list(found)}, the configuration says {list(shape)}")


def _shapes(description: Description, weights: Weights, inner: int | None) -> Iterator[tuple[str, Shape]]:
    width, decoder = description.hidden_size, description.decoder
    yield decoder.head.weight, (description.vocab_size, width)
    yield decoder.head.norm.weight, (width,)
    layers = decoder.layers
    if isinstance(description.encoder, Encoder):
        layers += description.encoder.layers
    for layer in layers:
        for norm in (layer.attention_norm, layer.cross_norm, layer.mlp_norm):
            if norm is not None:
                yield norm.weight, (width,)
        for attention in (layer.attention, layer.cross):
            if attention is not None:
                yield from _attention(attention, width)
        wide = inner or weights.shape(layer.mlp.down.weight)[-1]
        yield from _linear(layer.mlp.down, width, wide)
        for linear in (layer.mlp.up, layer.mlp.gate):
            if linear is not None:
                yield from _linear(linear, wide, width)


def _attention(attention: Attention, width: int) -> Iterator[tuple[str, Shape]]:
    queries, keys = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    yield from _linear(attention.query, queries, width)
    yield from _linear(attention.key, keys, width)
    yield from _linear(attention.value, keys, width)
    yield from _linear(attention.output, width, queries)
    for norm in (attention.query_norm, attention.key_norm):
        if norm is not None:
            yield norm.weight, (attention.head_dim,)
    if attention.relative_bias is not None:
        yield attention.relative_bias.table, (attention.relative_bias.buckets, attention.heads)


def _linear(linear: Linear, outputs: int, inputs: int) -> Iterator[tuple[str, Shape]]:
    yield linear.weight, (outputs, inputs)
    if linear.bias is not None:
        yield linear.bias, (outputs,)
