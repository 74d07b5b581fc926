"""How a checkpoint's text becomes ids: its tokenizer, its end of sequence, its limit."""

from __future__ import annotations

from freeexport.checkpoints.checkpoint import Checkpoint, CheckpointError
from freeexport.checkpoints.examples import TextFormat
from freeexport.checkpoints.tokenizer_files import has_tokenizer, load_tokenizer
from graphs.description import Description


def text_format(checkpoint: Checkpoint, description: Description, limit: int) -> TextFormat:
    """Sequences of at most `limit` ids, or the model's own limit. Raises CheckpointError without a tokenizer or an end
    of sequence."""
    if not has_tokenizer(checkpoint):
        raise CheckpointError(f"{checkpoint.name} has no tokenizer, which text needs; add its tokenizer files")
    tokenizer = load_tokenizer(checkpoint)
    ends = end_ids(checkpoint)
    if not ends and tokenizer.eos_token_id is not None:
        ends = [tokenizer.eos_token_id]
    if not ends:
        raise CheckpointError(f"{checkpoint.name} names no eos_token_id; add it to its generation_config.json")
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
    limit = min(limit, description.decoder.max_positions or limit)
    return TextFormat(tokenizer, int(end), limit, description.encoder is not None)


def known_ends(checkpoint: Checkpoint, vocab_size: int) -> tuple[int, ...]:
    """Those of `end_ids` that the vocabulary has."""
    return tuple(token for token in end_ids(checkpoint) if 0 <= token < vocab_size)


def end_ids(checkpoint: Checkpoint) -> list[int]:
    """The ids that end a sequence, as the checkpoint's generation_config.json or config.json names them."""
    ends = checkpoint.generation_config.get("eos_token_id")
    return list(ends) if isinstance(ends, list) else [] if ends is None else [int(ends)]
