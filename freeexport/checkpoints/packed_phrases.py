"""Tables of frequent phrases in the files of exits."""

from __future__ import annotations

import numpy as np

from freeexport.checkpoints.weight_files import CheckpointError, SafetensorsFile
from runtime.decoding.phrases import ENTRY, misfit

PHRASE_PREFIX = "phrases."
# Types of the fields of ENTRY in a file. The format has no unsigned integers of 32 and 64 bits
# that every reader knows.
_STORED = {"ngram": np.int64, "token": np.int32, "level": np.uint8}
_REMEDY = "get the file again"


def fields_of(phrases: np.ndarray) -> dict[str, np.ndarray]:
    """Return the tensors of a table, ENTRY [n], by their names in a file."""
    return {
        PHRASE_PREFIX + field: np.ascontiguousarray(phrases[field]).view(dtype)
        for field, dtype in _STORED.items()
    }


def read_fields(file: SafetensorsFile, vocab_size: int) -> np.ndarray | None:
    """Return the table of a file, ENTRY [n], or None if it has none.

    Raises:
        CheckpointError: If the table is damaged, or has tokens outside of the vocabulary.
    """
    if not any(name.startswith(PHRASE_PREFIX) for name in file.shapes):
        return None
    parts = {}
    for field, dtype in _STORED.items():
        part = (
            file.read_stored(PHRASE_PREFIX + field)
            if PHRASE_PREFIX + field in file.shapes
            else None
        )
        if part is None or part.dtype != dtype or part.ndim != 1:
            raise CheckpointError(
                f"{file.path} is damaged: it has no {PHRASE_PREFIX}{field}; {_REMEDY}"
            )
        parts[field] = part
    if len({len(part) for part in parts.values()}) > 1 or (parts["token"] < 0).any():
        raise CheckpointError(f"{file.path} is damaged: its phrases do not fit; {_REMEDY}")
    entries = np.empty(len(parts["token"]), ENTRY)
    for field, part in parts.items():
        entries[field] = part.view(ENTRY[field])
    if (reason := misfit(entries, vocab_size)) is not None:
        raise CheckpointError(f"{file.path} is damaged: its table of phrases: {reason}; {_REMEDY}")
    return entries
