"""An exit's own parameters: a norm, and a small adapter between the exit layer and the head."""

from __future__ import annotations

import torch
from torch import nn


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + epsilon), in float32."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float().clone())
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon))


class Adapter(nn.Module):
    """h + up(silu(down(norm(h)))); nothing is added until `up` is set or trained."""

    def __init__(self, width: int, rank: int, epsilon: float) -> None:
        super().__init__()
        self.norm = RMSNorm(torch.ones(width), epsilon)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.normal_(self.down.weight, std=width**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self.up(nn.functional.silu(self.down(self.norm(hidden))))
        return hidden + added


class Exit(nn.Module):
    """`norm` begins as the final norm's `norm_weight` [d]; no adapter where `rank` is 0."""

    def __init__(self, norm_weight: torch.Tensor, epsilon: float, rank: int) -> None:
        super().__init__()
        self.adapter = Adapter(len(norm_weight), rank, epsilon) if rank else None
        self.norm = RMSNorm(norm_weight, epsilon)

    def adapted(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, d] -> [N, d]: what stands in for the last layer's hidden state."""
        return hidden if self.adapter is None else self.adapter(hidden)
