"""Converts a growing list of token ids to text, as soon as it is final, up to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from runtime.errors import OptionError, shown
from runtime.text.tokenizer import Tokenizer, byte_of

REPLACEMENT = "\ufffd"
_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Final text of a token sequence, token by token.

    The joined results of `push` and `finish` equal `tokenizer.decode` of all ids, cut before the
    first completed stop string, regardless of how the text is split into tokens. If one character
    completes two stop strings, the longer one counts. Without a tokenizer, the text is always "".

    Text is withheld until it is final: an incomplete UTF-8 character, a run of byte tokens (one
    invalid byte turns all of it into U+FFFD), a suffix that may start a stop string, and all text
    of a decoder that is neither byte-level nor token by token (CTC, BPEDecoder). In contrast,
    `tokenizers.decoders.DecodeStream` returns runs of byte tokens too early.

    The time of a push does not grow with the number of invalid or withheld bytes. Everything is
    decoded again at each token only if a decoder needs all tokens and there are stop strings.

    Args:
        tokenizer: The tokenizer.
        stop: Stop strings.

    Attributes:
        stopped: Set by the token that completes a stop string.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()) -> None:
        _check_stop(tokenizer, stop)
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(dict.fromkeys(stop))
        self._held = ""  # final text that may start a stop string
        self._begun = False  # there has been text
        self._head: list[int] = []  # ids before the first text
        self._run: list[int] = []  # ids whose text is not final
        # For byte-level decoders: holds the bytes of an incomplete character.
        self._characters = _Utf8Decoder("replace")
        # With stop strings, a run of byte tokens has a text so far and a decoder, None after an
        # invalid byte.
        self._draft = ""
        self._bytes: codecs.IncrementalDecoder | None = _Utf8Decoder()

    def push(self, token_id: int) -> str:
        """Add the next token and return the text that has become final, often ""."""
        if self._tokenizer is None or self.stopped:
            return ""
        text = self._push(token_id, self._tokenizer)
        if not self._stop:
            return text
        self._held += text
        # A run of byte tokens that contains a stop string now might not after one more byte, but
        # generation ends here.
        draft = (
            self._draft
            if self._tokenizer.anchor
            else self._run_text(self._tokenizer).rstrip(REPLACEMENT)
        )
        return self._release(draft, final=False) if text or draft else ""

    def finish(self) -> str:
        """Return the withheld rest after the last token. A second call returns ""."""
        if self._tokenizer is None or self.stopped:
            return ""
        rest = self._characters.decode(b"", final=True)
        self._held += rest + self._settle(self._run_text(self._tokenizer))
        return self._release("", final=True)

    def _push(self, token_id: int, tokenizer: Tokenizer) -> str:
        if tokenizer.byte_level:
            return self._characters.decode(tokenizer.bytes_of(token_id))
        settled = self._begun and not self._run
        if settled and token_id in tokenizer.known_texts:
            return tokenizer.known_texts[token_id]
        token = tokenizer.token(token_id)
        if token is None or token_id in tokenizer.special_ids:
            return ""
        self._run.append(token_id)
        if tokenizer.anchor is None:
            return ""
        if "ByteFallback" in tokenizer.decoder_kinds and (byte := byte_of(token)) is not None:
            if self._stop:
                self._add_to_draft(byte, tokenizer)
            return ""
        text = self._run_text(tokenizer)
        if settled:
            tokenizer.known_texts[token_id] = text
        return self._settle(text)

    def _add_to_draft(self, byte: int, tokenizer: Tokenizer) -> None:
        if self._bytes is None:
            return
        try:
            text = self._bytes.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._bytes = None
            self._draft = ""
            return
        # The first text may lose leading spaces.
        self._draft = self._draft + text if self._draft or not text else self._run_text(tokenizer)

    def _run_text(self, tokenizer: Tokenizer) -> str:
        if not self._run:
            return ""
        if tokenizer.anchor is None or not self._begun:
            return tokenizer.decode(self._head + self._run)
        anchor, length = tokenizer.anchor
        return tokenizer.decode([anchor, *self._run])[length:]

    def _settle(self, text: str) -> str:
        """Mark the text of the run as final."""
        if not self._begun:
            self._begun = bool(text)
            self._head = [] if text else self._head + self._run
        self._run = []
        self._draft = ""
        self._bytes = _Utf8Decoder()
        return text

    def _release(self, draft: str, *, final: bool) -> str:
        """Return the held text up to a stop string, or up to a suffix that may start one."""
        text = self._held + draft
        spans = [
            (start + len(word), start) for word in self._stop if (start := text.find(word)) >= 0
        ]
        if spans:
            self.stopped = True
            self._held = ""
            return text[: min(spans)[1]]
        end = len(self._held) - (0 if final else _begun(self._held, self._stop))
        text = self._held[:end]
        self._held = self._held[end:]
        return text


def _check_stop(tokenizer: Tokenizer | None, stop: Sequence[str]) -> None:
    if isinstance(stop, str):
        raise OptionError(f"stop is the string {shown(stop)}; pass a list of strings")
    for index, text in enumerate(stop):
        if not isinstance(text, str) or not text:
            raise OptionError(
                f"stop string {index} is {shown(text)}; pass strings of at least one character"
            )
    if stop and tokenizer is None:
        raise OptionError(
            "stop strings need text, and there is no tokenizer (the bundle has none, or "
            "trust_templates is False); leave them out"
        )


def _begun(text: str, stop: Sequence[str]) -> int:
    """Return the length of the longest suffix that is a proper prefix of a stop string."""
    longest = 0
    for word in stop:
        start = text.find(word[0], max(0, len(text) - len(word) + 1))
        while start >= 0 and not word.startswith(text[start:]):
            start = text.find(word[0], start + 1)
        if start >= 0:
            longest = max(longest, len(text) - start)
    return longest
