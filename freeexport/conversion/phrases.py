"""The table of frequent phrases of a bundle (`convert --phrases`)."""

from __future__ import annotations

import json
import lzma
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from freeexport.checkpoints.examples import DataError, read_examples
from freeexport.system.progress import progress
from runtime.decoding.phrases import PhraseTable
from runtime.errors import OptionError, PromptError
from runtime.text.tokenizer import Tokenizer

# Texts of answers of chat models, one JSON object per line (phrases/README.md).
READY_MADE = Path(__file__).parents[1] / "phrases" / "answers.jsonl.xz"
# Entries of a table, 13 bytes each.
MAX_PHRASES = 900_000
# Smaller vocabularies are of letters, bytes or sounds.
MIN_VOCABULARY = 8192


def counted_phrases(path: Path, bundle: Path, ends: Sequence[int]) -> np.ndarray:
    """Return the table of a JSONL file's targets, ENTRY [n].

    Args:
        path: The file.
        bundle: Directory with the tokenizer.
        ends: Tokens that end a sequence.

    Raises:
        DataError: If a line is broken or has no target, or the file is empty.
        OptionError: If there is no tokenizer.
    """
    lines = read_examples(path, need_target="phrases are counted in targets; add them")
    tokenizer = Tokenizer.load(bundle)
    if tokenizer is None:
        raise OptionError(f"--phrases {path}: the checkpoint has no tokenizer; leave it out")
    return _table([(str(line.target), True) for line in lines], tokenizer, ends)


def ready_made_phrases(bundle: Path, ends: Sequence[int]) -> np.ndarray | None:
    """Return the table of the answers in the package, ENTRY [n].

    They are counted in the model's own tokens, so they serve every model that writes English or
    code. Returns None if the model has no such tokens.

    Args:
        bundle: Directory with the tokenizer.
        ends: Tokens that end a sequence.

    Raises:
        DataError: If the file in the package is missing or damaged.
    """
    tokenizer = Tokenizer.load(bundle)
    if tokenizer is None or tokenizer.vocab_size < MIN_VOCABULARY:
        return None
    try:
        with lzma.open(READY_MADE, "rt", encoding="utf-8") as file:
            answers = map(json.loads, file)
            texts = [(answer["target"], answer["complete"]) for answer in answers]
    except (OSError, EOFError, lzma.LZMAError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{READY_MADE} cannot be read ({type(error).__name__}); install freeexport again, or "
            "leave phrases out (--phrases none)"
        ) from None
    return _table(texts, tokenizer, ends)


def _table(
    texts: Sequence[tuple[str, bool]], tokenizer: Tokenizer, ends: Sequence[int]
) -> np.ndarray:
    """Count the phrases of texts, each with whether it is complete."""
    end = _end_of_answer(tokenizer, ends)
    encoded = []
    with progress("counting phrases", len(texts)) as advance:
        for text, complete in texts:
            ids = tokenizer.encode(text, special=False, parse_special=False)
            encoded.append([*ids, *end] if complete else ids)
            advance(1)
    return PhraseTable.build(encoded, MAX_PHRASES).entries


def _end_of_answer(tokenizer: Tokenizer, ends: Sequence[int]) -> list[int]:
    """Return the token that ends an answer, as a list, or an empty list if there is none."""
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            chat = tokenizer.encode_chat(messages)
        except PromptError:  # a template of another form
            chat = []
        for token in reversed(chat):
            if token in ends:
                return [token]
    return list(ends[:1])
