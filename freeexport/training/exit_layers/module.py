"""An exit's own transformer layers in torch, made from their description: to train them, and to verify engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.training.exit_adapter import RMSNorm
from graphs.description import MLP, Activation, Attention, Description, Layer, Linear, Norm
from graphs.exit_head import with_exit

Read = Callable[[str], np.ndarray]
_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


class ExitLayers(nn.Module):
    """norm(layers(map(states))): what stands between the exit layer and the head. Its parameters have the names of
    graphs.exit_head, without "exit." in front.

    `read` gives the layers' weights by the names in `layers`; `weight` [d, d] is the map, `norm` [d].
    """

    def __init__(
        self, layers: Sequence[Layer], read: Read, weight: np.ndarray, norm: np.ndarray, epsilon: float
    ) -> None:
        super().__init__()
        self.map = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.map.weight = _parameter(weight)
        self.layers = nn.ModuleList(ExitLayer(layer, read) for layer in layers)
        self.norm = RMSNorm(torch.from_numpy(norm), epsilon)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """After the exit layer [B, n, d], padded on the right -> float32 [B, n, d], before the norm."""
        x: torch.Tensor = self.map(states.to(self.map.weight.dtype)).float()
        for layer in self.layers:
            x = layer(x)
        return x


def own_exit(checkpoint: Checkpoint, description: Description) -> ExitLayers | None:
    """The exit's own layers of a checkpoint, None where it has none."""
    decoder = with_exit(description, checkpoint).decoder
    if decoder.exit_map is None or decoder.exit_head is None:
        return None
    norm = decoder.exit_head.norm
    weights = checkpoint.read(decoder.exit_map.weight), checkpoint.read(norm.weight)
    return ExitLayers(decoder.exit_layers, checkpoint.read, *weights, norm.epsilon).eval()


class ExitLayer(nn.Module):
    """Causal self-attention and MLP, pre-norm, on a residual stream in float32."""

    def __init__(self, layer: Layer, read: Read) -> None:
        super().__init__()
        self.attention_norm = _norm(layer.attention_norm, read)
        self.attention = SelfAttention(layer.attention, read)
        self.mlp_norm = _norm(layer.mlp_norm, read)
        self.mlp = FeedForward(layer.mlp, read)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, n, d] -> [B, n, d]."""
        x = x + self.attention(self.attention_norm(x))
        mixed: torch.Tensor = x + self.mlp(self.mlp_norm(x))
        return mixed


class SelfAttention(nn.Module):
    """Of the sequence with itself, positions from 0."""

    def __init__(self, attention: Attention, read: Read) -> None:
        super().__init__()
        self.described = attention
        self.query, self.key = _linear(attention.query, read), _linear(attention.key, read)
        self.value, self.output = _linear(attention.value, read), _linear(attention.output, read)
        self.query_norm = _norm(attention.query_norm, read) if attention.query_norm else nn.Identity()
        self.key_norm = _norm(attention.key_norm, read) if attention.key_norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, n, d] -> [B, n, d]."""
        one = self.described
        query = self._turned(self.query_norm(_in_heads(self.query(x), one.heads)))
        key = self._turned(self.key_norm(_in_heads(self.key(x), one.kv_heads)))
        value = _in_heads(self.value(x), one.kv_heads)
        key, value = (part.repeat_interleave(one.heads // one.kv_heads, dim=1) for part in (key.to(value.dtype), value))
        mask = None if one.window is None else _window(x.shape[1], one.window).to(x.device)
        mixed = _mixed(query.to(value.dtype), key, value, mask, one.scale)
        attended: torch.Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return attended

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary positions of [B, heads, n, head_dim], in float32."""
        rotary = self.described.rotary
        if rotary is None:
            return x
        frequencies = torch.tensor(rotary.inverse_frequencies, dtype=torch.float32, device=x.device)
        angles = torch.arange(x.shape[2], device=x.device)[:, None] * frequencies
        cosine, sine = (part(angles).tile(2) * rotary.scale for part in (torch.cos, torch.sin))
        low, high = x.float().chunk(2, dim=-1)
        return torch.cat([low, high], -1) * cosine + torch.cat([-high, low], -1) * sine


def _mixed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention of [B, heads, n, head_dim], causal where there is no mask."""
    if query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scale)
    # The backward pass of torch's fused attention is four times as slow on a CPU, for sentences.
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


class FeedForward(nn.Module):
    def __init__(self, mlp: MLP, read: Read) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[mlp.activation]
        self.gate = None if mlp.gate is None else _linear(mlp.gate, read)
        self.up, self.down = _linear(mlp.up, read), _linear(mlp.down, read)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] -> [..., d]."""
        up = self.up(x)
        inner = self.activation(up) if self.gate is None else self.activation(self.gate(x)) * up
        out: torch.Tensor = self.down(inner)
        return out


def _in_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, n, heads * head_dim] -> [B, heads, n, head_dim]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _window(length: int, window: int) -> torch.Tensor:
    """bool [n, n]: which positions (columns) each one (row) sees."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return causal.triu(1 - window)


def _norm(norm: Norm, read: Read) -> RMSNorm:
    return RMSNorm(torch.from_numpy(read(norm.weight)), norm.epsilon)


def _linear(linear: Linear, read: Read) -> nn.Linear:
    weight = read(linear.weight)
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None)
    module.weight = _parameter(weight)
    if linear.bias is not None:
        module.bias = _parameter(read(linear.bias))
    return module


def _parameter(array: np.ndarray) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.array(array, np.float32)))
