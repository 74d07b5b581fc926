"""Special tokens of a checkpoint, from its generation settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from freeexport.checkpoints.checkpoint import Checkpoint
from graphs.description import Description
from graphs.errors import GraphError
from runtime.bundle.manifest import Speech


def forced(generation: Mapping[str, Any], name: str) -> int | None:
    """Return a token id from the generation settings. Of a list, return the first."""
    given = generation.get(name)
    return (int(given[0]) if given else None) if isinstance(given, list) else given


def end_ids(checkpoint: Checkpoint) -> list[int]:
    """Return the ids that end a sequence, from generation_config.json or config.json."""
    ends = checkpoint.generation_config.get("eos_token_id")
    return list(ends) if isinstance(ends, list) else [] if ends is None else [int(ends)]


def known_ends(checkpoint: Checkpoint, vocab_size: int) -> tuple[int, ...]:
    """Return the ids of `end_ids` that are in the vocabulary."""
    return tuple(token for token in end_ids(checkpoint) if 0 <= token < vocab_size)


def speech_of(checkpoint: Checkpoint, description: Description) -> Speech | None:
    """Return the special tokens of a speech model, or None for a model of text.

    They are read from generation_config.json.

    Raises:
        GraphError: If generation_config.json does not define them.
    """
    sound = description.spectrogram
    config = checkpoint.generation_config
    if sound is None:
        return None
    timestamps = config.get("no_timestamps_token_id")
    if not isinstance(timestamps, int):
        raise GraphError(
            f"{checkpoint.name} names no no_timestamps_token_id; add the generation_config.json "
            "of the Whisper model that it was made from"
        )
    languages = {
        code.strip("<|>"): token for code, token in (config.get("lang_to_id") or {}).items()
    }
    ends = known_ends(checkpoint, description.vocab_size)
    return Speech(
        bins=sound.bins,
        no_timestamps=timestamps,
        previous=int(config.get("prev_sot_token_id") or timestamps - 2),
        no_speech=timestamps - 1,
        languages=languages,
        tasks=dict(config.get("task_to_id") or {}) if languages else {},
        suppressed=tuple(
            token for token in config.get("suppress_tokens") or () if token not in ends
        ),
        begin_suppressed=tuple(config.get("begin_suppress_tokens") or ()),
        latest_first=int(config.get("max_initial_timestamp_index") or 50),
        alignment_heads=_alignment_heads(checkpoint, description),
    )


def _alignment_heads(
    checkpoint: Checkpoint, description: Description
) -> tuple[tuple[int, ...], ...]:
    """Return layer and head of Whisper's alignment heads.

    They are read from generation_config.json. Default: all heads of the last half of the layers.

    Raises:
        GraphError: If they do not exist in the model.
    """
    layers = len(description.decoder.layers)
    heads = description.attention.heads
    given = checkpoint.generation_config.get("alignment_heads")
    if given is None:
        return tuple((layer, head) for layer in range(layers // 2, layers) for head in range(heads))
    known = {(layer, head) for layer in range(layers) for head in range(heads)}
    try:
        found = tuple((int(layer), int(head)) for layer, head in given)
    except (TypeError, ValueError):
        found = ()
    if not found or not known.issuperset(found):
        raise GraphError(
            f"{checkpoint.name} has alignment_heads {str(given)[:80]} in its "
            f"generation_config.json; give pairs of a layer below {layers} and a head below {heads}"
        )
    return found
