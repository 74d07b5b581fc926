"""What an output is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.errors import OptionError


@dataclass(frozen=True)
class Reference:
    """`texts`: alternatives, any of which is right, the first one the main one; `words`: for the words of one line that
    `|` separates, the alternatives of each, or None."""

    texts: tuple[str, ...]
    words: tuple[tuple[str, ...], ...] | None = None

    @classmethod
    def of(cls, target: str | None, references: Any, where: str) -> Reference | None:
        """From the fields `target` and `references` of a line of data: a list of texts, or for each word a list of
        alternatives. None where there is neither; OptionError, which names `where`, for anything else."""
        main = () if target is None else (target,)
        if references is None:
            return cls(main) if main else None
        if _texts(references):
            return cls((*main, *(text for text in references if text != target)))
        if isinstance(references, list) and references and all(map(_texts, references)):
            words = tuple(map(tuple, references))
            return cls(main or (" | ".join(word[0] for word in words),), words)
        raise OptionError(
            f"{where}: 'references' is {repr(references)[:60]}; give a list of texts, or a list of texts for each word"
        )


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
