"""Text of a growing list of token ids, handed out as soon as it is final, up to the first stop string."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

from runtime.errors import OptionError
from runtime.text.tokenizer import Tokenizer

# Decoders that turn each token into text by itself, except that the first one may lose a leading space.
_PER_TOKEN = frozenset({"Metaspace", "WordPiece", "Replace", "Strip"})


class Detokenizer:
    """Final text of a token sequence, token by token.

    What `push` and `finish` return, joined, is `tokenizer.decode` of all ids, cut before the first stop string. First
    is the one completed earliest in the text (of two completed by one character, the longer), so the result does not
    depend on how the text falls into tokens. `stopped` is set by the token that completes it; later tokens are ignored.

    Withheld until it is certain: an incomplete UTF-8 character, a run of byte tokens (of a ByteFallback decoder: one
    invalid byte turns the whole run into U+FFFD), a suffix that may begin a stop string, and all text of a decoder that
    is neither byte-level nor token by token (CTC, BPEDecoder). `tokenizers.decoders.DecodeStream` does not withhold
    such runs and is several times as slow: a push here looks up what it has seen.

    Without a tokenizer the text is always "". Raises OptionError for stop strings that are empty or not strings, or
    without a tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()) -> None:
        _check_stop(tokenizer, stop)
        self.stopped = False
        self._stop = tuple(dict.fromkeys(stop))
        self._decoding = _decoding_of(tokenizer) if tokenizer is not None else None
        self._held = ""
        # Takes the next token; returns the text that has become final, often "".
        self.push: Callable[[int], str] = _no_text
        if self._decoding is not None:
            self.push = self._push_until_stop if self._stop else self._decoding.push

    def _push_until_stop(self, token_id: int) -> str:
        if self._decoding is None or self.stopped:
            return ""
        settled = self._decoding.push(token_id)
        self._held += settled
        draft = self._decoding.draft()
        return self._release(draft, final=False) if settled or draft else ""

    def finish(self) -> str:
        """The withheld rest, after the last token. A second call returns ""."""
        if self._decoding is None or self.stopped:
            return ""
        self._held += self._decoding.flush()
        return self._release("", final=True)

    def _release(self, draft: str, *, final: bool) -> str:
        # A run of byte tokens that spells a stop string now might not after one more byte, but no more will come.
        text = self._held + draft
        end = _first_stop(text, self._stop)
        if end is not None:
            self.stopped, self._held = True, ""
            return text[:end]
        end = len(self._held) - (0 if final else _begun(self._held, self._stop))
        text, self._held = self._held[:end], self._held[end:]
        return text


def _no_text(_: int) -> str:
    return ""


def _check_stop(tokenizer: Tokenizer | None, stop: Sequence[str]) -> None:
    if isinstance(stop, str):
        raise OptionError(f"stop is the string {stop!r}; pass a list of strings")
    for index, text in enumerate(stop):
        if not isinstance(text, str) or not text:
            raise OptionError(f"stop string {index} is {text!r}; pass strings of at least one character")
    if stop and tokenizer is None:
        raise OptionError(
            "stop strings need text, and there is no tokenizer (the bundle has none, or trust_templates is False); "
            "leave them out"
        )


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """The place where the stop string that ends first begins; None where there is none."""
    spans = [(start + len(word), start) for word in stop if (start := text.find(word)) >= 0]
    return min(spans)[1] if spans else None


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


class _Decoding(Protocol):
    def push(self, token_id: int) -> str:
        """Text that no later token can change."""

    def draft(self) -> str:
        """Text after that, if this were the last token; "" where it is not a whole number of characters."""

    def flush(self) -> str:
        """Text after that, for no token follows."""


def _decoding_of(tokenizer: Tokenizer) -> _Decoding:
    names = [step["type"] for step in tokenizer.decoder_steps]
    if names == ["ByteLevel"]:
        return _ByteLevel(tokenizer)
    anchor = _anchor(tokenizer) if _token_by_token(tokenizer, names) else None
    return _TokenByToken(tokenizer, anchor) if anchor is not None else _Whole(tokenizer)


