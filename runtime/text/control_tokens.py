"""Control tokens, such as <|im_start|>, that stand in a user's text: spelled as text, so that they control nothing.

A chat template writes control tokens into the same text as the contents of messages. So before it does, each control
token in a message gives way to a character that nobody uses; those of the template then stand alone, are marked by
names that nobody can guess, and the tokenizer is told to take none but these for control tokens.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import tokenizers

from runtime.errors import PromptError

# Private use, planes 15 and 16.
_UNUSED = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
# How deep the values of messages may be nested.
_DEPTH = 64

# Encodes with a tokenizer, with the special tokens that it adds or without; raises PromptError.
Encode = Callable[[tokenizers.Tokenizer, str, bool], tokenizers.Encoding]


class Escaped(NamedTuple):
    """Messages without control tokens; `characters` stand for those that were there. `found`: whether any were."""

    messages: Sequence[Mapping[str, Any]]
    characters: Mapping[str, str]
    found: bool


class ControlTokens:
    """The special added tokens of a tokenizer. Safe to use from many threads."""

    def __init__(self, backend: tokenizers.Tokenizer, encode: Encode) -> None:
        self._backend, self._encode = backend, encode
        added = backend.get_added_tokens_decoder()
        self._added = {token.content: (index, token) for index, token in added.items() if token.content}
        self._special = {content: index for content, (index, token) in self._added.items() if token.special}
        self._by_text = _any_of(self._special)
        # Their forms are many: what the normalizer makes equal.
        self._normalized = backend.normalizer is not None and any(
            token.normalized for token in added.values() if token.special
        )

    @cached_property
    def plain(self) -> tokenizers.Tokenizer:
        """A copy of the tokenizer for which control tokens are text, but for the aliases of each."""
        copy = tokenizers.Tokenizer.from_str(self._backend.to_str())
        copy.no_truncation()
        copy.no_padding()
        copy.add_tokens([self._alias(content) for content in self._special])
        copy.encode_special_tokens = True
        return copy

    def encode_plain(self, text: str, special: bool) -> list[int]:
        """Token ids of `text` in which no control token is one. Raises PromptError where they cannot be spelled."""
        return self._checked(self._encode(self.plain, text, special))

    def escape(self, messages: Sequence[Mapping[str, Any]], template: str) -> Escaped:
        texts = _texts(messages)
        found = {match[0] for text in texts for match in self._by_text.finditer(text)} if self._special else set()
        if not found:
            return Escaped(messages, {}, self._normalized and any(map(self._has_special, texts)))
        used = {character for text in (template, *texts) for character in text if ord(character) >= _UNUSED[0].start}
        unused = (chr(code) for codes in _UNUSED for code in codes if chr(code) not in used)
        characters = dict(zip(unused, sorted(found), strict=False))
        if len(characters) < len(found):
            raise PromptError("the messages use all private characters of Unicode beside control tokens; remove some")
        standing = {content: character for character, content in characters.items()}

        def escape(text: str) -> str:
            return self._by_text.sub(lambda match: standing[match[0]], text)

        return Escaped([_mapped(message, escape) for message in messages], characters, True)

    def encode_escaped(self, text: str, characters: Mapping[str, str]) -> list[int]:
        """Token ids of a rendered conversation: its control tokens are such, those in place of `characters` text."""
        aliases = 0

        def mark(match: re.Match[str]) -> str:
            nonlocal aliases
            if match[0] in characters:
                return characters[match[0]]
            if match[0] not in self._special:
                return match[0]
            aliases += 1
            return self._alias(match[0]).content

        encoding = self._encode(self.plain, _any_of([*self._added, *characters]).sub(mark, text), False)
        if sum(index in self._controls for index in encoding.ids) != aliases:
            raise self._not_text()
        return [self._controls.get(index, index) for index in self._checked(encoding)]

    @cached_property
    def _nonce(self) -> str:
        return secrets.token_hex(16)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {content: number for number, content in enumerate(self._special)}

    @cached_property
    def _controls(self) -> dict[int, int]:
        """The id of each control token, by that of its alias."""
        aliases = {self.plain.token_to_id(self._alias(content).content): id_ for content, id_ in self._special.items()}
        if not aliases.keys().isdisjoint(self._backend.get_vocab(with_added_tokens=True).values()):
            raise self._not_text()  # ids beyond the size of a vocabulary with holes
        return {alias: id_ for alias, id_ in aliases.items() if alias is not None}

    def _alias(self, content: str) -> tokenizers.AddedToken:
        token = self._added[content][1]
        return tokenizers.AddedToken(
            f"{self._nonce}x{self._numbers[content]:06d}x",
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=token.normalized,
            special=False,
        )

    def _has_special(self, text: str) -> bool:
        return any(index in self._ids for index in self._encode(self._backend, text, False).ids)

    @cached_property
    def _ids(self) -> frozenset[int]:
        # A model gives its unknown token for any text that it has no tokens for.
        unknown = getattr(self._backend.model, "unk_token", None)
        return frozenset(index for content, index in self._special.items() if content != unknown)

    def _checked(self, encoding: tokenizers.Encoding) -> list[int]:
        # A model whose vocabulary has control tokens among the words finds them in text too.
        ids: list[int] = encoding.ids
        if any(
            index in self._ids and not added for index, added in zip(ids, encoding.special_tokens_mask, strict=True)
        ):
            raise self._not_text()
        return ids

    @staticmethod
    def _not_text() -> PromptError:
        return PromptError(
            "the prompt has a control token that this tokenizer cannot spell as text; remove it, or pass "
            "parse_special=True where its source is trusted"
        )


def _any_of(texts: Sequence[str] | Mapping[str, Any]) -> re.Pattern[str]:
    """The longest of `texts` at the first place where one stands."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def _mapped(value: Any, change: Callable[[str], str], depth: int = 0) -> Any:
    """`value` with every text in it changed, keys too, down to a depth."""
    if isinstance(value, str):
        return change(value)
    if depth < _DEPTH and isinstance(value, Mapping):
        return {_mapped(key, change, _DEPTH): _mapped(inner, change, depth + 1) for key, inner in value.items()}
    if depth < _DEPTH and isinstance(value, (list, tuple)):
        return [_mapped(inner, change, depth + 1) for inner in value]
    return value


def _texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    for message in messages:
        _mapped(message, note)
    return found
