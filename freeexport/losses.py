"""Losses of a model with one exit: cross-entropy of both exits, and distillation from the deep layers to the shallow.

Every loss is a sum over rows (predicted positions), so that dividing by the rows of a whole step makes gradient
accumulation and several devices equal to one large batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from freeexport.training_options import LossName

Pair = tuple[int, int]  # (shallow layer, deep layer), counted from 1


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed over rows, in nats: logits [N, V], labels int64 [N]."""
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def by_depth(losses: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """The mean of losses by layer, weighted by the layer's number: (S * a + L * b) / (S + L) for two."""
    total = sum(losses)
    return torch.stack([loss * (layer / total) for layer, loss in losses.items()]).sum()


def logit_distillation(deep: torch.Tensor, shallow: torch.Tensor) -> torch.Tensor:
    """KL(deep || shallow), summed over rows, in nats; no gradient reaches `deep`. Both are logits [N, V]."""
    target = F.log_softmax(deep.detach().float(), dim=-1)
    return F.kl_div(F.log_softmax(shallow.float(), dim=-1), target, reduction="sum", log_target=True)


def hidden_distillation(hidden: Mapping[int, torch.Tensor], pairs: Sequence[Pair]) -> torch.Tensor:
    """Mean square distance of each pair's hidden states, averaged over pairs and summed over rows.

    `hidden` maps layers to [N, d]; no gradient reaches the deep state of a pair.
    """
    terms = [(hidden[shallow].float() - hidden[deep].detach().float()).square().mean(-1) for shallow, deep in pairs]
    return torch.stack(terms).mean(0).sum()


def deep_targets(exit_layer: int, layers: int) -> tuple[int, ...]:
    """At most `exit_layer` of the layers above the exit, evenly spaced, the last one always among them."""
    above = layers - exit_layer
    count = min(exit_layer, above)
    return tuple(exit_layer + round(above * number / count) for number in range(1, count + 1))


def uniform_pairs(exit_layer: int, layers: int) -> list[Pair]:
    """Each deep target with the shallow layer at the same share of the depth."""
    targets = deep_targets(exit_layer, layers)
    return [(round(exit_layer * number / len(targets)), deep) for number, deep in enumerate(targets, start=1)]


def align(distances: np.ndarray) -> list[int]:
    """For each deep layer (row) its shallow layer (column), order kept: the non-decreasing choice of least total.

    `distances` [deep, shallow]; columns count from 0, the leftmost of equal choices is taken.
    """
    rows, columns = distances.shape
    total = np.zeros((rows, columns))
    best = np.zeros((rows, columns), dtype=int)  # the column of the row above, where the path ends in [row, column]
    total[0] = distances[0]
    for row in range(1, rows):
        for column in range(columns):
            best[row, column] = int(np.argmin(total[row - 1, : column + 1]))
            total[row, column] = total[row - 1, best[row, column]] + distances[row, column]
    path = [int(np.argmin(total[-1]))]
    for row in range(rows - 1, 0, -1):
        path.append(int(best[row, path[-1]]))
    return path[::-1]


def dynamic_pairs(hidden: Mapping[int, torch.Tensor], exit_layer: int, layers: int) -> list[Pair]:
    """Each deep target with the shallow layer nearest to it in mean square distance, order kept."""
    targets = deep_targets(exit_layer, layers)
    shallow = torch.stack([hidden[layer].detach().float() for layer in range(1, exit_layer + 1)])  # [S, N, d]
    distances = torch.stack([(shallow - hidden[deep].detach().float()).square().mean((1, 2)) for deep in targets])
    chosen = align(distances.double().cpu().numpy())
    return [(column + 1, deep) for column, deep in zip(chosen, targets, strict=True)]


def kept_layers(loss: LossName, exit_layer: int, layers: int) -> tuple[int, ...]:
    """The layers whose hidden states the loss looks at, ascending; the exit and the last layer always."""
    kept = {exit_layer, layers}
    if loss == "weighted-ce":
        kept.update(range(1, layers + 1))
    elif loss == "kd-dyn":
        kept.update(range(1, exit_layer + 1), deep_targets(exit_layer, layers))
    elif loss == "kd-unif":
        kept.update(layer for pair in uniform_pairs(exit_layer, layers) for layer in pair)
    return tuple(sorted(kept))


def distilled_pairs(loss: LossName, hidden: Mapping[int, torch.Tensor], exit_layer: int, layers: int) -> list[Pair]:
    """Which layers the loss pulls together; none for losses without layer-wise distillation."""
    if loss == "kd-last":
        return [(exit_layer, layers)]
    if loss == "kd-unif":
        return uniform_pairs(exit_layer, layers)
    return dynamic_pairs(hidden, exit_layer, layers) if loss == "kd-dyn" else []
