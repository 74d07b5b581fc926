"""Trained parameters of a checkpoint's exit: layers with a map and a norm, and vocabulary."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise
from typing import Any, TypeVar

from graphs.description import (
    MLP,
    Attention,
    Description,
    Layer,
    Linear,
    Norm,
    RelativeBias,
)
from graphs.errors import GraphError
from graphs.weights import Weights
from runtime.bundle.manifest import ExitInput

# Names of the exit's tensors, float32. They give the shallow logits head(norm(layers(map(h)))).
EXIT = "exit."  # prefix of the names
EXIT_NORM = "exit.norm.weight"  # [d]
EXIT_NORM_BIAS = "exit.norm.bias"  # [d], if the model's final norm has a bias
# Input projection of the exit's layers: [d, d] from the exit layer's state, [d, 2 d] from that
# state and a feature, the final normed state of the previous position, or [d, 4 d] from that state
# and a fused feature: two earlier states of the deep decoder, scaled to a root mean square of 1,
# then the final one.
EXIT_MAP = "exit.map.weight"
VOCABULARY = "exit.vocabulary"  # [n], token ids, ascending
OTHER = "exit.other.weight"  # [1, d], the class of all other tokens
OTHER_BIAS = "exit.other.bias"  # [1]
# Prefix of the exit's layers, as in exit.layers.0.attention.query.weight. Parts are named by the
# fields in graphs.description.
EXIT_LAYERS = "exit.layers"

UNIT_EPSILON = 1e-5  # added to the mean square of a state before it is scaled

Part = TypeVar("Part", Layer, Attention, MLP)


def with_exit(description: Description, weights: Weights) -> Description:
    """Return the description with the exit's trained parameters in `weights`, if there are any.

    The exit's layers have the structure of the model's last layers. Its head uses the weight and
    scale of the final head.

    Raises:
        GraphError: If the exit vocabulary is invalid.
    """
    decoder = description.decoder
    head = decoder.head
    norm = decoder.head.norm
    if EXIT_NORM in weights and norm is not None:
        bias = norm.bias and EXIT_NORM_BIAS
        head = replace(head, norm=replace(norm, weight=EXIT_NORM, bias=bias))
    if VOCABULARY in weights:
        tokens = tuple(map(int, weights.read(VOCABULARY)))
        check_tokens(tokens, description.vocab_size)
        head = replace(head, tokens=tokens, other=Linear(OTHER, OTHER_BIAS))
    if head is not decoder.head:
        decoder = replace(decoder, exit_head=head)
    if EXIT_MAP in weights:
        count = 0
        while f"{EXIT_LAYERS}.{count}.attention_norm.weight" in weights:
            count += 1
        inputs = weights.shape(EXIT_MAP)[-1] // description.hidden_size
        layers = own_layers(description, count)
        decoder = replace(
            decoder,
            exit_map=Linear(EXIT_MAP),
            exit_layers=layers,
            exit_inputs=inputs,
        )
    return description if decoder is description.decoder else replace(description, decoder=decoder)


def fused_layers(reads: ExitInput, exit_layer: int, layers: int) -> tuple[int, ...]:
    """Return the layers after which a fused feature reads the deep decoder's states.

    They are a third and two thirds of the way from the exit layer to the last layer: 10 and 20 of
    30 layers for an exit after layer 1. Empty for an exit without fused features.
    """
    if reads != "fused":
        return ()
    deep = layers - exit_layer
    return exit_layer + deep // 3, exit_layer + 2 * deep // 3


def check_tokens(tokens: tuple[int, ...], vocabulary: int) -> None:
    """Check an exit vocabulary.

    Raises:
        GraphError: If it is not at least two tokens of the vocabulary in ascending order.
    """
    ascending = all(low < high for low, high in pairwise(tokens))
    if len(tokens) < 2 or not ascending or tokens[0] < 0 or tokens[-1] >= vocabulary:
        raise GraphError(
            f"an exit vocabulary is 2 to {vocabulary} different tokens of the model, "
            "in ascending order"
        )


def own_layers(description: Description, count: int) -> tuple[Layer, ...]:
    """Return the model's last `count` layers, with the weight names of the exit's layers."""
    layers = description.decoder.layers[len(description.decoder.layers) - count :]
    renamed = [_renamed(layer, f"{EXIT_LAYERS}.{number}") for number, layer in enumerate(layers)]
    return tuple(
        replace(layer, cross=replace(layer.attention, rotary=None, window=None))
        if layer.joined
        else layer
        for layer in renamed
    )


def _renamed(part: Part, name: str) -> Part:
    changed: dict[str, object] = {}
    for field in fields(part):
        value: Any = getattr(part, field.name)
        place = f"{name}.{field.name}"
        if isinstance(value, Linear):
            changed[field.name] = Linear(f"{place}.weight", value.bias and f"{place}.bias")
        elif isinstance(value, Norm):
            bias = value.bias and f"{place}.bias"
            changed[field.name] = replace(value, weight=f"{place}.weight", bias=bias)
        elif isinstance(value, RelativeBias):
            changed[field.name] = replace(value, table=f"{place}.weight")
        elif type(value) in (Attention, MLP):
            changed[field.name] = _renamed(value, place)
    return replace(part, **changed)  # type: ignore[arg-type]
