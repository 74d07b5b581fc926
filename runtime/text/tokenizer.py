"""Converts text to token ids and back, with the bundle's tokenizer.json and chat template."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from runtime.bundle.json_file import LARGEST_FILE, UnreadableError, read_object, read_text
from runtime.errors import BundleError, PromptError, one_line
from runtime.text.control_tokens import ControlTokens

if TYPE_CHECKING:
    from runtime.text.chat_template import ChatTemplate

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
FILES = (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE)
LARGEST_CONFIG = 4 << 20  # bytes
# Limits of a chain of replacements. Lengths multiply: eight that write a hundred characters for one
# exhaust the memory.
MAX_STEPS = 64
MAX_GROWTH = 1000
# Decoder steps that convert each token to text independently, except that the first may lose
# leading spaces.
TOKEN_BY_TOKEN = re.compile(
    r"(ByteLevel )|((Metaspace|WordPiece|Replace|Strip|StripLeft) )*"
    r"(ByteFallback )?(Fuse )?(StripLeft )*"
)
# As parsed by ByteFallback, which accepts a sign.
BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2}|[+][0-9A-Fa-f])>")
# How byte-level tokenizers write bytes (GPT-2): printable ones as the character of the same number,
# others from 256 on.
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = (byte for byte in range(256) if byte not in _PRINTABLE)
BYTE_LETTERS = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + n): byte for n, byte in enumerate(_OTHERS)
}
# Texts longer than this, in characters, are encoded without the GIL, so other threads can continue.
LONG_TEXT = 10_000


class Tokenizer:
    """The tokenizer of a bundle. Thread-safe.

    Args:
        backend: The tokenizer.
        chat_template: Source of the chat template, if any.
        special_tokens: Special tokens by name (bos_token, eos_token, ...), which a chat template
            may use.

    Attributes:
        special_ids: Ids that `decode` skips.
        known_texts: Cached texts of single tokens after the first.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.known_texts: dict[int, str] = {}
        self._known_bytes: dict[int, bytes] = {}
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)

    @classmethod
    def load(cls, bundle_dir: Path, listed: Container[str] = FILES) -> Tokenizer | None:
        """Load the tokenizer of a bundle. Returns None if it has none.

        Reads tokenizer.json and, if they exist, chat_template.jinja and tokenizer_config.json.
        Files that are not `listed` in the manifest are ignored.

        Raises:
            BundleError: If a file cannot be read.
        """
        path = bundle_dir / TOKENIZER
        source = _read(path, listed, LARGEST_FILE)
        if source is None:
            return None
        try:
            backend = tokenizers.Tokenizer.from_str(source)
        except BaseException as error:
            # The library raises bare Exception for anything it cannot parse.
            if not _by_the_library(error):
                raise
            raise _broken(path, error) from None
        problem = _growth_problem(backend)
        if problem is not None:
            raise _broken(path, ValueError(problem))
        template = _read(bundle_dir / CHAT_TEMPLATE, listed, LARGEST_CONFIG)
        return cls(backend, template, _special_tokens(bundle_dir / TOKENIZER_CONFIG, listed))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including added ones. A model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: The text.
            special: Add the tokenizer's special tokens, such as bos and eos.
            parse_special: Convert control tokens spelled in the text to their ids.

        Raises:
            PromptError: If the tokenizer cannot encode the text.
        """
        if parse_special:
            return self._encoding(self._backend, text, special).ids
        return self._controls.encode_plain(text, special)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        parse_special: bool = False,
        check: Callable[[str], None] | None = None,
    ) -> list[int]:
        """Return the token ids of a conversation, up to where the model's answer starts.

        Args:
            messages: The messages.
            tools: Functions that the model may call.
            parse_special: Convert control tokens spelled in messages and tools to their ids. By
                default they are encoded as text.
            check: Called with the rendered text before it is encoded.

        Raises:
            PromptError: If the template rejects the messages, or the text cannot be encoded.
        """

        def render(given: Any) -> str:
            text = self.render_chat(*given)
            if check is not None:
                check(text)
            return text

        if parse_special:
            return self.encode(render((messages, tools)), special=False)
        return self._controls.encode_chat((messages, tools), self.chat_template or "", render)

    def _encoding(
        self, backend: tokenizers.Tokenizer, text: str, special: bool
    ) -> tokenizers.Encoding:
        try:
            if len(text) > LONG_TEXT:
                return backend.encode_batch_fast([text], add_special_tokens=special)[0]
            return backend.encode(text, add_special_tokens=special)
        except BaseException as error:
            # Bare Exception for a missing unknown token, TypeError for a lone surrogate.
            if not _by_the_library(error):
                raise
            raise PromptError(
                f"the tokenizer cannot encode the text ({one_line(error)}); change it"
            ) from None

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the text of a conversation, including the template's special tokens.

        Raises:
            PromptError: If there is no chat template, or it rejects the messages.
            BundleError: If it is not valid.
        """
        if self.chat_template is None:
            raise PromptError(
                "the bundle has no chat template; pass the prompt as text or token ids"
            )
        return self._template.render(messages, self.special_tokens, tools)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, skipping special tokens and ids without a token.

        Raises:
            PromptError: If the tokenizer cannot decode them.
        """
        try:
            return self._backend.decode(ids, skip_special_tokens=True)
        except BaseException as error:
            if not _by_the_library(error):
                raise
            raise PromptError(
                f"the tokenizer cannot decode the {len(ids)} tokens ({one_line(error)}); change "
                "the prompt, or fix the decoder in tokenizer.json"
            ) from None

    def token(self, token_id: int) -> str | None:
        """Return a token as written in the vocabulary, None if the id has none."""
        return self._backend.id_to_token(token_id)

    @cached_property
    def decoder_kinds(self) -> tuple[str, ...]:
        """Types of the decoder's steps. A Strip of the left side only is a StripLeft."""
        return tuple(
            "StripLeft" if step["type"] == "Strip" and step["stop"] == 0 else step["type"]
            for step in _steps(self._backend.decoder)
        )

    @cached_property
    def byte_level(self) -> bool:
        """True if tokens are bytes, written as letters. Text is their concatenation in UTF-8."""
        return self.decoder_kinds == ("ByteLevel",)

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of a token of a byte-level tokenizer, empty if `decode` skips it."""
        encoded = self._known_bytes.get(token_id)
        if encoded is None:
            token = "" if token_id in self.special_ids else self.token(token_id) or ""
            # A token with any other character was added as text.
            spelt = all(letter in BYTE_LETTERS for letter in token)
            encoded = bytes(BYTE_LETTERS[letter] for letter in token) if spelt else token.encode()
            self._known_bytes[token_id] = encoded
        return encoded

    @cached_property
    def anchor(self) -> tuple[int, int] | None:
        """A token that has text even as the first one, and the length of that text.

        Tokens after it are decoded as they are within a text. None if the decoder's text is only
        known at the end.
        """
        if TOKEN_BY_TOKEN.fullmatch("".join(f"{kind} " for kind in self.decoder_kinds)) is None:
            return None
        for token_id in range(self.vocab_size):
            token = self.token(token_id)
            if token is not None and token_id not in self.special_ids and byte_of(token) is None:
                text = self.decode([token_id])
                if text and "\ufffd" not in text:
                    return token_id, len(text)
        return None

    @property
    def keeps_leading_space(self) -> bool:
        """True if a leading space of the first token is decoded."""
        return {"Metaspace", "WordPiece", "StripLeft"}.isdisjoint(self.decoder_kinds)

    @property
    def source(self) -> str:
        """The JSON of tokenizer.json."""
        return self._backend.to_str()

    @cached_property
    def _controls(self) -> ControlTokens:
        return ControlTokens(self._backend, self._encoding)

    @cached_property
    def _template(self) -> ChatTemplate:
        from runtime.text.chat_template import ChatTemplate  # load jinja2 only for chats

        return ChatTemplate(self.chat_template or "")


def byte_of(token: str) -> int | None:
    """Return the byte of a token such as <0x0A>, None for other tokens."""
    match = BYTE_TOKEN.fullmatch(token)
    return None if match is None else int(match[1], 16)


def _read(path: Path, listed: Container[str], limit: int) -> str | None:
    if path.name not in listed or not path.exists():
        return None
    try:
        return read_text(path, limit)
    except UnreadableError as error:
        raise _broken(path, error) from None


def _special_tokens(path: Path, listed: Container[str]) -> dict[str, str]:
    if path.name not in listed or not path.exists():
        return {}
    config = read_object(path, "convert the checkpoint again", limit=LARGEST_CONFIG)
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    contents = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in named.items()
    }
    return {name: value for name, value in contents.items() if isinstance(value, str)}


def _steps(part: Any) -> list[dict[str, Any]]:
    """Return the steps of a normalizer, decoder or post-processor as in tokenizer.json.

    Sequences are flattened.
    """

    def flat(state: dict[str, Any]) -> list[dict[str, Any]]:
        inner = next(
            (state[name] for name in ("normalizers", "decoders", "processors") if name in state),
            None,
        )
        return [state] if inner is None else [step for each in inner for step in flat(each)]

    return flat(json.loads(part.__getstate__())) if part is not None else []


def _growth_problem(backend: tokenizers.Tokenizer) -> str | None:
    """Return how a tokenizer could make a text much longer, None if its steps cannot."""
    for kind, part in (("normalizers", backend.normalizer), ("decoders", backend.decoder)):
        steps = _steps(part)
        if len(steps) > MAX_STEPS:
            return f"it has {len(steps)} {kind}, at most {MAX_STEPS} are run"
        growth = math.prod(map(_growth, steps))
        if growth > MAX_GROWTH:
            return (
                f"its {kind} can make a text {growth:.0f} times as long, at most {MAX_GROWTH} "
                "times is allowed"
            )
    copies = math.prod(
        max(1, sum("Sequence" in piece for piece in step.get("single") or ()))
        for step in _steps(backend.post_processor)
    )
    return f"its post-processor repeats a text {copies} times" if copies > 2 else None


def _growth(step: dict[str, Any]) -> float:
    """Return the maximum number of characters that a step writes per character it reads."""
    if step.get("type") != "Replace":
        return 1.0
    content = len(step["content"])
    pattern = step["pattern"].get("String")
    # A regular expression can match the empty string, between any two characters.
    return max(1.0, content / len(pattern)) if pattern else content + 1.0


def _by_the_library(error: BaseException) -> bool:
    """Return True if the tokenizers library raised this error.

    A panic of its Rust code, for example of a regular expression that gives up, is a BaseException,
    which would end the thread.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _broken(path: Path, error: BaseException) -> BundleError:
    return BundleError(f"{path} cannot be read ({one_line(error)}); convert the checkpoint again")
