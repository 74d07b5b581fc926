"""Checks a prompt in any of its three forms and converts it to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from runtime.errors import OptionError, PromptError, PromptLengthError, shown
from runtime.text.tokenizer import Tokenizer

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]] | npt.NDArray[np.integer[Any]]

# Real text has 1 to 6 bytes per token, indented code up to about 16. A text with more than this per
# allowed token is too long with any tokenizer (except for runs of spaces), and tokenizing megabytes
# takes seconds.
MAX_BYTES_PER_TOKEN = 64

NO_TOKENIZER = "the bundle has no tokenizer"
UNTRUSTED = "the session does not load the bundle's tokenizer (trust_templates=False)"

_FORMS = "pass text, a list of token ids, or a list of {'role', 'content'} messages"


def encode_prompt(
    prompt: Prompt,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    limit: int,
    parse_special: bool | None = None,
    missing: str = NO_TOKENIZER,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> npt.NDArray[np.int64]:
    """Return the token ids of a prompt, int64 [n].

    1 <= n <= limit, and ids are from 0 to vocab_size - 1.

    Args:
        prompt: Text, which gets the tokenizer's special tokens; token ids, a list or an integer
            array [n], which are used unchanged; or messages, which are rendered by the chat
            template.
        tokenizer: The tokenizer, if any.
        vocab_size: Size of the vocabulary.
        limit: Maximum number of tokens.
        parse_special: Convert control tokens spelled in the prompt to their ids. Default: in text,
            but not in messages.
        missing: Why there is no tokenizer.
        tools: Functions for the chat template.

    Raises:
        PromptError: If the prompt is not valid or does not fit.
    """
    ids: Any = prompt
    text = isinstance(prompt, str)
    chat = isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
    if text or chat:
        if tokenizer is None:
            form = "text" if text else "chat"
            raise PromptError(
                f"{missing}, so it takes no {form}; pass the prompt as a list of token ids"
            )
        if text:
            check_text(ids, limit)
            ids = tokenizer.encode(ids, parse_special=parse_special in (None, True))
        else:
            _check_messages(ids, limit)
            check = lambda rendered: check_text(rendered, limit)  # noqa: E731
            ids = tokenizer.encode_chat(
                ids, tools=tools, parse_special=bool(parse_special), check=check
            )
    return _checked(ids, vocab_size, limit)


def encode_expected(
    given: str | Sequence[int], tokenizer: Tokenizer | None, vocab_size: int, limit: int
) -> npt.NDArray[np.int64]:
    """Return the token ids [n] of the option predicted_output, at most the first `limit`.

    Returns no tokens for an empty one.

    Raises:
        OptionError: If it is neither text nor token ids, or too long.
    """
    try:
        if len(given) == 0:
            return np.empty(0, np.int64)
        if not isinstance(given, str):
            return _checked(given[:limit], vocab_size, limit)
        if tokenizer is None:
            raise OptionError(
                "predicted_output is text, and there is no tokenizer; pass a list of token ids"
            )
        check_text(given, limit)
        return np.array(tokenizer.encode(given, special=False)[:limit], np.int64)
    except PromptError as error:
        raise OptionError(f"predicted_output: {error}".replace("the prompt", "it")) from None


def check_text(text: str, limit: int) -> None:
    """Check a text before it is encoded.

    Raises:
        PromptError: If it is empty, not valid, or too long for `limit` tokens with any tokenizer.
    """
    if not text:
        raise PromptError("the prompt is empty; pass at least one character")
    size = len(text)
    if size <= limit * MAX_BYTES_PER_TOKEN:
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the prompt has a lone surrogate, U+{ord(text[error.start]):04X}, at index "
                f"{error.start}; remove it, or decode the source as UTF-8"
            ) from None
    _check_size(size, limit)


def _check_size(size: int, limit: int) -> None:
    if size > limit * MAX_BYTES_PER_TOKEN:
        raise PromptLengthError(
            f"the prompt has {size} bytes or more, too many for the {limit} tokens that fit; "
            "shorten it, or convert with a larger capacity"
        )


def _check_messages(messages: Sequence[Any], limit: int) -> None:
    """Check messages before they are rendered."""
    if len(messages) > limit:
        raise PromptLengthError(
            f"the prompt has {len(messages)} messages, more than the {limit} tokens that fit; "
            "leave some out"
        )
    size = 0
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise PromptError(f"message {index} is {type(message).__name__}; {_FORMS}")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                problem = f"is {type(message[name]).__name__}" if name in message else "is missing"
                raise PromptError(
                    f"{name!r} of message {index} {problem}; give each message a role and a "
                    "content text"
                )
            size += len(message[name])
    _check_size(size, limit)


def _checked(ids: Any, vocab_size: int, limit: int) -> npt.NDArray[np.int64]:
    """Check token ids and return them as int64."""
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise PromptError(
                f"the prompt is an array of {ids.dtype} {list(ids.shape)}; pass integer token "
                "ids [n]"
            )
    elif isinstance(ids, (bytes, bytearray)) or not isinstance(ids, Sequence):
        raise PromptError(f"the prompt is {type(ids).__name__}; {_FORMS}")
    if len(ids) == 0:
        raise PromptError("the prompt is empty; pass at least one token")
    if len(ids) > limit:
        raise PromptLengthError(
            f"the prompt has {len(ids)} tokens, at most {limit} fit; shorten it, or convert with "
            "a larger capacity"
        )
    for index, value in enumerate(ids):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise PromptError(
                f"token id {index} of the prompt is {shown(value)}, not an integer; {_FORMS}"
            )
        if not 0 <= value < vocab_size:
            raise PromptError(
                f"token id {index} of the prompt is {str(value)[:40]}; the ids of this bundle "
                f"are 0 to {vocab_size - 1}"
            )
    return np.array(ids, dtype=np.int64)
