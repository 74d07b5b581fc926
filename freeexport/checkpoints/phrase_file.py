"""Files of phrase tables, which lossless requests draft without an engine call.

A table fits every model that gives the same ids to its tokens, such as all sizes of a family. The
files are safetensors. phrases.FIELD are the fields of the table, the metadata one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from freeexport.checkpoints.weight_files import CheckpointError, SafetensorsFile
from freeexport.system.output import OutputError, replacing
from runtime.bundle.schema import Reader, parse_object
from runtime.decoding.phrases import ENTRY, misfit
from runtime.errors import BundleError, shown
from runtime.text.tokenizer import Tokenizer

READY_MADE = Path(__file__).parents[1] / "phrases"
SUFFIX = ".safetensors"
FORMAT = 1
MOST_BYTES = 8_000_000
PHRASE_PREFIX = "phrases."
# Types of the fields of ENTRY in a file. The format has no unsigned integers of 32 and 64 bits
# that every reader knows.
_STORED = {"ngram": np.int64, "token": np.int32, "level": np.uint8}
_METADATA = "freeexport_phrases"
_REMEDY = "get the file again"
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,79}", re.ASCII)


@dataclass(frozen=True)
class PhraseFile:
    """Metadata of a file.

    Attributes:
        name: Name of the table.
        model: Name of the model whose outputs were counted.
        vocab_size: Number of its tokens.
        tokens_sha256: Hash of the tokens in the table, by `tokens_sha256`.
        licence: Licence of the table.
        data: Sentences on the outputs.
        results: Sentences on the results.
        format: Version of this format.
    """

    name: str
    model: str
    vocab_size: int
    tokens_sha256: str
    licence: str
    data: str
    results: str
    format: int = FORMAT


def tokens_sha256(tokenizer: Tokenizer, phrases: np.ndarray) -> str:
    """Return a hash of the ids and texts of the tokens that a table, ENTRY [n], can draft."""
    ids = np.unique(phrases["token"]).tolist()
    pairs = [[token, tokenizer.token(token)] for token in ids]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


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


def ready_made_phrases() -> list[Path]:
    """Return the files of the tables in this package."""
    return sorted(READY_MADE.glob(f"*{SUFFIX}"))


def find_phrases(name: str) -> Path:
    """Return the file of a table in this package, or `name` if it is a file.

    Raises:
        CheckpointError: If there is no such table and no such file.
    """
    known = {path.stem: path for path in ready_made_phrases()}
    if name in known:
        return known[name]
    with suppress(OSError, ValueError):  # not a valid file name
        if Path(name).is_file():
            return Path(name)
    raise CheckpointError(
        f"--phrases {name[:100]}: there is no such file, and no such table; known are "
        f"{', '.join(known) or 'none'}"
    )


def read_metadata(text: str, path: Path, newest: int) -> dict[str, Any]:
    """Return the metadata of an exit's or a table's file, one JSON object with its `format`.

    Raises:
        BundleError: If `text` is not a JSON object.
        CheckpointError: If the format is above `newest`.
    """
    value = parse_object(text, str(path), _REMEDY)
    if type(value.get("format")) is int and value["format"] > newest:
        raise CheckpointError(
            f"{path} has format {value['format']}, this freeexport reads {newest}; upgrade "
            "freeexport"
        )
    return value


def read_phrase_file(path: Path) -> tuple[PhraseFile, np.ndarray]:
    """Return the metadata and the table, ENTRY [n], of a file.

    Raises:
        CheckpointError: If the file is damaged, has no table, or is of a newer format.
    """
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        raise CheckpointError(
            f"{path} is damaged: not a complete safetensors file; {_REMEDY}"
        ) from None
    if _METADATA not in file.metadata:
        raise CheckpointError(f"{path} has no table of phrases; name another file")
    try:
        value = read_metadata(file.metadata[_METADATA], path, FORMAT)
        about: PhraseFile = Reader(_REMEDY).read(PhraseFile, value, str(path))
    except BundleError as error:
        raise CheckpointError(str(error)) from None
    phrases = read_fields(file, about.vocab_size)
    if phrases is None:
        raise CheckpointError(f"{path} is damaged: it has no {PHRASE_PREFIX}ngram; {_REMEDY}")
    return about, phrases


def write_phrase_file(path: Path, about: PhraseFile, phrases: np.ndarray) -> None:
    """Write a table, ENTRY [n].

    Raises:
        OutputError: If the name is invalid, or the table has more than MOST_BYTES.
    """
    from safetensors.numpy import save_file

    if _NAME.fullmatch(about.name) is None:
        raise OutputError(
            f"the table's name is {shown(about.name)}; a name has at most 80 lowercase letters, "
            "digits, dots and hyphens"
        )
    if phrases.nbytes > MOST_BYTES:
        raise OutputError(
            f"{len(phrases):,} phrases have {phrases.nbytes / 1e6:.1f} MB, more than "
            f"{MOST_BYTES / 1e6:.0f}; {MOST_BYTES // ENTRY.itemsize:,} fit"
        )
    with replacing(path) as partial:
        metadata = {_METADATA: json.dumps(asdict(about), sort_keys=True)}
        save_file(fields_of(phrases), partial, metadata=metadata)
        partial.chmod(0o644)  # safetensors makes the file private


def misfit_reason(
    about: PhraseFile, phrases: np.ndarray, tokenizer: Tokenizer | None
) -> str | None:
    """Return why a table does not fit the tokens of a model. None if it does."""
    if tokenizer is None:
        return "the model has no tokenizer"
    if tokens_sha256(tokenizer, phrases) != about.tokens_sha256:
        return f"its tokens are those of {about.model}, the model has others"
    return None
