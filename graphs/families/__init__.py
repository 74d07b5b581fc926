"""One file a family: its configuration and state dict as a description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphs.description import Description
from graphs.errors import UnsupportedModelError
from graphs.families import llama, t5
from graphs.shapes import check_config
from graphs.weights import Weights

FAMILIES = (t5, llama)


def supported() -> list[str]:
    """Architectures (config.json `model_type`) that have a description."""
    return sorted(model_type for family in FAMILIES for model_type in family.MODEL_TYPES)


def describe(config: Mapping[str, Any], weights: Weights) -> Description:
    """The description of a checkpoint. UnsupportedModelError names what is not supported, or out of range."""
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.MODEL_TYPES:
            check_config(config, family.REQUIRED)
            return family.describe(config, weights)
    raise UnsupportedModelError(f"architecture {model_type!r} is not supported; supported are {', '.join(supported())}")
