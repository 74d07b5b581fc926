from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CASES, VOCAB_SIZE, Case

from freeexport.checkpoint import open_checkpoint
from graphs.description import Description, Encoder
from graphs.errors import UnsupportedModelError
from graphs.families import describe, supported

BY_NAME = {case.name: case for case in CASES}


class Names:
    """Weights of which only names and shapes are known."""

    def __init__(self, *names: str) -> None:
        self.held = dict.fromkeys(("model.embed_tokens.weight", "shared.weight", *names), (VOCAB_SIZE, 64))

    def __contains__(self, name: str) -> bool:
        return name in self.held

    def shape(self, name: str) -> tuple[int, ...]:
        return self.held[name]

    def read(self, name: str) -> np.ndarray:
        raise AssertionError("a description reads no weights")


LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
T5 = {
    "model_type": "t5",
    "d_model": 64,
    "d_kv": 16,
    "num_heads": 4,
    "num_layers": 3,
    "relative_attention_num_buckets": 32,
    "layer_norm_epsilon": 1e-6,
}


def llama(*names: str, **config: Any) -> Description:
    return describe({**LLAMA, **config}, Names(*names))


def t5(*names: str, **config: Any) -> Description:
    return describe({**T5, **config}, Names(*names))


def weights_of(description: Description) -> set[str]:
    """Every checkpoint tensor that a description names."""
    found: set[str] = set()

    def visit(value: Any) -> None:
        if isinstance(value, str) and value.endswith((".weight", ".bias")):
            found.add(value)
        elif isinstance(value, tuple):
            for item in value:
                visit(item)
        elif hasattr(value, "__dataclass_fields__"):
            for name in value.__dataclass_fields__:
                visit(getattr(value, name))

    visit(description)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_description_names_every_weight_of_the_checkpoint(case: Case, checkpoint: Callable[[Case], Path]) -> None:
    source = open_checkpoint(str(checkpoint(case)))
    description = describe(source.config, source)
    assert weights_of(description) == set(source.names())
    assert len(description.decoder.layers) == case.layers
    assert description.vocab_size == VOCAB_SIZE
    config = json.loads((checkpoint(case) / "config.json").read_text())
    assert (description.decoder.head.weight == description.decoder.embedding) == config["tie_word_embeddings"]


@pytest.mark.parametrize("model_type", ["gpt2", "mamba", None])
def test_another_architecture_is_refused_with_those_supported(model_type: str | None) -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        describe({"model_type": model_type}, Names())
    assert repr(model_type) in str(refused.value)
    assert all(name in str(refused.value) for name in supported())
    assert supported() == ["llama", "longt5", "mistral", "mt5", "qwen2", "qwen3", "t5", "umt5"]


@pytest.mark.parametrize("refused", [{"hidden_act": "quick_gelu"}, {"rope_scaling": {"rope_type": "longrope"}}])
def test_an_unknown_option_of_a_llama_is_refused_by_name(refused: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"quick_gelu|longrope"):
        llama(**refused)


@pytest.mark.parametrize("projection", ["swiglu", "gated-swiglu"])
def test_an_unknown_mlp_of_a_t5_is_refused_by_name(projection: str) -> None:
    with pytest.raises(UnsupportedModelError, match=projection):
        t5(feed_forward_proj=projection)


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({}, [None] * 4),
        ({"sliding_window": 7}, [7] * 4),
        ({"sliding_window": None}, [None] * 4),
        ({"sliding_window": 7, "use_sliding_window": False}, [None] * 4),
        ({"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 3}, [None, None, None, 7]),
        ({"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"] * 2}, [7, None, 7, None]),
    ],
)
def test_the_sliding_window_of_each_layer(config: dict[str, Any], windows: list[int | None]) -> None:
    layers = llama(model_type="qwen2", **config).decoder.layers
    assert [layer.attention.window for layer in layers] == windows


def test_sizes_that_a_llama_configuration_leaves_out_are_derived() -> None:
    attention = llama().attention
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (4, 4, 16)
    attention = llama(head_dim=32, num_key_value_heads=2).attention
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.scale) == (4, 2, 32, 32**-0.5)


@pytest.mark.parametrize("names", [(), ("lm_head.weight",)])
def test_a_llama_is_tied_where_it_says_so(names: tuple[str, ...]) -> None:
    assert llama(*names).decoder.head.weight == "model.embed_tokens.weight"
    assert llama(*names, tie_word_embeddings=False).decoder.head.weight == "lm_head.weight"


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"tie_word_embeddings": True}, 0.125),
        ({}, 0.125),
        ({"tie_word_embeddings": False}, 1.0),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, 1.0),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, 0.125),
        ({"tie_word_embeddings": True, "model_type": "mt5"}, 1.0),
    ],
)
def test_the_scale_of_a_t5_head(config: dict[str, Any], scale: float) -> None:
    assert t5(**config).decoder.head.scale == scale


def test_a_t5_decoder_may_be_deeper_than_its_encoder() -> None:
    description = t5(num_decoder_layers=5)
    assert isinstance(description.encoder, Encoder)
    assert (len(description.encoder.layers), len(description.decoder.layers)) == (3, 5)


@pytest.mark.parametrize(("model_type", "tables"), [("t5", 1), ("umt5", 3)])
def test_t5_has_one_bias_table_a_stack_and_umt5_one_a_layer(model_type: str, tables: int) -> None:
    description = t5(model_type=model_type)
    found = {
        layer.attention.relative_bias.table for layer in description.decoder.layers if layer.attention.relative_bias
    }
    assert len(found) == tables
