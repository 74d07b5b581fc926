"""Losses of FREE's paper and of the methods it compares with, for `TrainingOptions.loss`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch.utils.checkpoint import checkpoint as recompute

from freeexport.checkpoints.exit_file import LossName
from freeexport.training.losses import (
    Pair,
    by_depth,
    cross_entropy,
    dynamic_pairs,
    hidden_distillation,
    teacher_layers,
)
from freeexport.training.options import LayerLoss, TrainedModule

# Which shallow layers learn from which layers of the whole decoder.
Mapped = Literal["dyn", "unif", "last"]
# What happens to teachers below the one that took the lowest shallow layer.
Leftover = Literal["reuse", "drop"]
# Teachers that the authors chose by hand, not evenly spaced, by layers and exit layer.
_CHOSEN = {(24, 10): (3, 6, 8, 11, 13, 16, 18, 20, 22, 24)}


@dataclass(frozen=True)
class WeightedCrossEntropy:
    """Cross-entropies of all layers, weighted by depth. It trains CALM and static exits."""

    name: LossName = "weighted-ce"

    def layers(self, exit_layer: int, layers: int) -> range:
        """Return all layers."""
        return range(1, layers + 1)

    def total(
        self, module: TrainedModule, hidden: Mapping[int, torch.Tensor], targets: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss summed over rows, for states [N, d] by layer and targets int64 [N]."""

        def read(state: torch.Tensor) -> torch.Tensor:
            return cross_entropy(module.head(state), targets).sum()

        # Keep one layer's logits in memory at a time, not those of all layers.
        return by_depth(
            {layer: recompute(read, state, use_reentrant=False) for layer, state in hidden.items()}
        )


@dataclass(frozen=True)
class HiddenDistillation:
    """FREE's loss: (S CE_S + L CE_L) / (S + L) + alpha D, for the exit after layer S of L.

    D is the mean squared distance between the states of shallow layers and of their teachers, as
    the head reads them. The authors also average over padded positions, which are left out here.

    Attributes:
        mapping: Pairs of shallow layers and teachers. `dyn` matches S teachers, evenly spaced over
            all layers, to the nearest shallow layers, from the deepest down and strictly downwards.
            `unif` pairs shallow layer i with teacher i. `last` pairs layer S with layer L.
        alpha: Weight of D.
        leftover: For `dyn`, teachers that find no shallow layer below the one before. `reuse`
            matches them to layer 1, as the authors' code does. `drop` leaves them out, as
            `freeexport train --loss kd-dyn` does.
    """

    mapping: Mapped = "dyn"
    alpha: float = 0.5
    leftover: Leftover = "reuse"

    @property
    def name(self) -> LossName:
        """Return the name of the loss in exit.json."""
        names: dict[Mapped, LossName] = {"dyn": "kd-dyn", "unif": "kd-unif", "last": "kd-last"}
        return names[self.mapping]

    def layers(self, exit_layer: int, layers: int) -> tuple[int, ...]:
        """Return the layers of all possible pairs."""
        if self.mapping == "last":
            return exit_layer, layers
        return *range(1, exit_layer + 1), *teachers(exit_layer, layers)

    def pairs(self, states: Mapping[int, torch.Tensor], exit_layer: int, layers: int) -> list[Pair]:
        """Return pairs of a shallow layer and its teacher, for states [N, d] as the head reads."""
        if self.mapping == "last":
            return [(exit_layer, layers)]
        chosen = teachers(exit_layer, layers)
        if self.mapping == "unif":
            return list(zip(range(1, exit_layer + 1), chosen, strict=True))
        pairs = dynamic_pairs(states, exit_layer, chosen)
        if self.leftover == "reuse":
            matched = {teacher for _, teacher in pairs}
            pairs += [(1, teacher) for teacher in chosen if teacher not in matched]
        return pairs

    def total(
        self, module: TrainedModule, hidden: Mapping[int, torch.Tensor], targets: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss summed over rows, for states [N, d] by layer and targets int64 [N]."""
        exit_layer = module.exit_layer
        last = module.layers
        # Normed once: the head and the distillation read the same dropout sample.
        states = {number: module.head.normed(state) for number, state in hidden.items()}
        exits = {
            number: cross_entropy(module.head.read(states[number]), targets)
            for number in (exit_layer, last)
        }
        distances = hidden_distillation(states, self.pairs(states, exit_layer, last))
        return by_depth(exits).sum() + self.alpha * distances


def teachers(exit_layer: int, layers: int) -> tuple[int, ...]:
    """Return the authors' teacher layers: as many as there are shallow layers, ascending."""
    return _CHOSEN.get((layers, exit_layer)) or teacher_layers(exit_layer, layers)


LOSSES: dict[str, LayerLoss] = {"weighted-ce": WeightedCrossEntropy()}
