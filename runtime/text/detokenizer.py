"""Text of a growing list of token ids, handed out as soon as it is final, up to the first stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from runtime.errors import OptionError
from runtime.text.tokenizer import Tokenizer, byte_of

REPLACEMENT = "\ufffd"
_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Final text of a token sequence, token by token.

    The results of `push` and `finish`, joined, are `tokenizer.decode` of all ids, cut before the stop string that is
    completed first (of two completed by one character, the longer), however the text falls into tokens. `stopped` is
    set by the token that completes it. Without a tokenizer the text is always "".

    Withheld until it is certain: an incomplete UTF-8 character, a run of byte tokens (one invalid byte turns all of it
    into U+FFFD), a suffix that may begin a stop string, and all text of a decoder that is neither byte-level nor token
    by token (CTC, BPEDecoder). `tokenizers.decoders.DecodeStream` hands out runs of byte tokens too early.

    A push takes as long after thousands of invalid or withheld bytes as before them. Only where a decoder needs all
    tokens and there are stop strings is everything decoded again at each.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()) -> None:
        _check_stop(tokenizer, stop)
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(dict.fromkeys(stop))
        self._held = ""  # final text that may begin a stop string
        self._begun = False  # whether there was any text
        self._head: list[int] = []  # ids before there was any
        self._run: list[int] = []  # ids whose text is not final
        self._characters = _Utf8Decoder(
            "replace"
        )  # of a byte-level decoder: holds the bytes of an incomplete one
        # Of a run of byte tokens, where there are stop strings: its text so far, and a decoder of its bytes, None once
        # one is invalid.
        self._draft = ""
        self._bytes: codecs.IncrementalDecoder | None = _Utf8Decoder()

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that has become final, often ""."""
        if self._tokenizer is None or self.stopped:
            return ""
        text = self._push(token_id, self._tokenizer)
        if not self._stop:
            return text
        self._held += text
        # A run of byte tokens that spells a stop string now might not after one more byte, but no more will come.
        draft = (
            self._draft
            if self._tokenizer.anchor
            else self._run_text(self._tokenizer).rstrip(REPLACEMENT)
        )
        return self._release(draft, final=False) if text or draft else ""

    def finish(self) -> str:
        """Return the withheld rest, after the last token; "" in a second call."""
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
        """Take the text of the run as final."""
        if not self._begun:
            self._begun = bool(text)
            self._head = [] if text else self._head + self._run
        self._run = []
        self._draft = ""
        self._bytes = _Utf8Decoder()
        return text

    def _release(self, draft: str, *, final: bool) -> str:
        """Return the held text up to a stop string, or up to what may begin one."""
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
        raise OptionError(f"stop is the string {stop!r}; pass a list of strings")
    for index, text in enumerate(stop):
        if not isinstance(text, str) or not text:
            raise OptionError(
                f"stop string {index} is {text!r}; pass strings of at least one character"
            )
    if stop and tokenizer is None:
        raise OptionError(
            "stop strings need text, and there is no tokenizer (the bundle has none, or "
            "trust_templates is False); "
            "leave them out"
        )


def _begun(text: str, stop: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that a stop string begins with, but does not end with."""
    longest = 0
    for word in stop:
        start = text.find(word[0], max(0, len(text) - len(word) + 1))
        while start >= 0 and not word.startswith(text[start:]):
            start = text.find(word[0], start + 1)
        if start >= 0:
            longest = max(longest, len(text) - start)
    return longest
