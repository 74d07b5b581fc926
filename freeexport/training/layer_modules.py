"""Torch modules for one transformer layer of an exit, built from a description."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from graphs.description import MLP, Activation, Attention, Layer, Linear, Norm
from graphs.dialects.base import buckets

Read = Callable[[str], np.ndarray]
KeyValue = tuple[torch.Tensor, torch.Tensor]  # [B, heads, n, head_dim]
_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


class Encoded(NamedTuple):
    """Encoder output for cross-attention.

    Attributes:
        states: [B, E, d].
        mask: bool [B, E], True at valid positions.
    """

    states: torch.Tensor
    mask: torch.Tensor


class RMSNorm(nn.Module):
    """Apply weight * x / sqrt(mean(x^2) + epsilon) in float32."""

    def __init__(self, weight: torch.Tensor | np.ndarray, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(weight).detach().float().clone())
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon))


class LayerNorm(nn.LayerNorm):
    """Apply torch's layer norm in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float())


class ExitLayer(nn.Module):
    """One transformer layer on a float32 residual stream.

    Causal self-attention, cross-attention in an encoder-decoder model, and an MLP.
    """

    def __init__(self, layer: Layer, read: Read) -> None:
        super().__init__()
        self.order = layer.order
        self.attention_norm = norm_module(layer.attention_norm, read)
        self.embedding_norm = norm_module(layer.embedding_norm, read)
        self.attention = ExitAttention(layer.attention, read, layer.joined)
        self.cross_norm = None if layer.cross_norm is None else norm_module(layer.cross_norm, read)
        separate = layer.cross is not None and not layer.joined
        self.cross = ExitAttention(layer.cross, read) if layer.cross and separate else None
        self.mlp_norm = norm_module(layer.mlp_norm, read)
        self.mlp = FeedForward(layer.mlp, read)
        self.attention_out = norm_module(layer.attention_out, read)
        self.cross_out = norm_module(layer.cross_out, read)
        self.mlp_out = norm_module(layer.mlp_out, read)

    def forward(
        self,
        x: torch.Tensor,
        encoded: Encoded | None,
        before: list[KeyValue],
        embedded: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map [B, n, d] to [B, n, d]. See ExitAttention for `before`.

        `embedded` [B, n, d] are the tokens' embeddings, for a layer with an `embedding_norm`.
        """
        joined = encoded if self.attention.joined else None

        def attended(read: torch.Tensor) -> torch.Tensor:
            if embedded is not None:
                read = torch.cat([self.embedding_norm(embedded), read], dim=-1)
            found: torch.Tensor = self.attention_out(self.attention(read, joined, before))
            return found

        x = self._block(x, self.attention_norm, attended)
        if self.cross is not None and self.cross_norm is not None:
            cross = self.cross
            x = self._block(x, self.cross_norm, lambda read: self.cross_out(cross(read, encoded)))
        return self._block(x, self.mlp_norm, lambda read: self.mlp_out(self.mlp(read)))

    def _block(
        self, x: torch.Tensor, norm: nn.Module, block: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        mixed: torch.Tensor = x + block(norm(x)) if self.order == "pre" else norm(x + block(x))
        return mixed


class ExitAttention(nn.Module):
    """Causal self-attention with positions from 0, or attention over an encoder's states.

    If it is `joined`, it attends to both in one softmax.

    `before` collects keys and values of successive passes over the same positions. Each call
    appends its own. Pass k (from 0) attends to the first pass, except at the newest k positions:
    its own position uses pass k, the one before pass k - 1, and so on.
    """

    def __init__(self, attention: Attention, read: Read, joined: bool = False) -> None:
        super().__init__()
        self.described = attention
        self.joined = joined
        self.query = linear_module(attention.query, read)
        self.key = linear_module(attention.key, read)
        self.value = linear_module(attention.value, read)
        self.output = linear_module(attention.output, read)
        self.query_norm = norm_module(attention.query_norm, read)
        self.key_norm = norm_module(attention.key_norm, read)
        if (bias := attention.relative_bias) is not None:
            self.relative_bias = nn.Embedding(bias.buckets, attention.heads)
            self.relative_bias.weight = parameter(read(bias.table))

    def forward(
        self, x: torch.Tensor, encoded: Encoded | None = None, before: list[KeyValue] | None = None
    ) -> torch.Tensor:
        """Map [B, n, d] to [B, n, d]."""
        length = x.shape[1]
        before = [] if before is None else before
        one = self.described
        prompt = encoded if self.joined else None
        encoded = None if self.joined else encoded
        source = x if encoded is None else encoded.states
        # [B, heads, n, head_dim]
        query = self._rotated(
            self.query_norm(self.query(x).unflatten(-1, (one.heads, -1)).transpose(1, 2))
        )
        key, value = self._keys_and_values(source, rotated=True)
        query = query.to(value.dtype)
        causal = encoded is None and one.window is None and one.relative_bias is None
        mask = self._seen(x, encoded)
        bias = self._bias(x)
        before.append((key, value))
        key, value = before[0]
        newest = list(enumerate(before[:0:-1]))[:length]  # by distance from the query
        if query.is_cuda and not newest and one.softcap is None and prompt is None:
            given = mask if bias is None else bias.masked_fill(~mask, float("-inf")).to(value.dtype)
            mixed = F.scaled_dot_product_attention(
                query, key, value, None if causal else given, is_causal=causal, scale=one.scale
            )
        else:
            # On a CPU, the backward pass of torch's fused attention takes four times as long on
            # short sequences.
            scores = query @ key.transpose(-1, -2)
            for back, (keys, _) in newest:
                own = (query[:, :, back:] * keys[:, :, : length - back]).sum(-1)
                scores = scores.diagonal_scatter(own.to(scores.dtype), -back, -2, -1)
            scores = capped(scores * one.scale, one.softcap)
            scores = (scores if bias is None else scores + bias).masked_fill(~mask, float("-inf"))
            if prompt is not None:
                keys, values = self._keys_and_values(prompt.states, rotated=False)
                far = capped(query @ keys.transpose(-1, -2) * one.scale, one.softcap)
                far = far.masked_fill(~prompt.mask[:, None, None], float("-inf"))
                scores = torch.cat([scores, far], -1)
            shares = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
            if prompt is None:
                mixed = shares @ value
            else:
                shares, far = shares.split([length, shares.shape[-1] - length], -1)
                mixed = shares @ value + far @ values
            for back, (_, values) in newest:
                share = shares.diagonal(-back, -2, -1)[..., None]
                other = values - value
                mixed = mixed + F.pad(share * other[:, :, : length - back], (0, 0, back, 0))
        attended: torch.Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return attended

    def _keys_and_values(self, source: torch.Tensor, rotated: bool) -> KeyValue:
        """Map [B, n, d] to keys and values of all heads, with rotary positions if `rotated`."""
        one = self.described
        key = self.key_norm(self.key(source).unflatten(-1, (one.kv_heads, -1)).transpose(1, 2))
        value = self.value(source).unflatten(-1, (one.kv_heads, -1)).transpose(1, 2)
        key = (self._rotated(key) if rotated else key).to(value.dtype)
        groups = one.heads // one.kv_heads
        return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)

    def _seen(self, x: torch.Tensor, encoded: Encoded | None) -> torch.Tensor:
        """Return the mask of visible keys: bool [n, n], or [B, 1, 1, E] for an encoder."""
        if encoded is not None:
            return encoded.mask[:, None, None]
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        return seen if self.described.window is None else seen.triu(1 - self.described.window)

    def _bias(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return the relative position bias [1, heads, n, n], correct where a key is visible."""
        bias = self.described.relative_bias
        if bias is None:
            return None
        steps = torch.arange(x.shape[1], device=x.device)
        by_distance = self.relative_bias(
            torch.from_numpy(buckets(-np.arange(x.shape[1]), bias)).to(x.device)
        )
        biases: torch.Tensor = by_distance[(steps[:, None] - steps).clamp(min=0)].permute(2, 0, 1)[
            None
        ]
        return biases

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        """Apply rotary positions to [B, heads, n, head_dim] in float32."""
        if self.described.rotary is None:
            return x
        rotary = self.described.rotary.at(x.shape[2])
        frequencies = torch.tensor(rotary.inverse_frequencies, dtype=torch.float32, device=x.device)
        angles = torch.arange(x.shape[2], device=x.device)[:, None] * frequencies
        cosine, sine = (part(angles).tile(2) * rotary.scale for part in (torch.cos, torch.sin))
        pairs = len(frequencies)
        low, high, rest = x.float().tensor_split([pairs, 2 * pairs], dim=-1)
        return torch.cat(
            [torch.cat([low, high], -1) * cosine + torch.cat([-high, low], -1) * sine, rest], -1
        )


class FeedForward(nn.Module):
    def __init__(self, mlp: MLP, read: Read) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[mlp.activation]
        self.gate = None if mlp.gate is None else linear_module(mlp.gate, read)
        self.up = linear_module(mlp.up, read)
        self.down = linear_module(mlp.down, read)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., d] to [..., d]."""
        up = self.up(x)
        inner = self.activation(up) if self.gate is None else self.activation(self.gate(x)) * up
        out: torch.Tensor = self.down(inner)
        return out


def norm_module(norm: Norm | None, read: Read) -> nn.Module:
    """Build a module from a described norm, with a copy of its weights."""
    if norm is None:
        return nn.Identity()
    weight = read(norm.weight)
    if norm.kind == "rms":
        return RMSNorm(weight, norm.epsilon)
    module = LayerNorm(len(weight), norm.epsilon, bias=norm.bias is not None)
    module.weight = parameter(weight)
    if norm.bias is not None:
        module.bias = parameter(read(norm.bias))
    return module


def linear_module(linear: Linear, read: Read) -> nn.Linear:
    """Build a module from a described linear layer, with a copy of its weights."""
    weight = read(linear.weight)
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None)
    module.weight = parameter(weight)
    if linear.bias is not None:
        module.bias = parameter(read(linear.bias))
    return module


def parameter(array: np.ndarray) -> nn.Parameter:
    """Return a float32 parameter with a copy of `array`."""
    return nn.Parameter(torch.from_numpy(np.array(array, np.float32)))


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Return softcap * tanh(logits / softcap), or the logits if `softcap` is None."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
