"""A model described as data: what each layer is made of, and which checkpoint tensors hold its weights.

Families (`graphs/families/`) write descriptions; builders turn them into graphs. A weight is named by its key in the
checkpoint. Linear weights are [outputs, inputs], as PyTorch stores them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    """y = x W^T + b. `weight` [outputs, inputs], `bias` [outputs] (BART, Whisper but for keys, GPT-2, Qwen 2)."""

    weight: str
    bias: str | None = None


@dataclass(frozen=True)
class Norm:
    """A norm over the last axis, scaled by `weight` [d]: by the root mean square (`rms`), or by the standard deviation
    after the mean is taken away (`layer`: BART, Whisper, GPT-2). `bias` [d] is added."""

    weight: str
    epsilon: float
    kind: Literal["rms", "layer"] = "rms"
    bias: str | None = None


@dataclass(frozen=True)
class Rotary:
    """Rotary positions on halves (not interleaved) of a head's first 2 n values, n those of `inverse_frequencies`,
    radians per position (Phi turns a part of a head, all others the whole). `scale` multiplies cosine and sine (YaRN's
    attention factor). Where a cache has more than `short` positions, `long` are the frequencies (Phi's longrope)."""

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0
    long: tuple[float, ...] = ()
    short: int = 0

    def at(self, capacity: int) -> Rotary:
        """With the frequencies of a cache of so many positions."""
        chosen = self.long if self.long and capacity > self.short else self.inverse_frequencies
        return Rotary(chosen, self.scale)


@dataclass(frozen=True)
class Positions:
    """Vectors by absolute position, from 0 to `count` - 1: the rows of `table` [offset + count, d] from `offset` on
    (BART's begin at 2), or without a table the sines of position times each of `frequencies`, then the cosines, cut or
    filled with zeros to d (Marian, M2M100)."""

    count: int
    table: str | None = None
    offset: int = 0
    frequencies: tuple[float, ...] = ()


@dataclass(frozen=True)
class Embedding:
    """norm(scale * row of `table` [vocab, d] + position). A scale is that of Marian and Gemma, the norm BART's."""

    table: str
    scale: float = 1.0
    positions: Positions | None = None
    norm: Norm | None = None


@dataclass(frozen=True)
class Spectrogram:
    """The input of an encoder of speech: two convolutions of width 3 over a spectrogram [bins, 2 * count], with a GELU
    after each, the second of stride 2, and positions (Whisper). Their weights are [d, inputs, 3]."""

    bins: int
    convolutions: tuple[Linear, Linear]
    positions: Positions


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
    the number of newest positions a query sees, itself included; None is all (Mistral, Qwen, Gemma 2 and 3). `scale` is
    1 in T5, a multiplier in Granite. Norms of each head's query and key are those of Qwen 3 and Gemma 3. With a
    `softcap` a score becomes softcap * tanh(score / softcap) (Gemma 2). Layers may differ in `rotary` (Gemma 3; none in
    some of SmolLM3's) and in `window`, not in heads."""

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
    softcap: float | None = None


@dataclass(frozen=True)
class MLP:
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) where there is a gate (Llama and its kin, Gemma, T5
    1.1; not BART, Whisper, GPT-2). `fp32` keeps `down` in float32 at every precision (T5's overflows in fp16)."""

    activation: Activation
    up: Linear
    down: Linear
    gate: Linear | None = None
    fp32: bool = False


@dataclass(frozen=True)
class Layer:
    """Residual blocks, in this order: self-attention, cross-attention (if any), MLP. The norm of each stands before it
    (`pre`: x + block(norm(x))), or behind the sum (`post`: norm(x + block(x)), as BART and Marian have it). Norms of
    what blocks give, `attention_out` and `mlp_out`, stand before the sum (Gemma 2 and 3 have both)."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: MLP
    cross_norm: Norm | None = None
    cross: Attention | None = None
    order: Literal["pre", "post"] = "pre"
    attention_out: Norm | None = None
    mlp_out: Norm | None = None


@dataclass(frozen=True)
class Adapter:
    """h + up(silu(down(norm(h)))), in fp32. `down` [rank, d], `up` [d, rank]."""

    norm: Norm
    down: Linear
    up: Linear


@dataclass(frozen=True)
class Head:
    """logits = scale * norm(adapter(hidden)) W^T + bias. `weight` [vocab, d]; a tied head names the embedding's tensor.
    A scale is T5's, where it is tied, and Granite's. `norm` None: there is none (BART, Marian). `bias`, of vocab values
    in one axis or two, is the final_logits_bias of BART and its kin. Tokens that are `suppressed` have the lowest
    logits (Marian's padding). Trained with an exit vocabulary, the head has the rows of `tokens`, ascending, and as one
    class more that of `other` [1, d], which stands for all remaining tokens and never exits. With a `softcap` the
    logits of tokens become softcap * tanh(logit / softcap) (Gemma 2)."""

    norm: Norm | None
    weight: str
    scale: float = 1.0
    bias: str | None = None
    suppressed: tuple[int, ...] = ()
    softcap: float | None = None
    adapter: Adapter | None = None
    tokens: tuple[int, ...] = ()
    other: Linear | None = None


@dataclass(frozen=True)
class Encoder:
    """Bidirectional layers over the prompt, ending in a norm, if any."""

    embedding: Embedding | Spectrogram
    layers: tuple[Layer, ...]
    norm: Norm | None


@dataclass(frozen=True)
class ForeignEncoder:
    """An encoder that no builder knows: its graph is exported from the model's own code. That code wants prompts padded
    to a multiple of `block` tokens."""

    block: int = 1


@dataclass(frozen=True)
class Decoder:
    """L causal layers with a head. `max_positions` None where positions are relative. `exit_head` is the shallow
    decoder's, where it was trained apart; None is `head`. Between the exit layer and it stand `exit_layers`, which read
    what `exit_map` [d, exit_inputs * d] makes of the exit layer's states: of one input, or of two, where it is joined
    by the final normed state of the position before."""

    embedding: Embedding
    layers: tuple[Layer, ...]
    head: Head
    max_positions: int | None = None
    exit_head: Head | None = None
    exit_map: Linear | None = None
    exit_layers: tuple[Layer, ...] = ()
    exit_inputs: int = 1

    @property
    def exit_tokens(self) -> tuple[int, ...]:
        """The tokens that the exit knows, ascending; empty for all."""
        return () if self.exit_head is None else self.exit_head.tokens


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
    def spectrogram(self) -> Spectrogram | None:
        """The input of the encoder of a model of speech; None where prompts are text."""
        embedding = getattr(self.encoder, "embedding", None)
        return embedding if isinstance(embedding, Spectrogram) else None

    @property
    def attention(self) -> Attention:
        """A decoder layer's self-attention, with rotary positions if any has: heads and head size are the same in all
        of them."""
        attentions = [layer.attention for layer in self.decoder.layers]
        return next((one for one in attentions if one.rotary), attentions[0])

    def at(self, capacity: int) -> Description:
        """With the rotary frequencies of a cache of so many positions."""

        def chosen(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
            found = [layer.attention for layer in layers]
            found = [replace(one, rotary=one.rotary and one.rotary.at(capacity)) for one in found]
            return tuple(replace(layer, attention=one) for layer, one in zip(layers, found, strict=True))

        decoder = self.decoder
        layers, own = chosen(decoder.layers), chosen(decoder.exit_layers)
        return replace(self, decoder=replace(decoder, layers=layers, exit_layers=own))
