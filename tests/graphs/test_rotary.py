from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from graphs.errors import UnsupportedModelError
from graphs.families.rotary import rotary

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
SCALINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3,
    "llama3-short": {**LLAMA3, "original_max_position_embeddings": 64, "factor": 32.0},
    "yarn": YARN,
    "yarn-betas": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0},
    "yarn-not-truncated": {**YARN, "truncate": False},
    "yarn-attention-factor": {**YARN, "attention_factor": 1.25},
    "yarn-mscales": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.5},
}


@pytest.mark.parametrize(("head_dim", "theta"), [(16, 5e5), (64, 1e4), (80, 1e4), (128, 5e5)])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_frequencies_and_scale_match_transformers(scaling: dict[str, Any] | None, theta: float, head_dim: int) -> None:
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=2048,
        rope_theta=theta,
        rope_scaling=dict(scaling) if scaling else None,
    )
    theirs = LlamaRotaryEmbedding(config)
    ours = rotary(config.to_dict(), head_dim)
    np.testing.assert_allclose(ours.inverse_frequencies, theirs.inv_freq.numpy(), rtol=2e-6)
    assert ours.scale == pytest.approx(theirs.attention_scaling)
    angles = torch.outer(torch.arange(2048).float(), torch.tensor(ours.inverse_frequencies))
    cos, _ = theirs(torch.zeros(1), torch.arange(2048)[None])
    np.testing.assert_allclose(angles.cos().numpy() * ours.scale, cos[0, :, : head_dim // 2].numpy(), atol=2e-3)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_configuration_keys_of_older_checkpoints_are_equivalent(scaling: dict[str, Any] | None) -> None:
    new = {"max_position_embeddings": 2048, "rope_parameters": {**(scaling or {}), "rope_theta": 5e5}}
    old: dict[str, Any] = {"max_position_embeddings": 2048, "rope_theta": 5e5, "rope_scaling": scaling}
    assert rotary(old, 64) == rotary(new, 64)
    if scaling:
        named = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
        assert rotary({**old, "rope_scaling": named}, 64) == rotary(new, 64)


@pytest.mark.parametrize("where", [{"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}])
def test_partial_rotary_positions_are_refused_for_families_without_support(where: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="partial_rotary_factor"):
        rotary(where, 64)
    whole, half = rotary({}, 32), rotary(where, 64, partial=True)
    assert half == whole


def test_longrope_has_frequencies_for_short_and_long_contexts() -> None:
    lists = {"short_factor": [1 + 0.01 * n for n in range(24)], "long_factor": [1 + 3.5 * n for n in range(24)]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, **lists}
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "original_max_position_embeddings": 4096}
    config = Phi3Config(**sizes, max_position_embeddings=131072, rope_parameters=rope, pad_token_id=None)
    theirs, ours = Phi3RotaryEmbedding(config), rotary(config.to_dict(), 64, partial=True)
    for capacity in (4096, 4097):
        theirs(torch.zeros(1), torch.arange(capacity)[None])
        np.testing.assert_allclose(ours.at(capacity).inverse_frequencies, theirs.inv_freq.numpy(), rtol=2e-6)
    assert ours.scale == pytest.approx(theirs.attention_scaling)
    assert "24 numbers" in refused({**config.to_dict(), "rope_parameters": {**rope, "long_factor": [1.0]}})


def refused(config: dict[str, Any]) -> str:
    with pytest.raises(UnsupportedModelError) as error:
        rotary(config, 64, partial=True)
    return str(error.value)
