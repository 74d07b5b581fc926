"""exit-vocab.json: tokens for the shallow head that were chosen by what they let exit, and on which model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from freeexport.checkpoints.schema_file import read_schema_file
from freeexport.system.output_file import write_whole
from runtime.bundle.precision import ExitVocabulary
from runtime.errors import BundleError, OptionError

EXIT_VOCABULARY_VERSION = 1
REMEDY = "run freeexport exit-vocab again"


@dataclass(frozen=True)
class ExitVocabularyFile:
    """`tokens` ascending; `covered` is their share of `predictions` shallow predictions, and `exits_lost` the share of
    the exits at `threshold` that they lose, both of sequences that they were not chosen on."""

    source_sha256: str
    vocab_size: int
    exit_layer: int
    threshold: float
    predictions: int
    covered: float
    exits_lost: float
    tokens: tuple[int, ...]
    schema_version: int = EXIT_VOCABULARY_VERSION

    def __post_init__(self) -> None:
        if list(self.tokens) != sorted(set(self.tokens)):
            raise OptionError("the tokens are not in ascending order, each once")
        if not self.tokens or not 0 <= self.tokens[0] <= self.tokens[-1] < self.vocab_size:
            raise OptionError(f"the tokens are not ids of a vocabulary of {self.vocab_size}")

    @property
    def facts(self) -> ExitVocabulary:
        """What a bundle records of it."""
        return ExitVocabulary(len(self.tokens), self.covered, self.predictions)

    def write(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self)) + "\n")


def read_exit_vocabulary(path: Path, source_sha256: str, vocab_size: int, exit_layer: int) -> ExitVocabularyFile:
    """The file at `path`, for this model. Raises OptionError where it cannot be read, or is of another model."""
    try:
        read: ExitVocabularyFile = read_schema_file(path, ExitVocabularyFile, EXIT_VOCABULARY_VERSION, REMEDY)
    except BundleError as error:
        raise OptionError(str(error)) from None
    given = (read.source_sha256, read.vocab_size, read.exit_layer)
    if given != (source_sha256, vocab_size, exit_layer):
        raise OptionError(
            f"{path} is of another model (sha256 {read.source_sha256[:12]}, {read.vocab_size} tokens, exit layer "
            f"{read.exit_layer}), not of this one ({source_sha256[:12]}, {vocab_size}, {exit_layer}); {REMEDY}"
        )
    return read
