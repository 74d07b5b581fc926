"""A model described as data: the structure of its layers and the names of their weights.

Families (`graphs/families/`) write descriptions and builders turn them into graphs. A weight is
named by its key in the checkpoint. Linear weights are [outputs, inputs], as PyTorch stores them.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Literal

from runtime.bundle.manifest import FEATURE_STATES, ExitInput

Activation = Literal["relu", "gelu", "gelu-tanh", "silu"]
# Activations by their names in config.json.
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
    """Linear layer: y = x W^T + b.

    Attributes:
        weight: Name of the weight [outputs, inputs].
        bias: Name of the bias [outputs]. Default: no bias. BART, GPT-2, Qwen 2 and Whisper have
            biases, except on Whisper's keys.
    """

    weight: str
    bias: str | None = None


@dataclass(frozen=True)
class Norm:
    """Normalization over the last axis.

    Attributes:
        weight: Name of the scale [d].
        epsilon: Added to the variance.
        kind: "rms" divides by the root mean square. "layer" subtracts the mean and divides by the
            standard deviation (BART, GPT-2, Whisper).
        bias: Name of the bias [d]. Default: no bias.
    """

    weight: str
    epsilon: float
    kind: Literal["rms", "layer"] = "rms"
    bias: str | None = None


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding on the two halves of a head (not interleaved).

    Attributes:
        inverse_frequencies: n frequencies in radians per position. They rotate the first 2 n values
            of each head: all of them, except in Phi.
        scale: Multiplies cosine and sine (YaRN's attention factor).
        long: Frequencies for caches with more than `short` positions (Phi's LongRoPE). Default:
            none.
        short: Most positions for which `inverse_frequencies` apply, if `long` is given.
    """

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0
    long: tuple[float, ...] = ()
    short: int = 0

    def at(self, capacity: int) -> Rotary:
        """Return the embedding with the frequencies for a cache of `capacity` positions."""
        chosen = self.long if self.long and capacity > self.short else self.inverse_frequencies
        return Rotary(chosen, self.scale)


@dataclass(frozen=True)
class Positions:
    """Absolute position embeddings for positions 0 to `count` - 1.

    Attributes:
        count: Number of positions.
        table: Name of the learned embeddings [offset + count, d]. If None, they are computed: the
            sines of position times each frequency, then the cosines, cut or padded with zeros to d
            (Marian, M2M100).
        offset: Row of `table` that holds position 0 (2 in BART).
        frequencies: Radians per position, used without a `table`.
    """

    count: int
    table: str | None = None
    offset: int = 0
    frequencies: tuple[float, ...] = ()


@dataclass(frozen=True)
class Embedding:
    """Token embedding: norm(scale * table[token] + position).

    Attributes:
        table: Name of the embedding matrix [vocab, d].
        scale: Multiplies the row (Gemma, Marian).
        positions: Absolute positions to add. Default: none.
        norm: Applied to the sum (BART). Default: none.
    """

    table: str
    scale: float = 1.0
    positions: Positions | None = None
    norm: Norm | None = None


@dataclass(frozen=True)
class Spectrogram:
    """Input layers of a speech encoder (Whisper).

    Two convolutions of width 3, each followed by a GELU, over a spectrogram [bins, 2 * count]. The
    second has stride 2. Positions are added to the result.

    Attributes:
        bins: Frequency bins of the spectrogram.
        convolutions: The two layers, with weights [d, inputs, 3].
        positions: Learned positions for the `count` outputs.
    """

    bins: int
    convolutions: tuple[Linear, Linear]
    positions: Positions


@dataclass(frozen=True)
class RelativeBias:
    """T5's relative attention bias by bucketed distance.

    Attributes:
        table: Name of the bias table [buckets, heads].
        buckets: Number of buckets.
        max_distance: Distance from which all keys share the last bucket.
        bidirectional: Distinguish keys before and after the query (encoders). Otherwise the bias is
            causal.
    """

    table: str
    buckets: int
    max_distance: int
    bidirectional: bool


