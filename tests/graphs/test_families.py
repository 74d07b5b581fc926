from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, CASES, KIN, T5GEMMA2, VOCAB_SIZE, Case
from transformers import CONFIG_MAPPING

from freeexport.checkpoints.checkpoint import CheckpointError, open_checkpoint
from graphs.description import Description, EncoderStack
from graphs.errors import UnsupportedModelError
from graphs.families import describe, supported_architectures
from graphs.shapes import ROPE, SIZES, check_checkpoint
from graphs.weights import View


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
GPT2 = ("n_layer", "n_head", "n_embd", "n_positions", "layer_norm_epsilon")
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
        if isinstance(value, str) and View.of(value).tensor.endswith((".weight", "bias")):
            found.add(View.of(value).tensor)
        elif isinstance(value, tuple):
            for item in value:
                visit(item)
        elif hasattr(value, "__dataclass_fields__"):
            for name in value.__dataclass_fields__:
                visit(getattr(value, name))

    visit(description)
    return found


@pytest.mark.parametrize("case", [*CASES, *KIN, T5GEMMA2], ids=lambda case: case.name)
def test_description_names_every_weight_of_the_checkpoint(case: Case, checkpoint: Callable[[Case], Path]) -> None:
    source = open_checkpoint(str(checkpoint(case)))
    description = describe(source.config, source)
    unread = ("vision_tower", "multi_modal_projector", "eoi_embedding")  # of T5Gemma 2's images
    assert weights_of(description) == {name for name in source.names() if not any(part in name for part in unread)}
    assert len(description.decoder.layers) == case.layers
    assert description.vocab_size == VOCAB_SIZE
    config = json.loads((checkpoint(case) / "config.json").read_text())
    assert (description.decoder.head.weight == description.decoder.embedding.table) == config["tie_word_embeddings"]


@pytest.mark.parametrize("model_type", ["gptj", None])
def test_unsupported_architecture_or_option_is_refused_with_the_supported_ones(model_type: str | None) -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        describe({"model_type": model_type}, Names())
    assert repr(model_type) in str(refused.value)
    assert all(name in str(refused.value) for name in supported_architectures())
    assert "quick_gelu" in refusal(llama, hidden_act="quick_gelu")
    assert "longrope" in refusal(llama, rope_scaling={"rope_type": "longrope"})
    assert "gated-swiglu" in refusal(t5, feed_forward_proj="gated-swiglu")
    assert {"gemma", "gemma2", "gemma3_text", "gpt2", "granite", "llama", "phi3", "smollm3"} <= set(
        supported_architectures()
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "qwen3_moe", "num_experts": 8}, "'qwen3_moe' (num_experts: a mixture of experts)"),
        ({"model_type": "qwen3_moe", "num_experts": 8}, "the nearest is qwen3; supported"),
        ({**LLAMA, "model_type": "olmo", "rms_norm_eps": None}, "is llama (the configuration lacks rms_norm_eps)"),
        ({**T5, "model_type": "t5x"}, "t5 (the configuration has its fields); supported"),
        ({"model_type": "falcon"}, "'falcon' is not supported; supported are bart"),
        (
            {**LLAMA, "num_local_experts": 4},
            "'llama' (num_local_experts: a mixture of experts) is not supported",
        ),
        ({**LLAMA, "rope_scaling": {"rope_type": "proportional"}}, "rope scaling 'proportional'"),
        ({**LLAMA, "model_type": "phi3", "intermediate_size": 96, "partial_rotary_factor": 0.01}, "0 of 16 values"),
        ({**LLAMA, "model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers is [1]"),
        ({**LLAMA, "model_type": "gemma3_text", "head_dim": 16, "use_bidirectional_attention": True}, "bidirectional"),
        ({"model_type": "gpt2", **dict.fromkeys(GPT2, 1), "scale_attn_weights": False}, "scale_attn_weights False"),
    ],
)
def test_unsupported_configuration_is_refused_by_its_field(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        describe(config, Names())
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("qwen3_5", "linear_num_key_heads: linear attention"),
        ("qwen3_next", "linear_num_key_heads: linear attention"),
        ("lfm2", "conv_L_cache: convolutions"),
        ("lfm2_moe", "conv_L_cache: convolutions"),
        ("gemma3n", "altup_num_inputs: several residual streams, AltUp"),
        ("gemma4", "hidden_size_per_layer_input: embeddings for each layer"),
        ("gemma3", "vision_config: other inputs than text"),
        ("mamba2", "state_size: state-space layers"),
        ("jamba", "mamba_d_state: state-space layers"),
        ("granitemoehybrid", "mamba_d_state: state-space layers"),
        ("recurrent_gemma", "recurrent layers"),
        ("mixtral", "num_local_experts: a mixture of experts"),
        ("deepseek_v3", "n_routed_experts: a mixture of experts"),
        ("dbrx", "a mixture of experts"),
    ],
)
def test_unsupported_layers_are_refused_with_the_reason(model_type: str, reason: str, tmp_path: Path) -> None:
    """Each with the configuration that transformers writes."""
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError) as refused:
        open_checkpoint(str(tmp_path))
    assert f"architecture {model_type!r} ({reason}) is not supported" in str(refused.value)
    assert "\n" not in str(refused.value)


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
def test_sliding_window_of_each_layer_is_read(config: dict[str, Any], windows: list[int | None]) -> None:
    layers = llama(model_type="qwen2", head_dim=32, num_key_value_heads=2, **config).decoder.layers
    attention = layers[0].attention
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.scale) == (4, 2, 32, 32**-0.5)
    assert [layer.attention.window for layer in layers] == windows


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
def test_scale_of_a_t5_head_is_read(config: dict[str, Any], scale: float) -> None:
    description = t5(**config, num_decoder_layers=5)
    assert description.decoder.head.scale == scale
    assert isinstance(description.encoder, EncoderStack)
    assert (len(description.encoder.layers), len(description.decoder.layers)) == (3, 5)


