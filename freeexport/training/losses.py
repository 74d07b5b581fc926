"""Losses of a model with one exit: cross-entropy of both exits, and distillation from the deep layers to the shallow.

Distillation is a sum over rows (predicted positions), so that dividing by the rows of a whole step makes gradient
accumulation and several devices equal to one large batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from freeexport.checkpoints.exit_file import LossName

Pair = tuple[int, int]  # (student: a shallow layer, teacher: any layer), counted from 1


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[N], in nats: logits [N, V], labels int64 [N]."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def by_depth(losses: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """The mean of losses by layer, weighted by the layer's number: (S * a + L * b) / (S + L) for two. The embedding, 0,
    counts as the first."""
    total = sum(max(1, layer) for layer in losses)
    return torch.stack([loss * (max(1, layer) / total) for layer, loss in losses.items()]).sum(0)


def logit_distillation(deep: torch.Tensor, shallow: torch.Tensor) -> torch.Tensor:
    """KL(deep || shallow), summed over rows, in nats; no gradient reaches `deep`. Both are logits [N, V]."""
    target = F.log_softmax(deep.detach().float(), dim=-1)
    return F.kl_div(
        F.log_softmax(shallow.float(), dim=-1), target, reduction="sum", log_target=True
    )


def best_distillation(deep: torch.Tensor, shallow: torch.Tensor) -> torch.Tensor:
    """KL(deep || shallow), summed over rows, in nats, where of the deep prediction only the best n tokens are known:
    logarithms of both predictions' probabilities of these, [N, n]. All other tokens count as one."""
    best = F.kl_div(shallow, deep, reduction="sum", log_target=True)
    rest, left = (1 - part.exp().sum(-1) for part in (deep, shallow))
    rest = rest.clamp_min(0)
    left = left.clamp_min(1e-6)
    return best + (torch.xlogy(rest, rest) - rest * left.log()).sum()


def hidden_distillation(states: Mapping[int, torch.Tensor], pairs: Sequence[Pair]) -> torch.Tensor:
    """Mean square distance of each pair's states, averaged over pairs and summed over rows.

    `states` maps layers to [N, d], as the head reads them: after the final norm, since the residual stream grows with
    depth. No gradient reaches a pair's teacher as such (a layer may be teacher in one pair and student in another).
    """
    terms = [
        (states[student].float() - states[teacher].detach().float()).square().mean(-1)
        for student, teacher in pairs
    ]
    return torch.stack(terms).mean(0).sum()


def teacher_layers(exit_layer: int, layers: int) -> tuple[int, ...]:
    """`exit_layer` of all layers, evenly spaced, the last one always among them: 4, 8, ... 24 for 6 of 24."""
    return tuple(round(layers * number / exit_layer) for number in range(1, exit_layer + 1))


def match(distances: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (teacher, student) of `distances` [teachers, students], from the deepest teacher down: each takes the
    nearest student strictly below the one before, so no two share one. Teachers for whom none is left get none.

    The authors' code gives those the lowest student again, which would then be pulled to several layers.
    """
    pairs = []
    free = distances.shape[1]
    for teacher in reversed(range(len(distances))):
        if not free:
            break
        free = int(np.argmin(distances[teacher, :free]))
        pairs.append((teacher, free))
    return pairs[::-1]


def dynamic_pairs(
    states: Mapping[int, torch.Tensor], exit_layer: int, teachers: Sequence[int]
) -> list[Pair]:
    """The pairs of `match` as layers, by the mean square distances of their states."""
    shallow = torch.stack(
        [states[layer].detach().float() for layer in range(1, exit_layer + 1)]
    )  # [S, N, d]
    distances = torch.stack(
        [(shallow - states[layer].detach().float()).square().mean((1, 2)) for layer in teachers]
    )
    return [(student + 1, teachers[teacher]) for teacher, student in match(distances.cpu().numpy())]


def kept_layers(loss: LossName, exit_layer: int, layers: int) -> tuple[int, ...]:
    """The layers whose hidden states the loss looks at, ascending; the exit and the last layer always."""
    kept = {exit_layer, layers}
    if loss == "weighted-ce":
        kept.update(range(1, layers + 1))
    elif loss == "kd-dyn":
        kept.update(range(1, exit_layer + 1), teacher_layers(exit_layer, layers))
    return tuple(sorted(kept))