@dataclass(frozen=True)
class Attention:
    """Scaled dot-product attention.

    `query` is [heads * head_dim, d], `key` and `value` are [kv_heads * head_dim, d]. Layers of a
    model may differ in `rotary` (Gemma 3, SmolLM3) and `window`, but not in heads.

    Attributes:
        scale: Multiplies the scores: 1 in T5, a configured multiplier in Granite.
        rotary: Rotary positions. Default: none.
        relative_bias: T5's relative bias. Default: none.
        query_norm: Norm of each head's query (Gemma 3, Qwen 3). Default: none.
        key_norm: Norm of each head's key (Gemma 3, Qwen 3). Default: none.
        window: Number of most recent positions that a query attends to, including its own (Gemma 2
            and 3, Mistral, Qwen, T5Gemma). Default: all.
        ahead: Number of later positions that a query of an encoder attends to, with `window`.
        softcap: Replaces each score by softcap * tanh(score / softcap) (Gemma 2,
            T5Gemma). Default: no cap.
        outputs_query: The queries of this cross-attention are an output of the engine (Whisper's
            alignment heads).
    """

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
    ahead: int = 0
    softcap: float | None = None
    outputs_query: bool = False


@dataclass(frozen=True)
class MLP:
    """Feed-forward block.

    Computes down(activation(up(x))), or down(activation(gate(x)) * up(x)) if there is a gate
    (Gemma, Llama and its variants, T5 1.1).

    Attributes:
        fp32: Keep `down` in float32 at every precision. T5's overflows in fp16.
    """

    activation: Activation
    up: Linear
    down: Linear
    gate: Linear | None = None
    fp32: bool = False


@dataclass(frozen=True)
class Layer:
    """One transformer layer: self-attention, optional cross-attention, and MLP, each residual.

    Attributes:
        cross: Cross-attention. Without a `cross_norm` it is no block of its own: the
            self-attention's queries attend to both kinds of keys in one softmax, and all weights
            are those of the self-attention (T5Gemma 2).
        order: "pre" normalizes the input of each block: x + block(norm(x)). "post" normalizes the
            sum: norm(x + block(x)) (BART, Marian).
        attention_out: Norm of the self-attention's output, before the sum (Gemma 2 and 3, T5Gemma).
            Default: none.
        cross_out: Norm of the cross-attention's output, before the sum (T5Gemma). Default: none.
        mlp_out: Norm of the MLP's output, before the sum (Gemma 2 and 3, T5Gemma). Default: none.
        embedding_norm: Norm of the token's embedding, which queries, keys and values read before
            the normed state, as 2 d inputs (EAGLE-3). Default: they read the state only.
    """

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: MLP
    cross_norm: Norm | None = None
    cross: Attention | None = None
    order: Literal["pre", "post"] = "pre"
    attention_out: Norm | None = None
    cross_out: Norm | None = None
    mlp_out: Norm | None = None
    embedding_norm: Norm | None = None

    @property
    def joined(self) -> bool:
        """True if self-attention and cross-attention are one."""
        return self.cross is not None and self.cross_norm is None


@dataclass(frozen=True)
class Head:
    """LM head: logits = scale * norm(hidden) W^T + bias.

    Attributes:
        norm: Norm of the hidden states. None for BART and Marian, which have none.
        weight: Name of the weight [vocab, d]. A tied head names the embedding's tensor.
        scale: Multiplies the normed states (Granite, tied T5).
        bias: Name of the bias, of vocab values in one or two axes: final_logits_bias of BART and
            its variants. Default: no bias.
        suppressed: Tokens that get the lowest logits (Marian's padding).
        softcap: Replaces each token's logit by softcap * tanh(logit / softcap) (Gemma 2). Default:
            no cap.
        tokens: Exit vocabulary, ascending: the rows of `weight` that the head computes. Default:
            all.
        other: One more class [1, d], trained with `tokens`, that stands for all other tokens. It
            never exits.
    """

    norm: Norm | None
    weight: str
    scale: float = 1.0
    bias: str | None = None
    suppressed: tuple[int, ...] = ()
    softcap: float | None = None
    tokens: tuple[int, ...] = ()
    other: Linear | None = None


@dataclass(frozen=True)
class EncoderStack:
    """Bidirectional layers over the prompt, with an optional final norm.

    Attributes:
        max_positions: Longest prompt. Default: that of the embedding's positions, or any.
    """

    embedding: Embedding | Spectrogram
    layers: tuple[Layer, ...]
    norm: Norm | None
    max_positions: int | None = None


