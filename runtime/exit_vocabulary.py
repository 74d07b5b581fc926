"""The tokens that a bundle's shallow head knows, where these are not all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExitVocabulary:
    """`size` tokens, chosen on `text_tokens` tokens of text, of which they are the share `covered`: the others can
    never exit."""

    size: int
    covered: float
    text_tokens: int
