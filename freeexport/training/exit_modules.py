"""Torch modules for an exit's own parameters.

An exit has either a norm and a small adapter, or transformer layers built from a description. With
an exit vocabulary, one class stands for all other tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from freeexport.checkpoints.exit_file import EXIT_WEIGHTS
from graphs.description import MLP, Activation, Attention, Description, Layer, Linear, Norm
from graphs.dialects.base import buckets
from graphs.exit_head import EXIT as PREFIX
from graphs.exit_head import OTHER, OTHER_BIAS, UNIT_EPSILON, with_exit
from runtime.bundle.manifest import FEATURE_STATES, ExitInput

if TYPE_CHECKING:
    from pathlib import Path

    from freeexport.checkpoints.checkpoint import Checkpoint

# Number of passes after a sync pass for which an exit with a deep feature is trained. The first
# pass reads the feature. Each later one reads the exit's own output at the token before. The exit
# is evaluated at pass MEASURED.
PASSES = 4
MEASURED = 2
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


class Adapter(nn.Module):
    """Apply h + up(silu(down(norm(h)))). The identity until `up` is set or trained."""

    def __init__(self, width: int, rank: int, epsilon: float) -> None:
        super().__init__()
        self.norm = RMSNorm(torch.ones(width), epsilon)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.normal_(self.down.weight, std=width**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self.up(F.silu(self.down(self.norm(hidden))))
        return hidden + added


class Exit(nn.Module):
    """Base class of an exit's own parameters, named as in graphs.exit_head without "exit.".

    `norm(forward(states, encoded))` is the input of the head. `states` [..., d] are the states
    after the exit layer. `encoded` is None for a decoder-only model.

    Attributes:
        norm: The exit's final norm.
        reads: Input of the exit. Unless it is "state", `forward` also needs `features` [..., f], of
            `joined_feature`.
    """

    norm: nn.Module
    reads: ExitInput = "state"


def joined_feature(
    normed: torch.Tensor, earlier: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """Return the feature of each position, float32 [..., f].

    Args:
        normed: Final normed states of the deep decoder [..., d].
        earlier: Its states after `fused_layers`. They are scaled to a root mean square of 1 and
            precede the normed ones.
    """
    scaled = [F.rms_norm(one.float(), one.shape[-1:], eps=UNIT_EPSILON) for one in earlier or ()]
    return torch.cat([*scaled, normed.float()], dim=-1)


class AdaptedExit(Exit):
    """An exit with its own norm and optionally an adapter."""

    def __init__(self, norm: nn.Module, adapter: Adapter | None) -> None:
        super().__init__()
        self.norm = norm
        self.adapter = adapter

    def forward(
        self,
        states: torch.Tensor,
        encoded: Encoded | None = None,
        features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        adapted: torch.Tensor = (
            states.float() if self.adapter is None else self.adapter(states.float())
        )
        return adapted


class JoinedInputs(Exit):
    """Concatenate each state with the feature of the previous position, as [B, n, d + f].

    The feature before the first position is zero.
    """

    def __init__(self, reads: ExitInput = "feature") -> None:
        super().__init__()
        self.reads = reads

    def forward(
        self,
        states: torch.Tensor,
        encoded: Encoded | None = None,
        features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert features is not None
        return torch.cat([states, F.pad(features, (0, 0, 1, 0))[:, :-1].to(states.dtype)], dim=-1)


class ExitLayers(Exit):
    """An exit with its own linear map, transformer layers and norm.

    Args:
        layers: Descriptions of the layers.
        read: Returns a layer's weight by name.
        weight: Map applied before the layers: [d, d], or [d, d + f] after `JoinedInputs`.
        norm: The exit's final norm.
    """

    def __init__(
        self, layers: Sequence[Layer], read: Read, weight: np.ndarray, norm: nn.Module
    ) -> None:
        super().__init__()
        self.map = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.map.weight = _parameter(weight)
        self.layers = nn.ModuleList(ExitLayer(layer, read) for layer in layers)
        self.norm = norm
        self._join = JoinedInputs()

    @property
    def reads(self) -> ExitInput:  # type: ignore[override]
        states = self.map.in_features // self.map.out_features - 1
        return next(name for name, count in FEATURE_STATES.items() if count == states)

    def fuse(self) -> None:
        """Let an exit that reads a feature also read the earlier states of a fused one.

        Their columns of the map are zero, so predictions do not change.
        """
        state, feature = self.map.weight.detach().chunk(2, dim=1)
        weight = torch.cat([state, *[torch.zeros_like(state)] * 2, feature], dim=1)
        self.map = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.map.weight = nn.Parameter(weight)

    def forward(
        self,
        states: torch.Tensor,
        encoded: Encoded | None = None,
        features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map states [B, n, d], padded on the right, to float32 [B, n, d]."""
        return self.passes(states, encoded, features, 1)[0]

    def passes(
        self,
        states: torch.Tensor,
        encoded: Encoded | None,
        features: torch.Tensor | None,
        count: int,
    ) -> list[torch.Tensor]:
        """Return the outputs of the first `count` passes after a sync pass, at every position.

        The first pass reads the deep decoder's `features`. Each later pass reads the output of the
        pass before instead. At earlier positions it attends to the keys of earlier passes: the
        position just before has those of the previous pass, and so on back to the first.
        """
        dtype = self.map.weight.dtype
        found = list[torch.Tensor]()
        encoded = encoded and encoded._replace(states=encoded.states.to(dtype))
        before: list[list[KeyValue]] = [[] for _ in self.layers]
        for _ in range(count):
            x = states if features is None else self._join(states, features=features)
            x = self.map(x.to(dtype)).float()
            for layer, passed in zip(self.layers, before, strict=True):
                x = layer(x, encoded, passed)
            found.append(x)
            features = self.norm(x)
            if self.reads == "fused":
                features = joined_feature(features, [features] * 2)
        return found


