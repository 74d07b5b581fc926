"""Estimates the costs of a step at any exit layer from the bytes of weights that it reads."""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphs.description import Description, Linear
from graphs.weights import Weights
from runtime.bundle.costs import Costs

_SIZES = (1, 2, 4, 8, 16)  # rows of deep passes
# In float32 a deep pass over 8 rows takes 1.9 times as long as over 1 (12 T5-base layers, 2 cores).
_ROW_GROWTH = 0.9 / 7
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class StepCosts:
    """Costs of parts of a step for one token, in any unit.

    Attributes:
        layer: One decoder layer.
        head: The LM head.
        growth: Cost of a deep pass over k rows, relative to one row.
        map: A linear map [d, d], such as the input projection of an exit's layers.
    """

    layer: float
    head: float
    growth: dict[int, float]
    map: float = 0.0

    def at(
        self, exit_layer: int, layers: int, own: int = 0, share: float = 1.0, inputs: int = 1
    ) -> Costs:
        """Return the costs of decoding with an exit, in the same unit.

        Args:
            exit_layer: Layers before the exit.
            layers: Layers of the model.
            own: Layers of the exit itself.
            share: Part of the head that the exit computes: the size of its vocabulary relative to
                the model's.
            inputs: Inputs of the exit's layers, 1 or 2.
        """
        shallow = exit_layer * self.layer
        deep = (layers - exit_layer) * self.layer + self.head
        deep_passes = {size: deep * factor for size, factor in self.growth.items()}
        exit_head = own * self.layer + (inputs * self.map if own else 0.0) + share * self.head
        return Costs(shallow + exit_head, shallow, deep_passes, measured=False)


def analytic(description: Description, weights: Weights) -> StepCosts:
    """Estimate costs from the bytes of float32 weights, which bound decoding speed on a CPU."""
    read = list[Linear | None]()
    layers = description.decoder.layers
    for layer in layers:
        attention = layer.attention
        cross = layer.cross
        mlp = layer.mlp
        read += [attention.query, attention.key, attention.value, attention.output]
        read += [mlp.up, mlp.down, mlp.gate]
        # Cross-attention keys and values are computed once per request.
        read += [cross.query, cross.output] if cross else []
    total = sum(
        _FLOAT * math.prod(weights.shape(linear.weight)) for linear in read if linear is not None
    )
    head = _FLOAT * math.prod(weights.shape(description.decoder.head.weight))
    growth = {size: 1 + _ROW_GROWTH * (size - 1) for size in _SIZES}
    linear_map = _FLOAT * description.hidden_size**2
    return StepCosts(total / len(layers), head, growth, map=linear_map)
