"""Model families: each file maps configurations and state dicts to descriptions."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

from graphs.description import Description
from graphs.errors import UnsupportedModelError
from graphs.families import bart, gemma, gpt2, llama, t5, t5gemma, whisper
from graphs.shapes import check_config
from graphs.weights import Weights

FAMILIES = (t5, llama, gemma, gpt2, bart, whisper, t5gemma)
# Fields of a configuration, or of its `text_config`, that stand for unsupported features. The first
# one is named in the error.
_BEYOND = {
    **dict.fromkeys(("linear_num_key_heads", "linear_conv_kernel_dim"), "linear attention"),
    "conv_L_cache": "convolutions",
    "altup_num_inputs": "several residual streams, AltUp",
    "hidden_size_per_layer_input": "embeddings for each layer",
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), "state-space layers"),
    **dict.fromkeys(("num_experts", "num_local_experts"), "a mixture of experts"),
    "n_routed_experts": "a mixture of experts",
    **dict.fromkeys(("vision_config", "audio_config"), "other inputs than text"),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), "latent attention"),
}
# The same for architectures without such a field.
_BY_NAME = {
    **dict.fromkeys(("rwkv", "xlstm", "recurrent_gemma"), "recurrent layers"),
    "dbrx": "a mixture of experts",
}


def supported_architectures() -> list[str]:
    """Return the supported architectures (config.json `model_type`)."""
    return sorted(model_type for family in FAMILIES for model_type in family.MODEL_TYPES)


def family_of(config: Mapping[str, Any]) -> ModuleType:
    """Return the module of a configuration's family.

    Raises:
        UnsupportedModelError: If the architecture, or a field of the configuration, is not
            supported.
    """
    model_type = str(config.get("model_type"))[:80]
    text = config.get("text_config")
    fields = {**config, **(text if isinstance(text, Mapping) else {})}
    field = next((name for name in _BEYOND if fields.get(name)), None)
    family_module = next((family for family in FAMILIES if model_type in family.MODEL_TYPES), None)
    if family_module is not None and field is None:
        return family_module
    reason = f" ({_BY_NAME[model_type]})" if model_type in _BY_NAME else ""
    if field is not None:
        reason = f" ({field}: {_BEYOND[field]})"
    nearest = _nearest(model_type, config) if family_module is None else ""
    raise UnsupportedModelError(
        f"architecture {model_type!r}{reason} is not supported; "
        f"{nearest}supported are {', '.join(supported_architectures())}"
    )


def _nearest(model_type: str, config: Mapping[str, Any]) -> str:
    """Return a hint: architectures with similar names, or the one with the most similar fields.

    The hint names the required fields that the configuration lacks.
    """
    names = difflib.get_close_matches(model_type, supported_architectures(), 3, 0.65)
    missing = {
        family: [name for name in family.REQUIRED if config.get(name) is None]
        for family in FAMILIES
    }
    near = [family for family in FAMILIES if {*names[:1]} & {*family.MODEL_TYPES}] or FAMILIES
    family = min(near, key=lambda family: len(missing[family]) / len(family.REQUIRED))
    fields = ""
    if 2 * len(missing[family]) < len(family.REQUIRED):
        names = names or [family.MODEL_TYPES[0]]
        fields = " (the configuration has its fields)"
        if missing[family]:
            fields = f" (the configuration lacks {', '.join(missing[family])})"
    if not names:
        return ""
    verb = "are" if len(names) > 1 else "is"
    return f"the nearest {verb} {', '.join(names)}{fields}; "


def describe(config: Mapping[str, Any], weights: Weights) -> Description:
    """Return the description of a checkpoint.

    Raises:
        UnsupportedModelError: If the architecture or a value of the configuration is not supported.
    """
    family = family_of(config)
    check_config(config, family.REQUIRED)
    return _suppressing(family.describe(config, weights), config)


def suppressed(config: Mapping[str, Any]) -> Iterator[int]:
    """Yield the tokens that generation_config.json excludes (Marian's padding)."""
    yield from (int(token) for token in config.get("suppress_tokens") or ())
    yield from (int(words[0]) for words in config.get("bad_words_ids") or () if len(words) == 1)


def _suppressing(description: Description, config: Mapping[str, Any]) -> Description:
    # Speech decoding suppresses tokens itself: it reads the probability of no speech first.
    if description.spectrogram is not None:
        return description
    found = tuple(
        sorted(token for token in {*suppressed(config)} if 0 <= token < description.vocab_size)
    )
    decoder = description.decoder
    head = replace(decoder.head, suppressed=found)
    return replace(description, decoder=replace(decoder, head=head)) if found else description