class KnownTokens(nn.Module):
    """Head of an exit with a vocabulary.

    Class i is token `vocabulary[i]`, int64 [n], ascending. Class n stands for all other tokens,
    which never exit. The rows of known tokens are those of the model's head. Only `other` is an own
    parameter.
    """

    vocabulary: torch.Tensor

    def __init__(self, tokens: Sequence[int] | np.ndarray, width: int) -> None:
        super().__init__()
        self.register_buffer("vocabulary", torch.tensor(np.asarray(tokens, np.int64)))
        self.other = nn.Linear(width, 1)

    def __len__(self) -> int:
        return len(self.vocabulary)

    def logits(
        self,
        normed: torch.Tensor,
        rows: torch.Tensor,
        bias: torch.Tensor | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Compute the logits of all classes, [N, n + 1].

        Args:
            normed: Head inputs [N, d].
            rows: Weights [n, d] of the known tokens in the model's head.
            bias: Their biases [n], if any.
            softcap: Soft cap of their logits, if any. The last class is not capped.
        """
        # Computed separately, since the rows may be frozen. Gradients for all of them would cost as
        # much as the product.
        read = normed.to(rows.dtype)
        logits = F.linear(read, rows, None if bias is None else bias.to(rows.dtype))
        other = F.linear(read, self.other.weight.to(rows.dtype), self.other.bias.to(rows.dtype))
        return torch.cat([capped(logits, softcap), other], dim=-1)

    def classes(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the classes of token ids."""
        place = torch.searchsorted(self.vocabulary, tokens).clamp(max=len(self) - 1)
        return torch.where(self.vocabulary[place] == tokens, place, len(self))

    def folded(self, logits: torch.Tensor) -> torch.Tensor:
        """Reduce logits of all tokens [N, V] to logits of the classes [N, n + 1].

        The probabilities of the other tokens are added up.
        """
        tail = logits.index_fill(-1, self.vocabulary, float("-inf")).logsumexp(-1, keepdim=True)
        return torch.cat([logits[:, self.vocabulary], tail], dim=-1)

    def folded_chances(self, chances: torch.Tensor) -> torch.Tensor:
        """Reduce log probabilities of all tokens [N, V] to those of the classes [N, n + 1].

        Avoids a pass over the vocabulary: the last class gets the remaining probability, at least
        1e-6.
        """
        known = chances[:, self.vocabulary]
        rest = (1 - known.double().exp().sum(-1, keepdim=True)).clamp_min(1e-6)
        return torch.cat([known, rest.log().to(known.dtype)], dim=-1)


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Return softcap * tanh(logits / softcap), or the logits if `softcap` is None."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def trained_exit(
    checkpoint: Checkpoint, description: Description
) -> tuple[Exit | None, KnownTokens | None]:
    """Load a checkpoint's exit parameters.

    Returns its norm with an adapter or layers, None if it has none, and its vocabulary, None
    if it predicts all tokens.
    """
    decoder = with_exit(description, checkpoint).decoder
    own: Exit | None = None
    known: KnownTokens | None = None
    head = decoder.exit_head or decoder.head
    if head.tokens:
        known = KnownTokens(head.tokens, description.hidden_size).eval()
        known.other.weight, known.other.bias = (
            _parameter(checkpoint.read(name)) for name in (OTHER, OTHER_BIAS)
        )
    if decoder.exit_map is not None:
        weight = checkpoint.read(decoder.exit_map.weight)
        norm = norm_module(head.norm, checkpoint.read)
        own = ExitLayers(decoder.exit_layers, checkpoint.read, weight, norm).eval()
    elif head.norm is not description.decoder.head.norm or head.adapter is not None:
        adapter = None
        if head.adapter is not None:
            rank = checkpoint.shape(head.adapter.down.weight)[0]
            adapter = Adapter(description.hidden_size, rank, head.adapter.norm.epsilon)
        own = AdaptedExit(norm_module(head.norm, checkpoint.read), adapter).eval()
        own.load_state_dict(
            {name: torch.from_numpy(checkpoint.read(PREFIX + name)) for name in own.state_dict()}
        )
    return own, known


