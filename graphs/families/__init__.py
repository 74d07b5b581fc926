"""One file a family: its configuration and state dict as a description."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

from graphs.description import Description
from graphs.errors import UnsupportedModelError
from graphs.families import bart, gemma, gpt2, llama, t5, whisper
from graphs.shapes import check_config
from graphs.weights import Weights

FAMILIES = (t5, llama, gemma, gpt2, bart, whisper)
# What these fields of a configuration say that no description has.
_BEYOND = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), "a mixture of experts"),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), "state-space layers"),
    **dict.fromkeys(("linear_num_key_heads", "linear_conv_kernel_dim"), "linear attention"),
    **dict.fromkeys(("vision_config", "audio_config"), "other inputs than text"),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), "latent attention"),
}


def supported() -> list[str]:
    """Architectures (config.json `model_type`) that have a description."""
    return sorted(model_type for family in FAMILIES for model_type in family.MODEL_TYPES)


def family_of(config: Mapping[str, Any]) -> ModuleType:
    """The file of a configuration's family. UnsupportedModelError where there is none, or a field asks for what no
    description has."""
    model_type = str(config.get("model_type"))[:80]
    field = next((name for name in _BEYOND if config.get(name)), None)
    found = next((family for family in FAMILIES if model_type in family.MODEL_TYPES), None)
    if found is not None and field is None:
        return found
    reason = "" if field is None else f" ({field}: {_BEYOND[field]})"
    nearest = _nearest(model_type, config) if found is None else ""
    raise UnsupportedModelError(
        f"architecture {model_type!r}{reason} is not supported; {nearest}supported are {', '.join(supported())}"
    )


def _nearest(model_type: str, config: Mapping[str, Any]) -> str:
    """The types whose names are near, or else the one whose fields the configuration has, and those that it lacks."""
    names = difflib.get_close_matches(model_type, supported(), 3, 0.65)
    lacking = {family: [name for name in family.REQUIRED if config.get(name) is None] for family in FAMILIES}
    near = [family for family in FAMILIES if {*names[:1]} & {*family.MODEL_TYPES}] or FAMILIES
    family = min(near, key=lambda one: len(lacking[one]) / len(one.REQUIRED))
    fields = ""
    if 2 * len(lacking[family]) < len(family.REQUIRED):
        names = names or [family.MODEL_TYPES[0]]
        lacks = ", ".join(lacking[family])
        fields = f" (the configuration lacks {lacks})" if lacks else " (the configuration has its fields)"
    return f"the nearest {'are' if names[1:] else 'is'} {', '.join(names)}{fields}; " if names else ""


def describe(config: Mapping[str, Any], weights: Weights) -> Description:
    """The description of a checkpoint. UnsupportedModelError names what is not supported, or out of range."""
    family = family_of(config)
    check_config(config, family.REQUIRED)
    return _suppressing(family.describe(config, weights), config)


def suppressed(config: Mapping[str, Any]) -> Iterator[int]:
    """Tokens that generation must never give, as generation_config.json says (Marian's padding)."""
    yield from (int(token) for token in config.get("suppress_tokens") or ())
    yield from (int(words[0]) for words in config.get("bad_words_ids") or () if len(words) == 1)


def _suppressing(description: Description, config: Mapping[str, Any]) -> Description:
    if description.spectrogram is not None:  # its rules, which read the probability of no speech, suppress them
        return description
    found = tuple(sorted(token for token in {*suppressed(config)} if 0 <= token < description.vocab_size))
    decoder = description.decoder
    head = replace(decoder.head, suppressed=found)
    return replace(description, decoder=replace(decoder, head=head)) if found else description
