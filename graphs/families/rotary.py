"""Rotary frequencies with the scaling rules that checkpoints name in `rope_parameters` or `rope_scaling`.

Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071), and the Llama 3.1 model card's frequency bands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from graphs.description import Rotary
from graphs.errors import UnsupportedModelError
from graphs.limits import positive


def rotary(config: Mapping[str, Any], head_dim: int) -> Rotary:
    """The rotary positions of a configuration. UnsupportedModelError where the scaling rule is unknown."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedModelError("partial rotary positions (partial_rotary_factor != 1) are not supported")
    if str(kind) not in RULES:
        raise UnsupportedModelError(f"rope scaling {kind!r} is not supported; known are {', '.join(sorted(RULES))}")
    if head_dim % 2:
        raise UnsupportedModelError(f"attention heads of size {head_dim} cannot be rotated; head_dim must be even")
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / (np.float32(theta) ** exponents)).astype(np.float32)
    what = f"rope scaling {kind!r}"
    try:
        with np.errstate(all="ignore"):
            scaled, scale = RULES[kind](frequencies, {"rope_theta": theta, **rope}, config)
    except KeyError as error:
        raise UnsupportedModelError(f"{what} has no {error.args[0]}; add it to config.json") from None
    return Rotary(positive(tuple(map(float, scaled)), what), scale)


def _default(frequencies: np.ndarray, rope: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    return frequencies, 1.0


def _linear(frequencies: np.ndarray, rope: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    return frequencies / np.float32(rope["factor"]), 1.0


def _llama3(frequencies: np.ndarray, rope: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = float(rope["original_max_position_embeddings"]) * frequencies / np.float32(2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - blend) * frequencies / factor + blend * frequencies).astype(np.float32), 1.0


def _yarn(frequencies: np.ndarray, rope: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Frequencies that turn often within the original context are kept, slow ones stretched, a ramp between."""
    factor = float(rope["factor"])
    original = float(rope.get("original_max_position_embeddings") or config["max_position_embeddings"])
    pairs, base = len(frequencies), float(rope["rope_theta"])

    def pair_of(rotations: float) -> float:
        return pairs * math.log(original / (rotations * 2 * math.pi)) / math.log(base)

    low, high = pair_of(float(rope.get("beta_fast") or 32)), pair_of(float(rope.get("beta_slow") or 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    ramp = np.clip((np.arange(pairs, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    return (frequencies * (1 - ramp) + frequencies / factor * ramp).astype(np.float32), _yarn_scale(factor, rope)


def _yarn_scale(factor: float, rope: Mapping[str, Any]) -> float:
    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return grown(float(rope["mscale"])) / grown(float(rope["mscale_all_dim"]))
    return grown(1.0)


RULES = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
