"""Rotary frequencies, with the scaling rules of `rope_parameters` or `rope_scaling`.

Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071), LongRoPE (arXiv 2402.13753), and the
frequency bands of the Llama 3.1 model card.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from graphs.description import Rotary
from graphs.errors import UnsupportedModelError
from graphs.shapes import positive

Values = Mapping[str, Any]


def rotary(config: Values, head_dim: int, partial: bool = False, kind_of_layer: str = "") -> Rotary:
    """Return the rotary positions of a configuration.

    Args:
        config: Content of config.json.
        head_dim: Size of a head.
        partial: The family may rotate only a part of each head.
        kind_of_layer: Kind of layer whose parameters to use, if kinds differ (Gemma 3).

    Raises:
        UnsupportedModelError: If the scaling rule is unknown or a value is missing or out of range.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope = rope.get(kind_of_layer) or rope
    if kind_of_layer == "sliding_attention" and config.get("rope_local_base_freq"):
        rope = {"rope_theta": config["rope_local_base_freq"]}  # transformers 4
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    share = float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    if share != 1.0 and not partial:
        raise UnsupportedModelError(
            f"partial_rotary_factor is {share:g}; "
            "rotating a part of each head is not supported for this model_type"
        )
    if str(kind) not in RULES:
        raise UnsupportedModelError(
            f"rope scaling {kind!r} is not supported; known are {', '.join(sorted(RULES))}"
        )
    rotated = int(head_dim * share)
    if head_dim % 2 or rotated % 2 or not rotated:
        raise UnsupportedModelError(
            f"{rotated} of {head_dim} values of attention heads cannot be rotated; "
            "both must be even"
        )
    exponents = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    frequencies = (1.0 / (np.float32(theta) ** exponents)).astype(np.float32)
    what = f"rope scaling {kind!r}"
    try:
        with np.errstate(all="ignore"):
            result = RULES[kind](frequencies, {"rope_theta": theta, **rope}, config)
    except KeyError as error:
        raise UnsupportedModelError(
            f"{what} has no {error.args[0]}; add it to config.json"
        ) from None
    short = positive(result.inverse_frequencies, what)
    long = positive(result.long, what)
    return replace(result, inverse_frequencies=short, long=long)


def _made(frequencies: np.ndarray, scale: float = 1.0) -> Rotary:
    return Rotary(tuple(map(float, frequencies.astype(np.float32))), scale)


def _llama3(frequencies: np.ndarray, rope: Values, config: Values) -> Rotary:
    """Stretch long wavelengths by `factor`, keep short ones, and blend between."""
    factor = float(rope["factor"])
    low = float(rope["low_freq_factor"])
    high = float(rope["high_freq_factor"])
    turns = float(rope["original_max_position_embeddings"]) * frequencies / np.float32(2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return _made((1 - blend) * frequencies / factor + blend * frequencies)


def _yarn(frequencies: np.ndarray, rope: Values, config: Values) -> Rotary:
    """Stretch slow frequencies and keep fast ones, with a linear ramp between."""
    factor = float(rope["factor"])
    original = float(
        rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    )
    pairs = len(frequencies)
    base = float(rope["rope_theta"])

    def pair_of(rotations: float) -> float:
        return pairs * math.log(original / (rotations * 2 * math.pi)) / math.log(base)

    low = pair_of(float(rope.get("beta_fast") or 32))
    high = pair_of(float(rope.get("beta_slow") or 1))
    if rope.get("truncate", True):
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, 2 * pairs - 1)
    ramp = np.clip((np.arange(pairs, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    return _made(frequencies * (1 - ramp) + frequencies / factor * ramp, _yarn_scale(factor, rope))


def _yarn_scale(factor: float, rope: Values) -> float:
    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return grown(float(rope["mscale"])) / grown(float(rope["mscale_all_dim"]))
    return grown(1.0)


def _longrope(frequencies: np.ndarray, rope: Values, config: Values) -> Rotary:
    """Divide each frequency by its own factor.

    There is one list of factors up to the context length of pretraining, and one beyond.
    """
    original = int(
        config.get("original_max_position_embeddings") or rope["original_max_position_embeddings"]
    )
    longest = float(config.get("max_position_embeddings") or original)
    growth = float(rope.get("factor") or longest / original)
    scale = rope.get("attention_factor")
    if scale is None:
        scale = 1.0 if growth <= 1 else math.sqrt(1 + math.log(growth) / math.log(original))
    lists = []
    for name in ("short_factor", "long_factor"):
        if not isinstance(rope[name], list) or len(rope[name]) != len(frequencies):
            raise UnsupportedModelError(
                f"rope scaling 'longrope': {name} must be a list of {len(frequencies)} numbers"
            )
        # In the order of transformers: the factor times the power, then the inverse.
        exponents = np.arange(len(frequencies), dtype=np.float32) / len(frequencies)
        powers = np.float32(rope["rope_theta"]) ** exponents
        lists.append(_made(1.0 / (np.asarray(rope[name], np.float32) * powers), float(scale)))
    return replace(lists[0], long=lists[1].inverse_frequencies, short=original)


RULES: dict[str, Callable[[np.ndarray, Values, Values], Rotary]] = {
    "default": lambda frequencies, rope, config: _made(frequencies),
    "linear": lambda frequencies, rope, config: _made(frequencies / np.float32(rope["factor"])),
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}
