"""Losses of the methods that FREE's authors compare with, for `TrainingOptions.loss`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint as recompute

from freeexport.checkpoints.exit_file import LossName
from freeexport.training.losses import by_depth, cross_entropy
from freeexport.training.options import LayerLoss
from freeexport.training.shallow_deep import ShallowDeep


@dataclass(frozen=True)
class WeightedCrossEntropy:
    """Cross-entropies of all layers, weighted by depth. It trains CALM and static exits."""

    name: LossName = "weighted-ce"

    def layers(self, exit_layer: int, layers: int) -> range:
        """Return all layers."""
        return range(1, layers + 1)

    def total(
        self, module: ShallowDeep, hidden: Mapping[int, torch.Tensor], targets: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss summed over rows, for states [N, d] by layer and targets int64 [N]."""

        def read(state: torch.Tensor) -> torch.Tensor:
            return cross_entropy(module.head(state), targets).sum()

        # Keep one layer's logits in memory at a time, not those of all layers.
        return by_depth(
            {layer: recompute(read, state, use_reentrant=False) for layer, state in hidden.items()}
        )


LOSSES: dict[str, LayerLoss] = {"weighted-ce": WeightedCrossEntropy()}
