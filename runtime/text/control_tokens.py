"""Encodes control tokens in a user's text, such as <|im_start|>, as text, so they have no effect.

A chat template writes its control tokens into the same text as the contents of messages. Therefore
each control token in a message is first replaced by an unused character. The remaining ones are the
template's. They are replaced by aliases that nobody can guess, and a copy of the tokenizer treats
only these as control tokens.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import tokenizers

from runtime.errors import PromptError

# Private use characters, planes 15 and 16.
_UNUSED = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
# Maximum nesting depth of values in messages.
_DEPTH = 64

# Encodes a text with a tokenizer, with or without its special tokens. Raises PromptError.
Encode = Callable[[tokenizers.Tokenizer, str, bool], tokenizers.Encoding]


class ControlTokens:
    """The special added tokens of a tokenizer. Thread-safe.

    Args:
        backend: The tokenizer.
        encode: Encodes with it or with a copy of it.

    Attributes:
        aliases: Alias of each control token.
    """

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
        # The unknown token is not a control token: any text without tokens of its own encodes to
        # it.
        unknown = getattr(backend.model, "unk_token", None)
        self._ids = frozenset(
            index for content, index in self._special.items() if content != unknown
        )
        # A normalizer can map many spellings to the same token.
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
        """Return the token ids of `text` with all control tokens encoded as text.

        Raises:
            PromptError: If the tokenizer cannot encode them as text.
        """
        return self._checked(self._encode(self._plain, text, special))

    def encode_chat(self, messages: Any, template: str, render: Callable[[Any], str]) -> list[int]:
        """Return the token ids of a conversation, with control tokens in messages encoded as text.

        This includes those nested in lists and mappings.

        Args:
            messages: The messages.
            template: Source of the chat template.
            render: Renders messages with it.

        Raises:
            PromptError: If the tokenizer cannot encode them as text.
        """
        texts = list[str]()

        def note(text: str) -> str:
            texts.append(text)
            return text

        _mapped(messages, note)
        characters_used = (
            {match[0] for text in texts for match in self._pattern.finditer(text)}
            if self._special
            else set()
        )
        if not characters_used and not (self._normalized and any(map(self._has_special, texts))):
            return self._encode(self._backend, render(messages), False).ids
        used = set().union(template, *texts)
        unused = (chr(code) for codes in _UNUSED for code in codes if chr(code) not in used)
        characters = dict(zip(sorted(characters_used), unused, strict=False))
        if len(characters) < len(characters_used):
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
        """Return the token ids of a rendered conversation.

        Its control tokens take effect. `characters` stand for control tokens that are encoded as
        text.
        """
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
        """A copy of the tokenizer with the aliases as tokens. It encodes control tokens as text."""
        copy = tokenizers.Tokenizer.from_str(self._backend.to_str())
        copy.no_truncation()
        copy.no_padding()
        copy.add_tokens(list(self.aliases.values()))
        copy.encode_special_tokens = True
        return copy

    @cached_property
    def _controls(self) -> dict[int, int]:
        """Ids of control tokens by the ids of their aliases."""
        ids = {
            self._plain.token_to_id(self.aliases[content].content): id_
            for content, id_ in self._special.items()
        }
        if not ids.keys().isdisjoint(self._backend.get_vocab(with_added_tokens=True).values()):
            raise _not_text()  # the vocabulary has gaps, so new ids collide with existing ones
        return {alias: id_ for alias, id_ in ids.items() if alias is not None}

    def _has_special(self, text: str) -> bool:
        return not self._ids.isdisjoint(self._encode(self._backend, text, False).ids)

    def _checked(self, encoding: tokenizers.Encoding) -> list[int]:
        # If control tokens are also in the model's own vocabulary, it finds them in text.
        marked = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        if any(index in self._ids and not added for index, added in marked):
            raise _not_text()
        ids: list[int] = encoding.ids
        return ids


def _not_text() -> PromptError:
    return PromptError(
        "the prompt has a control token that this tokenizer cannot encode as text; remove it, or "
        "pass parse_special=True if its source is trusted"
    )


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches the longest of `texts` at each place."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def _mapped(value: Any, change: Callable[[str], str], depth: int = 0) -> Any:
    """Return `value` with all strings in it changed, including keys, down to a maximum depth."""
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
