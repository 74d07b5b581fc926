"""EAGLE-3 heads in the published layout (Li et al., arXiv 2503.01840) as exits of a model.

A head is one transformer layer with a head of its own. At each position it reads the embedding of
the token, and the feature of the previous position: a linear map of three states of the deep
decoder. Both are normed and joined for the attention, and the residual stream begins with the
feature. After a drafted token, its own last state before the norm replaces the feature. The first
token of a sequence has no feature, so the head never sees it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from graphs.description import MLP, Description, Fusion, Head, Layer, Linear
from graphs.errors import GraphError
from graphs.exit_head import EXIT, check_tokens
from graphs.families.llama import attention, linear, rms_norm
from graphs.shapes import activation_of
from graphs.weights import Weights

# Names of the tensors: the published ones after "exit.".
FUSION = f"{EXIT}fc"
LAYER = f"{EXIT}midlayer"
HEAD = f"{EXIT}lm_head.weight"  # [n, d]
NORM = f"{EXIT}norm"
OFFSETS = f"{EXIT}d2t"  # [n]: row i of the head is token i + offset
KNOWN = f"{EXIT}t2d"  # [V]: is the token one of these?
TAPS = "eagle_aux_hidden_state_layer_ids"


def with_eagle_head(
    description: Description, weights: Weights, config: Mapping[str, Any]
) -> Description:
    """Return the description with an EAGLE-3 head as its exit.

    Args:
        description: The model.
        weights: Weights of the model and the head.
        config: Configuration of the head, of model type "llama".

    Raises:
        GraphError: If the states that the head reads, or its tokens, do not fit the model.
        UnsupportedModelError: If a value of the configuration is not supported.
    """
    decoder = description.decoder
    own = f"{LAYER}.self_attn"
    layer = Layer(
        attention_norm=rms_norm(config, f"{LAYER}.hidden_norm"),
        attention=attention(config, weights, 0, own),
        mlp_norm=rms_norm(config, f"{LAYER}.post_attention_layernorm"),
        mlp=MLP(
            activation_of(config, "hidden_act", "silu"),
            up=linear(weights, f"{LAYER}.mlp.up_proj"),
            down=linear(weights, f"{LAYER}.mlp.down_proj"),
            gate=linear(weights, f"{LAYER}.mlp.gate_proj"),
        ),
        embedding_norm=rms_norm(config, f"{LAYER}.input_layernorm"),
    )
    tokens = eagle_tokens(weights, description.vocab_size)
    fusion = Fusion(tapped_layers(config, len(decoder.layers)), Linear(f"{FUSION}.weight"))
    decoder = replace(
        decoder,
        exit_head=Head(rms_norm(config, NORM), HEAD, tokens=tokens),
        exit_layers=(layer,),
        exit_inputs=2,
        exit_fusion=fusion,
    )
    return replace(description, decoder=decoder)


def tapped_layers(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Return the numbers of layers after which a head reads the deep decoder's states.

    The default is 2, L // 2 and L - 3 of L layers. A configuration may name others: at its top
    level as vLLM counts them, or in `eagle_config` the layers whose outputs they are, from 0.

    Raises:
        GraphError: If they are not three different layers before the last.
    """
    found: Any = (2, layers // 2, layers - 3)
    nested = config.get("eagle_config")
    if config.get(TAPS) is not None:
        found = config[TAPS]
    elif isinstance(nested, Mapping) and nested.get(TAPS) is not None:
        found = nested[TAPS]
        if isinstance(found, list):
            found = [number + 1 if type(number) is int else number for number in found]
    numbers = list(found) if isinstance(found, (list, tuple)) else []
    fits = len(numbers) == 3 and all(type(one) is int and 0 < one < layers for one in numbers)
    if not fits or any(low >= high for low, high in pairwise(numbers)):
        raise GraphError(
            f"it reads the states after layers {str(found)[:80]}, which must be three in ascending "
            f"order, from 1 to {layers - 1}"
        )
    return tuple(numbers)


def eagle_tokens(weights: Weights, vocabulary: int) -> tuple[int, ...]:
    """Return the tokens of the rows of a head, ascending. Empty if it predicts all tokens.

    Raises:
        GraphError: If they are not tokens of a model with `vocabulary` tokens.
    """
    rows = weights.shape(HEAD)[0]
    if OFFSETS not in weights:
        if rows != vocabulary:
            raise GraphError(
                f"its lm_head has {rows} rows and no d2t, and the model has {vocabulary} tokens"
            )
        return ()
    offsets = weights.read(OFFSETS)
    if offsets.shape != (rows,):
        raise GraphError(f"its d2t is {list(offsets.shape)}, and its lm_head has {rows} rows")
    targets = np.arange(rows) + offsets.astype(np.float64)
    outside = targets[(targets < 0) | (targets >= vocabulary)]
    if outside.size:
        raise GraphError(
            f"its d2t names token {outside[0]:.0f}, and the model has tokens 0 to {vocabulary - 1}"
        )
    tokens = tuple(map(int, targets))
    check_tokens(tokens, vocabulary)
    if KNOWN in weights:
        known = weights.read(KNOWN)
        if known.shape != (vocabulary,) or not np.array_equal(np.flatnonzero(known), tokens):
            raise GraphError("its t2d marks other tokens than its d2t names")
    return () if rows == vocabulary else tokens
