"""The exit's own norm and adapter, where a checkpoint was trained with them, as a head."""

from __future__ import annotations

from dataclasses import replace

from graphs.description import Adapter, Description, Linear, Norm
from graphs.weights import Weights

# Tensors of an exit's own, float32: shallow logits = head(norm(h + up(silu(down(adapter_norm(h)))))).
EXIT_NORM = "exit.norm.weight"  # [d]
ADAPTER_NORM = "exit.adapter.norm.weight"  # [d]
ADAPTER_DOWN = "exit.adapter.down.weight"  # [r, d]
ADAPTER_UP = "exit.adapter.up.weight"  # [d, r]


def with_exit_head(description: Description, weights: Weights) -> Description:
    """The description with the exit parameters that `weights` has, if any: the exit's own norm and its adapter, with
    the final head's weight and scale."""
    normed, adapted = EXIT_NORM in weights, ADAPTER_UP in weights
    if not normed and not adapted:
        return description
    decoder = description.decoder
    epsilon = decoder.head.norm.epsilon
    norm = Norm(EXIT_NORM, epsilon) if normed else decoder.head.norm
    adapter = Adapter(Norm(ADAPTER_NORM, epsilon), Linear(ADAPTER_DOWN), Linear(ADAPTER_UP)) if adapted else None
    head = replace(decoder.head, norm=norm, adapter=adapter)
    return replace(description, decoder=replace(decoder, exit_head=head))