def _token_by_token(tokenizer: Tokenizer, names: list[str]) -> bool:
    # Per-token steps, then ByteFallback, then Fuse; after that, a Strip at the left touches only the first text.
    join = next((index for index, name in enumerate(names) if name in ("ByteFallback", "Fuse")), len(names))
    before, after = names[:join], names[join:]
    strips = [step for step in tokenizer.decoder_steps[join:] if step["type"] == "Strip"]
    joined = after[: len(after) - len(strips)]
    return (
        _PER_TOKEN.issuperset(before)
        and joined in ([], ["ByteFallback"], ["ByteFallback", "Fuse"], ["Fuse"])
        and all(step["stop"] == 0 for step in strips)
    )


def _anchor(tokenizer: Tokenizer) -> int | None:
    """A token that is text even as the first one, so that whatever follows it is decoded as it is in mid-text."""
    for token_id in range(tokenizer.vocab_size):
        token = tokenizer.token(token_id)
        if token is None or token_id in tokenizer.special_ids or _is_byte(token):
            continue
        if tokenizer.decode([token_id]):
            return token_id
    return None


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


class _ByteLevel:
    """Tokens are bytes in disguise: all that can be open is one UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._texts = tokenizer, tokenizer.known_texts
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._open = False

    def push(self, token_id: int) -> str:
        if not self._open and token_id in self._texts:
            return self._texts[token_id]
        text = self._utf8.decode(self._bytes_of(token_id))
        begun, self._open = self._open, bool(self._utf8.getstate()[0])
        if not begun and not self._open:
            self._texts[token_id] = text
        return text

    def _bytes_of(self, token_id: int) -> bytes:
        token = self._tokenizer.token(token_id)
        if token is None or token_id in self._tokenizer.special_ids:
            return b""
        try:
            return bytes([_BYTES[letter] for letter in token])
        except KeyError:  # an added token, spelt as it reads
            return token.encode()

    def draft(self) -> str:
        return ""

    def flush(self) -> str:
        self._open = False
        return self._utf8.decode(b"", final=True)


def _byte_letters() -> dict[str, int]:
    # The byte-level alphabet: a printable Latin-1 byte is its own letter, the others count up from U+0100.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


_BYTES = _byte_letters()


class _TokenByToken:
    """Each token has its own text, but for the first one, and for runs of byte tokens, which settle as one."""

    def __init__(self, tokenizer: Tokenizer, anchor: int) -> None:
        self._tokenizer = tokenizer
        self._byte_fallback = any(step["type"] == "ByteFallback" for step in tokenizer.decoder_steps)
        self._anchor = [anchor]
        self._anchor_length = len(tokenizer.decode([anchor]))
        self._begun = False
        self._head: list[int] = []  # ids before there is any text
        self._run: list[int] = []  # ids that are not settled

    def push(self, token_id: int) -> str:
        settled = self._begun and not self._run
        if settled and token_id in self._tokenizer.known_texts:
            return self._tokenizer.known_texts[token_id]
        token = self._tokenizer.token(token_id)
        if token is None or token_id in self._tokenizer.special_ids:
            return ""
        self._run.append(token_id)
        if self._byte_fallback and _is_byte(token):
            return ""
        text = self.flush()
        if settled:
            self._tokenizer.known_texts[token_id] = text
        return text

    def draft(self) -> str:
        text = self._run_text() if self._run else ""
        return "" if "\ufffd" in text else text

    def flush(self) -> str:
        text = self._run_text() if self._run else ""
        if not self._begun:
            self._begun = bool(text)
            self._head = [] if text else self._head + self._run
        self._run = []
        return text

    def _run_text(self) -> str:
        if not self._begun:
            return self._tokenizer.decode(self._head + self._run)
        return self._tokenizer.decode(self._anchor + self._run)[self._anchor_length :]


class _Whole:
    """A decoder about which nothing is known: any token may change all of the text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        return ""

    def draft(self) -> str:
        return self._tokenizer.decode(self._ids)

    def flush(self) -> str:
        ids, self._ids = self._ids, []
        return self._tokenizer.decode(ids)
