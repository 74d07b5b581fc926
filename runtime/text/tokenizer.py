"""Text to token ids and back, as the bundle's tokenizer.json and chat template say."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from runtime.errors import BundleError, PromptError, one_line
from runtime.json_file import LARGEST_FILE, UnreadableError, read_object, read_text
from runtime.text.control_tokens import ControlTokens

if TYPE_CHECKING:
    from runtime.text.chat_template import ChatTemplate

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
FILES = (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE)
LARGEST_CONFIG = 4 << 20  # bytes
# A chain of replacements multiplies: eight that write a hundred characters for one end the process for want of memory.
MOST_STEPS = 64
MOST_GROWTH = 1000
# Steps of decoders that turn each token into text by itself, except that the first one may lose leading spaces.
TOKEN_BY_TOKEN = re.compile(
    r"(ByteLevel )|((Metaspace|WordPiece|Replace|Strip|StripLeft) )*(ByteFallback )?(Fuse )?(StripLeft )*"
)
# As ByteFallback reads it, a sign included.
BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2}|[+][0-9A-Fa-f])>")
# How byte-level tokenizers spell bytes (GPT-2): printable ones as the character of that number, the others from 256 on.
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = (byte for byte in range(256) if byte not in _PRINTABLE)
BYTE_LETTERS = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + n): byte for n, byte in enumerate(_OTHERS)
}
# Texts of more characters are encoded without the interpreter's lock: other threads go on.
LONG_TEXT = 10_000


class Tokenizer:
    """The tokenizer of a bundle. Safe to use from many threads at once.

    `special_ids` are the ids that `decode` leaves out, `special_tokens` the strings a chat template may name
    (bos_token, eos_token ...), `chat_template` its source, or None. `known_texts`: texts of single tokens in mid-text.
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
        """Read tokenizer.json and, where they exist, chat_template.jinja and tokenizer_config.json: only those `listed`
        in a bundle's manifest. None without tokenizer.json. Raises BundleError for a file that cannot be read."""
        path = bundle_dir / TOKENIZER
        source = _read(path, listed, LARGEST_FILE)
        if source is None:
            return None
        try:
            backend = tokenizers.Tokenizer.from_str(source)
        except (
            BaseException
        ) as error:  # the library raises bare Exception for everything it cannot parse
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
        """Number of tokens, added ones included; a model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`, with the special tokens the tokenizer adds (bos, eos) unless `special` is False, and
        control tokens that it spells as their ids unless `parse_special` is False. Raises PromptError for text without
        tokens, not even an unknown one."""
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
        """Token ids of a conversation, ready for the model's answer, which may call `tools`. Control tokens in the
        messages and tools are text, unless `parse_special`. `check` sees the text before it is encoded. Raises as
        `render_chat` does."""

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
        except (
            BaseException
        ) as error:  # bare Exception for a missing unknown token, TypeError for a lone surrogate
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
        """The text of a conversation by the chat template, which writes its special tokens itself. Raises PromptError
        without a template, or as it does for the messages, and BundleError where it is not valid."""
        if self.chat_template is None:
            raise PromptError(
                "the bundle has no chat template; pass the prompt as text or token ids"
            )
        return self._template.render(messages, self.special_tokens, tools)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens and ids without a token are left out. PromptError where it has none."""
        try:
            return self._backend.decode(ids, skip_special_tokens=True)
        except BaseException as error:
            if not _by_the_library(error):
                raise
            raise PromptError(
                f"the tokenizer cannot decode the {len(ids)} tokens ({one_line(error)}); change "
                "the prompt, "
                "or fix the decoder in tokenizer.json"
            ) from None

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, not as text; None for an id that has none."""
        return self._backend.id_to_token(token_id)

    @cached_property
    def decoder_kinds(self) -> tuple[str, ...]:
        """The kinds of the steps that make text of tokens; a Strip that only strips the beginning is a StripLeft."""
        return tuple(
            "StripLeft" if step["type"] == "Strip" and step["stop"] == 0 else step["type"]
            for step in _steps(self._backend.decoder)
        )

    @cached_property
    def byte_level(self) -> bool:
        """Whether tokens are bytes, spelt as letters, and text is what all of them together are in UTF-8."""
        return self.decoder_kinds == ("ByteLevel",)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of a token where `byte_level`; none for an id that `decode` leaves out."""
        found = self._known_bytes.get(token_id)
        if found is None:
            token = "" if token_id in self.special_ids else self.token(token_id) or ""
            # A token with any other character was added as text.
            spelt = all(letter in BYTE_LETTERS for letter in token)
            found = bytes(BYTE_LETTERS[letter] for letter in token) if spelt else token.encode()
            self._known_bytes[token_id] = found
        return found

    @cached_property
    def anchor(self) -> tuple[int, int] | None:
        """A token that is text even as the first one, so whatever follows it is decoded as it is in mid-text, and the
        length of its text. None for a decoder whose text is only known at the end."""
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
        """Whether a space that the first token of a text begins with is decoded."""
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
        from runtime.text.chat_template import ChatTemplate  # jinja2 is loaded for chats alone

        return ChatTemplate(self.chat_template or "")


def byte_of(token: str) -> int | None:
    """The byte that a token such as <0x0A> stands for; None for a token that is text."""
    found = BYTE_TOKEN.fullmatch(token)
    return None if found is None else int(found[1], 16)


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
    """Return the steps of a normalizer, decoder or post-processor as in tokenizer.json; a sequence is flat."""

    def flat(state: dict[str, Any]) -> list[dict[str, Any]]:
        inner = next(
            (state[name] for name in ("normalizers", "decoders", "processors") if name in state),
            None,
        )
        return [state] if inner is None else [step for each in inner for step in flat(each)]

    return flat(json.loads(part.__getstate__())) if part is not None else []


def _growth_problem(backend: tokenizers.Tokenizer) -> str | None:
    """How a tokenizer would make a text much longer, as far as its steps show; None where they are modest."""
    for kind, part in (("normalizers", backend.normalizer), ("decoders", backend.decoder)):
        steps = _steps(part)
        if len(steps) > MOST_STEPS:
            return f"it has {len(steps)} {kind}, at most {MOST_STEPS} are run"
        growth = math.prod(map(_growth, steps))
        if growth > MOST_GROWTH:
            return (
                f"its {kind} can make a text {growth:.0f} times as long, at most {MOST_GROWTH} "
                "times is allowed"
            )
    copies = math.prod(
        max(1, sum("Sequence" in piece for piece in step.get("single") or ()))
        for step in _steps(backend.post_processor)
    )
    return f"its post-processor repeats a text {copies} times" if copies > 2 else None


def _growth(step: dict[str, Any]) -> float:
    """Characters of the result for each of the text, at most."""
    if step.get("type") != "Replace":
        return 1.0
    content = len(step["content"])
    pattern = step["pattern"].get("String")
    # A regular expression may match nothing, and so between any two characters.
    return max(1.0, content / len(pattern)) if pattern else content + 1.0


def _by_the_library(error: BaseException) -> bool:
    """Whether tokenizers raised it. A panic of its Rust code, as of a regular expression that gives up, comes as a
    BaseException, which would end whatever thread this is."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _broken(path: Path, error: BaseException) -> BundleError:
    return BundleError(f"{path} cannot be read ({one_line(error)}); convert the checkpoint again")