@dataclass(frozen=True)
class ForeignEncoder:
    """An encoder without a description: its graph is exported from the model's own code.

    Attributes:
        block: The code expects prompts padded to a multiple of this number of tokens.
    """

    block: int = 1


@dataclass(frozen=True)
class Fusion:
    """Feature of an EAGLE-3 head: one linear map of three states of the deep decoder.

    Attributes:
        layers: Numbers of layers, ascending. The states are those after so many layers.
        linear: The map [d, 3 d].
    """

    layers: tuple[int, ...]
    linear: Linear


@dataclass(frozen=True)
class DecoderStack:
    """L causal layers with an LM head, and optionally a trained exit.

    Attributes:
        max_positions: Longest sequence. None if positions are relative.
        exit_head: Head of the shallow decoder, if it was trained separately. Default: `head`.
        exit_map: Linear map [d, exit_inputs * d] from the exit layer's state to the input of
            `exit_layers`.
        exit_layers: Layers of the exit, between the exit layer and its head.
        exit_inputs: Number of states that the map reads: 1 for the exit layer's, 2 with the final
            normed state of the previous position, 4 with two earlier ones of the deep layers too.
        exit_fusion: The exit is an EAGLE-3 head. Its residual stream begins with this feature of
            the previous position, or its own last state, and it has no map.
    """

    embedding: Embedding
    layers: tuple[Layer, ...]
    head: Head
    max_positions: int | None = None
    exit_head: Head | None = None
    exit_map: Linear | None = None
    exit_layers: tuple[Layer, ...] = ()
    exit_inputs: int = 1
    exit_fusion: Fusion | None = None

    @property
    def exit_tokens(self) -> tuple[int, ...]:
        """Exit vocabulary, ascending. Empty if the exit predicts all tokens."""
        return () if self.exit_head is None else self.exit_head.tokens


@dataclass(frozen=True)
class Description:
    """A whole model. Sizes are those of the decoder.

    Attributes:
        encoder: None for decoder-only families.
    """

    family: str
    vocab_size: int
    hidden_size: int
    decoder: DecoderStack
    encoder: EncoderStack | ForeignEncoder | None = None

    @property
    def exit_engine(self) -> bool:
        """True if the exit is an engine of its own, because it reads a feature."""
        return self.exit_input != "state"

    @property
    def exit_input(self) -> ExitInput:
        """Input of the exit's layers."""
        if self.decoder.exit_fusion is not None:
            return "eagle3"
        states = self.decoder.exit_inputs - 1
        return next(name for name, count in FEATURE_STATES.items() if count == states)

    @property
    def spectrogram(self) -> Spectrogram | None:
        """Input layers of a speech model. None if prompts are text."""
        embedding = getattr(self.encoder, "embedding", None)
        return embedding if isinstance(embedding, Spectrogram) else None

    @property
    def attention(self) -> Attention:
        """Self-attention of a decoder layer that has rotary positions, or of the first layer if
        none has.

        Heads and head size are the same in all layers.
        """
        attentions = [layer.attention for layer in self.decoder.layers]
        with_rotary = (attention for attention in attentions if attention.rotary)
        return next(with_rotary, attentions[0])

    def with_queries(self, layers: Container[int]) -> Description:
        """Return the description with the queries of these layers' cross-attention as outputs."""
        changed = tuple(
            replace(layer, cross=replace(layer.cross, outputs_query=True))
            if number in layers and layer.cross is not None
            else layer
            for number, layer in enumerate(self.decoder.layers)
        )
        return replace(self, decoder=replace(self.decoder, layers=changed))

    def at(self, capacity: int) -> Description:
        """Return the description with rotary frequencies for a cache of `capacity` positions."""

        def at_capacity(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
            return tuple(replace(layer, attention=chosen(layer.attention)) for layer in layers)

        def chosen(attention: Attention) -> Attention:
            rotary = attention.rotary and attention.rotary.at(capacity)
            return replace(attention, rotary=rotary)

        decoder = replace(
            self.decoder,
            layers=at_capacity(self.decoder.layers),
            exit_layers=at_capacity(self.decoder.exit_layers),
        )
        return replace(self, decoder=decoder)
