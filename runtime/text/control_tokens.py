"""Control tokens, such as <|im_start|>, that a user's text spells: encoded as text, so that they control nothing.

A chat template writes control tokens into the same text as the contents of messages. So before it does, each control
token in a message gives way to a character that nobody uses; those of the template then stand alone and are replaced by
aliases that nobody can guess, and a copy of the tokenizer takes none but these for control tokens.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import tokenizers

from runtime.errors import PromptError

# Private use, planes 15 and 16.
_UNUSED = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
# How deep the values of messages may be nested.
_DEPTH = 64

# Encodes with a tokenizer, with the special tokens that it adds or without; raises PromptError.
Encode = Callable[[tokenizers.Tokenizer, str, bool], tokenizers.Encoding]


class ControlTokens:
    """The special added tokens of a tokenizer. Safe to use from many threads."""

    def __init__(self, backend: tokenizers.Tokenizer, encode: Encode) -> None:
        self._backend = backend
        self._encode = encode
        added = {
            index: token
            for index, token in backend.get_added_tokens_decoder().items()
            if token.content
        }
        self._added = [token.content for token in added.values()]
        self._special = {token.content: index for index, token in added.items() if token.special}
        self._pattern = _any_of(self._special)
        # A model gives its unknown token for any text that it has no tokens for.
        unknown = getattr(backend.model, "unk_token", None)
        self._ids = frozenset(
            index for content, index in self._special.items() if content != unknown
        )
        # A normalizer makes many forms equal to a token.
        self._normalized = backend.normalizer is not None and any(
            token.normalized for token in added.values() if token.special
        )
        nonce = secrets.token_hex(16)
        self.aliases = {
            content: tokenizers.AddedToken(
                f"{nonce}x{number:06d}x",
                single_word=added[index].single_word,
                lstrip=added[index].lstrip,
                rstrip=added[index].rstrip,
                normalized=added[index].normalized,
                special=False,
            )
            for number, (content, index) in enumerate(self._special.items())
        }

    def encode_plain(self, text: str, special: bool) -> list[int]:
        """Token ids of `text` in which no control token is one. Raises PromptError where they cannot be spelled."""
        return self._checked(self._encode(self._plain, text, special))

    def encode_chat(self, messages: Any, template: str, render: Callable[[Any], str]) -> list[int]:
        """Token ids of a conversation rendered by `template`, in which control tokens in messages are text, however
        deep they stand in lists and mappings."""
        texts = list[str]()

        def note(text: str) -> str:
            texts.append(text)
            return text

        _mapped(messages, note)
        found = (
            {match[0] for text in texts for match in self._pattern.finditer(text)}
            if self._special
            else set()
        )
        if not found and not (self._normalized and any(map(self._has_special, texts))):
            return self._encode(self._backend, render(messages), False).ids
        used = set().union(template, *texts)
        unused = (chr(code) for codes in _UNUSED for code in codes if chr(code) not in used)
        characters = dict(zip(sorted(found), unused, strict=False))
        if len(characters) < len(found):
            raise PromptError(
                "the messages use all private characters of Unicode beside control tokens; "
                "remove some"
            )
        escaped = _mapped(
            messages, lambda text: self._pattern.sub(lambda match: characters[match[0]], text)
        )
        return self.encode_escaped(
            render(escaped), {character: content for content, character in characters.items()}
        )

    def encode_escaped(self, text: str, characters: Mapping[str, str]) -> list[int]:
        """Token ids of a rendered conversation: its control tokens are such, those in place of `characters` text."""
        pattern = _any_of([*self._added, *characters])
        names = {content: alias.content for content, alias in self.aliases.items()} | dict(
            characters
        )
        count = sum(
            match[0] in self._special and match[0] not in characters
            for match in pattern.finditer(text)
        )
        encoding = self._encode(
            self._plain, pattern.sub(lambda match: names.get(match[0], match[0]), text), False
        )
        if sum(index in self._controls for index in encoding.ids) != count:
            raise _not_text()
        return [self._controls.get(index, index) for index in self._checked(encoding)]

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A copy of the tokenizer for which control tokens are text, but for the aliases of each."""
        copy = tokenizers.Tokenizer.from_str(self._backend.to_str())
        copy.no_truncation()
        copy.no_padding()
        copy.add_tokens(list(self.aliases.values()))
        copy.encode_special_tokens = True
        return copy

    @cached_property
    def _controls(self) -> dict[int, int]:
        """The id of each control token, by that of its alias."""
        found = {
            self._plain.token_to_id(self.aliases[content].content): id_
            for content, id_ in self._special.items()
        }
        if not found.keys().isdisjoint(self._backend.get_vocab(with_added_tokens=True).values()):
            raise _not_text()  # ids beyond the size of a vocabulary with holes
        return {alias: id_ for alias, id_ in found.items() if alias is not None}

    def _has_special(self, text: str) -> bool:
        return not self._ids.isdisjoint(self._encode(self._backend, text, False).ids)

    def _checked(self, encoding: tokenizers.Encoding) -> list[int]:
        # A model whose vocabulary has control tokens among the words finds them in text too.
        marked = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        if any(index in self._ids and not added for index, added in marked):
            raise _not_text()
        ids: list[int] = encoding.ids
        return ids


def _not_text() -> PromptError:
    return PromptError(
        "the prompt has a control token that this tokenizer cannot spell as text; remove it, or "
        "pass "
        "parse_special=True where its source is trusted"
    )


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern of the longest of `texts` at the first place where one stands."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def _mapped(value: Any, change: Callable[[str], str], depth: int = 0) -> Any:
    """`value` with every text in it changed, keys too, down to a depth."""
    if isinstance(value, str):
        return change(value)
    if depth <= _DEPTH and isinstance(value, Mapping):
        return {
            _mapped(key, change, _DEPTH + 1): _mapped(inner, change, depth + 1)
            for key, inner in value.items()
        }
    if depth <= _DEPTH and isinstance(value, (list, tuple)):
        return [_mapped(inner, change, depth + 1) for inner in value]
    return value
