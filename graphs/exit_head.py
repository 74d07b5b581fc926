"""An exit's own parameters, where a checkpoint was trained with them: layers, a norm, an adapter, a vocabulary."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise
from typing import Any, TypeVar

from graphs.description import MLP, Adapter, Attention, Description, Layer, Linear, Norm, RelativeBias
from graphs.errors import GraphError
from graphs.weights import Weights

# Tensors of an exit's own, float32: shallow logits = head(norm(h + up(silu(down(adapter_norm(h)))))).
EXIT = "exit."  # that their names begin with
EXIT_NORM, EXIT_NORM_BIAS = "exit.norm.weight", "exit.norm.bias"  # [d], the second where the model's final norm has one
ADAPTER_NORM = "exit.adapter.norm.weight"  # [d]
ADAPTER_DOWN = "exit.adapter.down.weight"  # [r, d]
ADAPTER_UP = "exit.adapter.up.weight"  # [d, r]
# What the exit's own layers read is the exit layer's state times this, [d, d]; or, [d, 2 d], that state and a feature,
# the final normed state of the position before.
EXIT_MAP = "exit.map.weight"
VOCABULARY = "exit.vocabulary"  # [n]: the token ids that the exit knows, ascending
OTHER, OTHER_BIAS = "exit.other.weight", "exit.other.bias"  # [1, d], [1]: the class of all other tokens
EXIT_LAYERS = "exit.layers"  # exit.layers.0.attention.query.weight ..., as graphs.description names a layer's parts

Part = TypeVar("Part", Layer, Attention, MLP)


def with_exit(description: Description, weights: Weights) -> Description:
    """The description with what `weights` has of an exit's own, if anything: layers, which are like the last ones of
    the model, a norm, an adapter and a vocabulary; the head's weight and scale are the final head's."""
    decoder = description.decoder
    head, norm = decoder.head, decoder.head.norm
    if EXIT_NORM in weights and norm is not None:
        head = replace(head, norm=replace(norm, weight=EXIT_NORM, bias=norm.bias and EXIT_NORM_BIAS))
    if ADAPTER_UP in weights:
        adapter_norm = Norm(ADAPTER_NORM, adapter_epsilon(description))
        head = replace(head, adapter=Adapter(adapter_norm, Linear(ADAPTER_DOWN), Linear(ADAPTER_UP)))
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
        decoder = replace(decoder, exit_map=Linear(EXIT_MAP), exit_layers=layers, exit_inputs=inputs)
    return description if decoder is description.decoder else replace(description, decoder=decoder)


def adapter_epsilon(description: Description) -> float:
    """Epsilon of the adapter's norm, an RMS norm of its own."""
    return (description.decoder.head.norm or description.decoder.layers[-1].mlp_norm).epsilon


def check_tokens(tokens: tuple[int, ...], vocabulary: int) -> None:
    """GraphError where an exit vocabulary is not at least two tokens of the vocabulary, ascending."""
    if len(tokens) < 2 or any(a >= b for a, b in pairwise(tokens)) or tokens[0] < 0 or tokens[-1] >= vocabulary:
        raise GraphError(f"an exit vocabulary is 2 to {vocabulary} different tokens of the model, in ascending order")


def own_layers(description: Description, count: int) -> tuple[Layer, ...]:
    """Layers like the last `count` of the model, whose weights have the names of an exit's own."""
    layers = description.decoder.layers[len(description.decoder.layers) - count :]
    return tuple(_renamed(layer, f"{EXIT_LAYERS}.{number}") for number, layer in enumerate(layers))


def _renamed(part: Part, name: str) -> Part:
    changed: dict[str, object] = {}
    for field in fields(part):
        value: Any = getattr(part, field.name)
        place = f"{name}.{field.name}"
        if isinstance(value, Linear):
            changed[field.name] = Linear(f"{place}.weight", value.bias and f"{place}.bias")
        elif isinstance(value, Norm):
            changed[field.name] = replace(value, weight=f"{place}.weight", bias=value.bias and f"{place}.bias")
        elif isinstance(value, RelativeBias):
            changed[field.name] = replace(value, table=f"{place}.weight")
        elif type(value) in (Attention, MLP):
            changed[field.name] = _renamed(value, place)
    return replace(part, **changed)  # type: ignore[arg-type]
