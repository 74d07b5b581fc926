"""Losses of a model with one exit.

They are cross-entropies of both exits, and distillation from deep to shallow layers. Distillation
is a sum over rows (predicted positions). Dividing by the rows of a whole step makes gradient
accumulation and multiple devices equivalent to one large batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from freeexport.training.training_options import BuiltInLoss, LayerLoss

Pair = tuple[int, int]  # student (a shallow layer) and teacher (any layer), counted from 1


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropies [N], in nats, of logits [N, V] and labels int64 [N]."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def by_depth(losses: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Return the mean of losses by layer, weighted by the layer's number.

    For two layers it is (S * a + L * b) / (S + L). Layer 0, the embedding, counts as 1.
    """
    total = sum(max(1, layer) for layer in losses)
    return torch.stack([loss * (max(1, layer) / total) for layer, loss in losses.items()]).sum(0)


def logit_distillation(deep: torch.Tensor, shallow: torch.Tensor) -> torch.Tensor:
    """Return KL(deep || shallow) of logits [N, V], summed over rows, in nats.

    No gradient reaches `deep`.
    """
    target = F.log_softmax(deep.detach().float(), dim=-1)
    return F.kl_div(
        F.log_softmax(shallow.float(), dim=-1), target, reduction="sum", log_target=True
    )


def best_distillation(deep: torch.Tensor, shallow: torch.Tensor) -> torch.Tensor:
    """Return KL(deep || shallow), summed over rows, in nats, from n tokens.

    Both arguments are log probabilities [N, n] of the deep prediction's best n tokens. All other
    tokens together count as one.
    """
    best = F.kl_div(shallow, deep, reduction="sum", log_target=True)
    rest, left = (1 - part.exp().sum(-1) for part in (deep, shallow))
    rest = rest.clamp_min(0)
    left = left.clamp_min(1e-6)
    return best + (torch.xlogy(rest, rest) - rest * left.log()).sum()


def hidden_distillation(states: Mapping[int, torch.Tensor], pairs: Sequence[Pair]) -> torch.Tensor:
    """Return the mean squared distance between the states of each pair.

    It is averaged over pairs and summed over rows. `states` maps layers to [N, d], after the final
    norm, since the residual stream grows with depth. No gradient reaches the teacher of a pair. A
    layer may be the teacher of one pair and the student of another.
    """
    terms = [
        (states[student].float() - states[teacher].detach().float()).square().mean(-1)
        for student, teacher in pairs
    ]
    return torch.stack(terms).mean(0).sum()


def teacher_layers(exit_layer: int, layers: int) -> tuple[int, ...]:
    """Return `exit_layer` evenly spaced layers out of `layers`, including the last.

    Example: 4, 8, ... 24 for 6 of 24.
    """
    return tuple(round(layers * number / exit_layer) for number in range(1, exit_layer + 1))


def match(distances: np.ndarray) -> list[tuple[int, int]]:
    """Match teachers to students by `distances` [teachers, students].

    From the deepest teacher down, each takes the nearest student strictly below the previous one,
    so no two share a student. Teachers without a remaining student are left out. The authors' code
    assigns these the lowest student again, which would then be pulled to several layers.

    Returns pairs (teacher, student).
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
    """Return the pairs of `match` as layers, by the mean squared distances of their states."""
    shallow = torch.stack(
        [states[layer].detach().float() for layer in range(1, exit_layer + 1)]
    )  # [S, N, d]
    distances = torch.stack(
        [(shallow - states[layer].detach().float()).square().mean((1, 2)) for layer in teachers]
    )
    return [(student + 1, teachers[teacher]) for teacher, student in match(distances.cpu().numpy())]


def kept_layers(loss: BuiltInLoss | LayerLoss, exit_layer: int, layers: int) -> tuple[int, ...]:
    """Return the layers whose hidden states the loss needs, ascending.

    The exit layer and the last layer are always included.
    """
    kept = {exit_layer, layers}
    if not isinstance(loss, str):
        kept.update(loss.layers(exit_layer, layers))
    elif loss == "kd-dyn":
        kept.update(range(1, exit_layer + 1), teacher_layers(exit_layer, layers))
    return tuple(sorted(kept))
