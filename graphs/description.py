"""A model described as data: what each layer is made of, and which checkpoint tensors hold its weights.

Families (`graphs/families/`) write descriptions; builders turn them into graphs. A weight is named by its key in the
checkpoint. Linear weights are [outputs, inputs], as PyTorch stores them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["relu", "gelu", "gelu-tanh", "silu"]
# By their names in config.json.
ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b. `weight` [outputs, inputs], `bias` [outputs]."""

    weight: str
    bias: str | None = None


@dataclass(frozen=True)
class Norm:
    """RMS norm over the last axis, scaled by `weight` [d]; no mean, no bias."""

    weight: str
    epsilon: float


@dataclass(frozen=True)
class Rotary:
    """Rotary positions on halves (not interleaved). `inverse_frequencies` [head_dim / 2], radians per position;
    `scale` multiplies cosine and sine (YaRN's attention factor)."""

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class RelativeBias:
    """T5's bias by bucketed distance; `table` [buckets, heads]. Causal unless `bidirectional`."""

    table: str
    buckets: int
    max_distance: int
    bidirectional: bool


@dataclass(frozen=True)
class Attention:
    """Scaled dot-product attention: query [heads * head_dim, d], key and value [kv_heads * head_dim, d]. `window` is
    the number of newest positions a query sees, itself included; None is all."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    rotary: Rotary | None = None
    relative_bias: RelativeBias | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    window: int | None = None


@dataclass(frozen=True)
class MLP:
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) where there is a gate. `fp32` keeps `down` in
    float32 at every precision (T5's overflows in fp16)."""

    activation: Activation
    up: Linear
    down: Linear
    gate: Linear | None = None
    fp32: bool = False


@dataclass(frozen=True)
class Layer:
    """Pre-norm residual blocks, in this order: self-attention, cross-attention (if any), MLP."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: MLP
    cross_norm: Norm | None = None
    cross: Attention | None = None


@dataclass(frozen=True)
class Adapter:
    """h + up(silu(down(norm(h)))), in fp32. `down` [rank, d], `up` [d, rank]."""

    norm: Norm
    down: Linear
    up: Linear


@dataclass(frozen=True)
class Head:
    """logits = scale * norm(adapter(hidden)) W^T. `weight` [vocab, d]; a tied head names the embedding's tensor.
    Trained with an exit vocabulary, the head has the rows of `tokens`, ascending, and as one class more that of `other`
    [1, d], which stands for all remaining tokens and never exits."""

    norm: Norm
    weight: str
    scale: float = 1.0
    adapter: Adapter | None = None
    tokens: tuple[int, ...] = ()
    other: Linear | None = None


@dataclass(frozen=True)
class Encoder:
    """Bidirectional layers over the prompt, ending in a norm. `embedding` [vocab, d]."""

    embedding: str
    layers: tuple[Layer, ...]
    norm: Norm


@dataclass(frozen=True)
class ForeignEncoder:
    """An encoder that no builder knows: its graph is exported from the model's own code. That code wants prompts padded
    to a multiple of `block` tokens."""

    block: int = 1


@dataclass(frozen=True)
class Decoder:
    """L causal layers with a head. `embedding` [vocab, d]; `max_positions` None where positions are relative.
    `exit_head` is the shallow decoder's, where it was trained apart; None is `head`. Between the exit layer and it
    stand `exit_layers`, which read what `exit_map` [d, exit_inputs * d] makes of the exit layer's states: of one input,
    or of two, where it is joined by the final normed state of the position before."""

    embedding: str
    layers: tuple[Layer, ...]
    head: Head
    max_positions: int | None = None
    exit_head: Head | None = None
    exit_map: Linear | None = None
    exit_layers: tuple[Layer, ...] = ()
    exit_inputs: int = 1


@dataclass(frozen=True)
class Description:
    """A whole model. `encoder` is None for decoder-only families; sizes are those of the decoder."""

    family: str
    vocab_size: int
    hidden_size: int
    decoder: Decoder
    encoder: Encoder | ForeignEncoder | None = None

    @property
    def exit_engine(self) -> bool:
        """Whether the exit is an engine of its own: it reads a feature."""
        return self.decoder.exit_inputs > 1

    @property
    def attention(self) -> Attention:
        """Any decoder layer's self-attention: heads and head size are the same in all of them."""
        return self.decoder.layers[0].attention
