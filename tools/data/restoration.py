"""Text restoration: a sentence in lower case without punctuation, as speech recognition writes it, back to itself."""

from __future__ import annotations

import re
from collections.abc import Iterator

# Characters; shorter sentences have little to restore, longer ones are mostly lists.
SHORTEST, LONGEST = 60, 260
_SENTENCE = re.compile(rf".{{{SHORTEST},{LONGEST}}}?[.!?](?= |$)")
_PUNCTUATION = re.compile(r"[^\w\s'+#/-]")
# What ends the input, so that a decoder-only model knows where the answer begins.
SEPARATOR = "\n=> "


def stripped(text: str) -> str:
    """`text` in lower case, its punctuation except that inside names and options replaced by single spaces."""
    return " ".join(_PUNCTUATION.sub(" ", text.lower()).split())


def sentences(paragraph: str) -> Iterator[str]:
    """The sentences of a paragraph that begin with a capital letter and change when they are stripped."""
    for found in _SENTENCE.findall(" ".join(paragraph.split())):
        sentence = found.strip()
        if sentence[:1].isupper() and stripped(sentence) not in ("", sentence):
            yield sentence