def write_exit(own: Exit | None, known: KnownTokens | None, directory: Path) -> None:
    """Write the parameters to exit.safetensors, if there are any."""
    tensors = {}
    for module in filter(None, (own, known)):
        for name, value in module.state_dict().items():
            dtype = torch.float32 if value.is_floating_point() else torch.int32
            tensors[f"{PREFIX}{name}"] = value.detach().to("cpu", dtype).contiguous()
    if tensors:
        save_file(tensors, directory / EXIT_WEIGHTS)


class ExitLayer(nn.Module):
    """One transformer layer on a float32 residual stream.

    Causal self-attention, cross-attention in an encoder-decoder model, and an MLP.
    """

    def __init__(self, layer: Layer, read: Read) -> None:
        super().__init__()
        self.order = layer.order
        self.attention_norm = norm_module(layer.attention_norm, read)
        self.attention = ExitAttention(layer.attention, read)
        self.cross_norm = None if layer.cross_norm is None else norm_module(layer.cross_norm, read)
        self.cross = None if layer.cross is None else ExitAttention(layer.cross, read)
        self.mlp_norm = norm_module(layer.mlp_norm, read)
        self.mlp = FeedForward(layer.mlp, read)
        self.attention_out = norm_module(layer.attention_out, read)
        self.mlp_out = norm_module(layer.mlp_out, read)

    def forward(
        self, x: torch.Tensor, encoded: Encoded | None, before: list[KeyValue]
    ) -> torch.Tensor:
        """Map [B, n, d] to [B, n, d]. See ExitAttention for `before`."""
        x = self._block(
            x,
            self.attention_norm,
            lambda read: self.attention_out(self.attention(read, None, before)),
        )
        if self.cross is not None and self.cross_norm is not None:
            cross = self.cross
            x = self._block(x, self.cross_norm, lambda read: cross(read, encoded))
        return self._block(x, self.mlp_norm, lambda read: self.mlp_out(self.mlp(read)))

    def _block(
        self, x: torch.Tensor, norm: nn.Module, block: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        mixed: torch.Tensor = x + block(norm(x)) if self.order == "pre" else norm(x + block(x))
        return mixed


class ExitAttention(nn.Module):
    """Causal self-attention with positions from 0, or attention over an encoder's states.

    `before` collects keys and values of successive passes over the same positions. Each call
    appends its own. Pass k (from 0) attends to the first pass, except at the newest k positions:
    its own position uses pass k, the one before pass k - 1, and so on.
    """

    def __init__(self, attention: Attention, read: Read) -> None:
        super().__init__()
        self.described = attention
        self.query = _linear(attention.query, read)
        self.key = _linear(attention.key, read)
        self.value = _linear(attention.value, read)
        self.output = _linear(attention.output, read)
        self.query_norm = norm_module(attention.query_norm, read)
        self.key_norm = norm_module(attention.key_norm, read)
        if (bias := attention.relative_bias) is not None:
            self.relative_bias = nn.Embedding(bias.buckets, attention.heads)
            self.relative_bias.weight = _parameter(read(bias.table))

    def forward(
        self, x: torch.Tensor, encoded: Encoded | None = None, before: list[KeyValue] | None = None
    ) -> torch.Tensor:
        """Map [B, n, d] to [B, n, d]."""
        length = x.shape[1]
        before = [] if before is None else before
        one = self.described
        source = x if encoded is None else encoded.states
        # [B, heads, n, head_dim]
        query = self._rotated(
            self.query_norm(self.query(x).unflatten(-1, (one.heads, -1)).transpose(1, 2))
        )
        key = self._rotated(
            self.key_norm(self.key(source).unflatten(-1, (one.kv_heads, -1)).transpose(1, 2))
        )
        value = self.value(source).unflatten(-1, (one.kv_heads, -1)).transpose(1, 2)
        key, value = (
            part.repeat_interleave(one.heads // one.kv_heads, dim=1)
            for part in (key.to(value.dtype), value)
        )
        query = query.to(value.dtype)
        causal = encoded is None and one.window is None and one.relative_bias is None
        mask = self._seen(x, encoded)
        bias = self._bias(x)
        before.append((key, value))
        key, value = before[0]
        newest = list(enumerate(before[:0:-1]))[:length]  # by distance from the query
        if query.is_cuda and not newest and one.softcap is None:
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
            shares = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
            mixed = shares @ value
            for back, (_, values) in newest:
                share = shares.diagonal(-back, -2, -1)[..., None]
                other = values - value
                mixed = mixed + F.pad(share * other[:, :, : length - back], (0, 0, back, 0))
        attended: torch.Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return attended

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
        self.gate = None if mlp.gate is None else _linear(mlp.gate, read)
        self.up = _linear(mlp.up, read)
        self.down = _linear(mlp.down, read)

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
    module.weight = _parameter(weight)
    if norm.bias is not None:
        module.bias = _parameter(read(norm.bias))
    return module


def _linear(linear: Linear, read: Read) -> nn.Linear:
    weight = read(linear.weight)
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None)
    module.weight = _parameter(weight)
    if linear.bias is not None:
        module.bias = _parameter(read(linear.bias))
    return module


def _parameter(array: np.ndarray) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.array(array, np.float32)))
