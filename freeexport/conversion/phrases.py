"""The table of frequent phrases of a bundle (`convert --phrases`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from freeexport.checkpoints.examples import read_examples
from freeexport.checkpoints.phrase_file import (
    SUFFIX,
    misfit_reason,
    read_phrase_file,
    ready_made_phrases,
)
from runtime.decoding.phrases import PhraseTable
from runtime.errors import OptionError
from runtime.text.tokenizer import Tokenizer

# Entries of a table that is counted, 13 bytes each.
MOST_PHRASES = 200_000


def phrases_of(path: Path, bundle: Path, ends: Sequence[int]) -> np.ndarray:
    """Return the table of a file of phrases, or of a JSONL file's targets, ENTRY [n].

    Args:
        path: The file.
        bundle: Directory with the tokenizer.
        ends: Tokens that end a sequence. The first one follows each target.

    Raises:
        CheckpointError: If a file of phrases is damaged.
        DataError: If a line is broken or has no target, or the file is empty.
        OptionError: If there is no tokenizer, or the table is for other tokens.
    """
    tokenizer = Tokenizer.load(bundle)
    if path.suffix == SUFFIX:
        about, phrases = read_phrase_file(path)
        if (reason := misfit_reason(about, phrases, tokenizer)) is not None:
            raise OptionError(f"--phrases {about.name} does not fit: {reason}; leave it out")
        return phrases
    lines = read_examples(path, need_target="phrases are counted in targets; add them")
    if tokenizer is None:
        raise OptionError(f"--phrases {path}: the checkpoint has no tokenizer; leave it out")
    texts = (tokenizer.encode(str(line.target), special=False) for line in lines)
    return PhraseTable.build(([*text, *ends[:1]] for text in texts), MOST_PHRASES).entries


def fitting_phrases(bundle: Path) -> tuple[str, np.ndarray] | None:
    """Return name and table, ENTRY [n], of ready-made phrases for a bundle's tokens, or None."""
    tokenizer = Tokenizer.load(bundle)
    for path in ready_made_phrases():
        about, phrases = read_phrase_file(path)
        if misfit_reason(about, phrases, tokenizer) is None:
            return about.name, phrases
    return None
