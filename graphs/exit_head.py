"""The exit's own norm and adapter, where a checkpoint was trained with them, as a head."""

from __future__ import annotations

from dataclasses import replace

from graphs.description import Adapter, Description, Linear, Norm
from graphs.weights import Weights

NORM, ADAPTER_NORM = "exit.norm.weight", "exit.adapter.norm.weight"
DOWN, UP = "exit.adapter.down.weight", "exit.adapter.up.weight"


def with_exit_head(description: Description, weights: Weights) -> Description:
    """The description with the exit parameters that `weights` has, if any: the final head's weight and scale, the exit's
    own norm, and its adapter."""
    if NORM not in weights:
        return description
    decoder = description.decoder
    epsilon = decoder.head.norm.epsilon
    adapter = Adapter(Norm(ADAPTER_NORM, epsilon), Linear(DOWN), Linear(UP)) if DOWN in weights else None
    head = replace(decoder.head, norm=Norm(NORM, epsilon), adapter=adapter)
    return replace(description, decoder=replace(decoder, exit_head=head))