def refusal(make: Callable[..., Description], **config: Any) -> str:
    with pytest.raises(UnsupportedModelError) as refused:
        make(**config)
    text = str(refused.value)
    assert "\n" not in text
    return text


# Of the fastest pair over 64 positions: with both bands there, it is 0 / 0.
TURNS = float(np.float32(64) / np.float32(2 * math.pi))
NUMBERS = (0, -1, 10**400, 1.5, True, "4", [4])


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_attention_heads", "head_dim", "hidden_size"])
@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: repr(value)[:8])
def test_out_of_range_size_is_refused_with_its_limit(name: str, value: Any) -> None:
    text = refusal(llama, **{name: value})
    assert f"{name} is {repr(value)[:30]}" in text
    assert f"from 1 to {SIZES[name]}" in text


def test_every_size_has_a_limit() -> None:
    for name, most in SIZES.items():
        assert f"{name} is {most + 1} in the configuration" in refusal(llama, **{name: most + 1})


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-5, 0, 2.0, 10**400, "1e-5", True])
def test_out_of_range_epsilon_is_refused(value: Any) -> None:
    assert "rms_norm_eps is" in refusal(llama, rms_norm_eps=value)
    assert "layer_norm_epsilon is" in refusal(t5, layer_norm_epsilon=value)


@pytest.mark.parametrize("value", [-5, math.nan, math.inf, 1e40, "10000"])
@pytest.mark.parametrize("where", [None, *ROPE])
def test_out_of_range_rotary_base_is_refused(value: Any, where: str | None) -> None:
    config = {"rope_theta": value}
    assert "rope_theta is" in refusal(llama, **({where: config} if where else config))


@pytest.mark.parametrize(
    ("rope", "part"),
    [
        ({"rope_type": "linear"}, "has no factor"),
        ({"rope_type": "linear", "factor": 0}, "factor is 0 in the configuration"),
        ({"rope_type": "yarn", "factor": math.nan}, "factor is nan in the configuration"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            "has no original_max_position_embeddings",
        ),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": TURNS,
                "high_freq_factor": TURNS,
                "original_max_position_embeddings": 64,
            },
            "gives the frequency nan",
        ),
        ({"rope_type": ["yarn"]}, "is not supported"),
        ("yarn", "must be an object"),
    ],
)
def test_unsupported_rope_scaling_is_refused(rope: Any, part: str) -> None:
    assert part in refusal(llama, rope_scaling=rope)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads is 4 in the configuration, not a multiple of num_key_value"),
        ({"num_attention_heads": 5}, "hidden_size is 64 in the configuration, not a multiple of num_attention_heads"),
        ({"head_dim": 15}, "cannot be rotated; both must be even"),
        ({"hidden_size": 32}, r"must be [vocabulary, 32]"),
        ({"layer_types": ["full_attention"]}, "must name 4 layers"),
        ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
    ],
)
def test_inconsistent_sizes_are_refused(config: dict[str, Any], part: str) -> None:
    assert part in refusal(llama, **config)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"intermediate_size": 1 << 20}, "down_proj.weight is [64, 96], the configuration says [64, 1048576]"),
        ({"vocab_size": 1 << 22}, "vocab_size is 4194304 in the configuration, the embedding has 288 rows"),
        ({"head_dim": 4096}, "q_proj.weight is [64, 64], the configuration says [16384, 64]"),
    ],
)
def test_weights_of_other_shapes_are_refused(
    changes: dict[str, int], part: str, checkpoint: Callable[[Case], Path]
) -> None:
    source = open_checkpoint(str(checkpoint(BY_NAME["llama-tied"])))
    check_checkpoint(source.config, describe(source.config, source), source)
    config = {**source.config, **changes}
    description = describe(config, source)
    with pytest.raises(UnsupportedModelError) as refused:
        check_checkpoint(config, description, source)
    assert part in str(refused.value)
    config = {**source.config, "num_hidden_layers": 1024, "layer_types": None}
    description = describe(config, source)
    with pytest.raises(CheckpointError, match="has no tensor model"):
        check_checkpoint(config, description, source)
