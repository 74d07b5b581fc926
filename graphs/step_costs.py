"""Costs of a step at any exit layer, by the bytes of weights that it reads."""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphs.description import Description, Linear
from graphs.weights import Weights
from runtime.bundle.costs import Costs

_SIZES = (1, 2, 4, 8, 16)  # rows of deep passes
# A deep pass over 8 rows in float32 takes 1.9 times as long as one over 1 row (12 T5-base layers, 2 CPU cores).
_ROW_GROWTH = 0.9 / 7
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class StepCosts:
    """One decoder layer and the head, for one token, in any unit; `growth` is what a deep pass over k rows costs
    relative to one row. `map`: a linear map [d, d], as before an exit's own layers."""

    layer: float
    head: float
    growth: dict[int, float]
    map: float = 0.0

    def at(self, exit_layer: int, layers: int, own: int = 0, share: float = 1.0, inputs: int = 1) -> Costs:
        """Costs, in the same unit, of a model of `layers` layers that exits after `exit_layer`, through `own` layers of
        the exit's own and the `share` of the head that an exit vocabulary has; these layers read so many `inputs`."""
        shallow, deep = exit_layer * self.layer, (layers - exit_layer) * self.layer + self.head
        deep_passes = {size: deep * factor for size, factor in self.growth.items()}
        behind = own * self.layer + (inputs * self.map if own else 0.0) + share * self.head
        return Costs(shallow + behind, shallow, deep_passes, measured=False)


def analytic(description: Description, weights: Weights) -> StepCosts:
    """Bytes of float32 weights that a token reads: decoding on a CPU waits for little else."""
    read = list[Linear | None]()
    layers = description.decoder.layers
    for layer in layers:
        own, cross, mlp = layer.attention, layer.cross, layer.mlp
        read += [own.query, own.key, own.value, own.output, mlp.up, mlp.down, mlp.gate]
        # Keys and values of cross-attention are computed once a request.
        read += [cross.query, cross.output] if cross else []
    total = sum(_FLOAT * math.prod(weights.shape(linear.weight)) for linear in read if linear is not None)
    head = _FLOAT * math.prod(weights.shape(description.decoder.head.weight))
    growth = {size: 1 + _ROW_GROWTH * (size - 1) for size in _SIZES}
    linear_map = _FLOAT * description.hidden_size**2
    return StepCosts(total / len(layers), head, growth, map=linear_map)
