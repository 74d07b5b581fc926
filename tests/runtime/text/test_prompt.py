"""Prompts of every form are encoded, or refused by what is wrong with them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from runtime.errors import PromptError
from runtime.text.prompt import MAX_BYTES_PER_TOKEN, encode_prompt
from runtime.text.tokenizer import Tokenizer

VOCAB_SIZE = 300  # rows of the embedding, more than the tokenizer has tokens
LIMIT = 8
TEMPLATE = "{{ '<s>' }}{% for m in messages %}{{ m.content }}{% endfor %}"


def byte_level(template: str | None = TEMPLATE) -> Tokenizer:
    symbols = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return Tokenizer(backend, template)


TOKENIZER = byte_level()


def encoded(prompt: Any, tokenizer: Tokenizer | None = TOKENIZER, limit: int = LIMIT) -> list[int]:
    ids = encode_prompt(prompt, tokenizer, VOCAB_SIZE, limit)
    assert ids.dtype == np.int64
    assert ids.ndim == 1
    return ids.tolist()


def refused(prompt: Any, message: str, tokenizer: Tokenizer | None = TOKENIZER, limit: int = LIMIT) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        encode_prompt(prompt, tokenizer, VOCAB_SIZE, limit)
    assert "\n" not in str(caught.value)


def test_text_gets_special_tokens_and_messages_get_those_of_the_template() -> None:
    assert encoded("hi") == [0, *TOKENIZER.encode("hi", special=False)]
    messages = [{"role": "user", "content": "hi"}, {"role": "user", "content": "o"}]
    assert encoded(messages) == encoded(tuple(messages)) == [0, *TOKENIZER.encode("hio", special=False)]


@pytest.mark.parametrize(
    "ids",
    [
        [5, 0, 299],
        (5, 0, 299),
        np.array([5, 0, 299]),
        np.array([5, 0, 299], np.uint16),
        np.array([5, 0, 299], np.uint64),
        [np.int32(5), 0, np.uint8(44) + np.int64(255)],
    ],
)
def test_token_ids_are_used_unchanged(ids: Any) -> None:
    assert encoded(ids) == encoded(ids, None) == [5, 0, 299]


def test_an_empty_prompt_is_refused() -> None:
    for prompt in ("", [], (), np.array([], np.int64), np.array([])):
        refused(prompt, "the prompt is empty")
    refused([{"role": "user", "content": ""}], "the prompt is empty", byte_level("{{ messages[0].content }}"))
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    refused("  ", "the prompt is empty", Tokenizer(backend))


def test_a_lone_surrogate_is_named_with_its_index() -> None:
    refused("ab\ud800c", r"lone surrogate, U\+D800, at index 2")
    refused([{"role": "user", "content": "\udfff"}], r"lone surrogate, U\+DFFF")
    assert encoded("\U0001f600")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, -1], "token id 1 of the prompt is -1; the ids of this bundle are 0 to 299"),
        ([300], "token id 0 of the prompt is 300; the ids of this bundle are 0 to 299"),
        ([0, 2**80], f"token id 1 of the prompt is {2**80}; the ids"),
        (np.array([2**64 - 1], np.uint64), f"token id 0 of the prompt is {2**64 - 1}; the ids"),
        (np.array([0, -7], np.int8), "token id 1 of the prompt is -7; the ids"),
        ([1, 2.0], "token id 1 of the prompt is 2.0, not an integer"),
        ([1, True], "token id 1 of the prompt is True, not an integer"),
        ([np.bool_(True)], r"token id 0 of the prompt is np\.True_, not an integer"),
        ([1, "2"], "token id 1 of the prompt is '2', not an integer"),
        ([None], "token id 0 of the prompt is None, not an integer"),
        ([[1, 2]], r"token id 0 of the prompt is \[1, 2\], not an integer"),
        ([1, {"role": "user", "content": "x"}], "token id 1 of the prompt is .*, not an integer"),
        (np.array([True, False]), r"an array of bool \[2\]; pass integer token ids"),
        (np.array([1.0]), r"an array of float64 \[1\]"),
        (np.array([[1, 2]]), r"an array of int64 \[1, 2\]"),
        (np.array(3), r"an array of int64 \[\]"),
    ],
)
def test_invalid_token_ids_are_refused(ids: Any, message: str) -> None:
    refused(ids, message, None)


@pytest.mark.parametrize("prompt", [b"text", bytearray(b"x"), None, 3, {"role": "user"}, {1, 2}, iter([1])])
def test_objects_that_are_not_prompts_are_refused(prompt: Any) -> None:
    refused(prompt, f"the prompt is {re.escape(type(prompt).__name__)}; pass text, a list of token ids")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user"}], "'content' of message 0 is missing"),
        ([{"content": "x"}], "'role' of message 0 is missing"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": None}], "'content' of message 1 is NoneType"),
        ([{"role": 1, "content": "x"}], "'role' of message 0 is int"),
        ([{"role": "user", "content": [{"type": "text"}]}], "'content' of message 0 is list"),
        ([{"role": "user", "content": "x"}, "y"], "message 1 is str"),
    ],
)
def test_messages_without_role_or_content_are_refused(messages: Any, message: str) -> None:
    refused(messages, message)


@pytest.mark.parametrize("prompt", ["text", "", [{"role": "user", "content": "x"}]])
def test_text_requires_a_tokenizer_and_messages_require_a_template(prompt: Any) -> None:
    refused(prompt, "no tokenizer.*pass the prompt as a list of token ids", None)
    if isinstance(prompt, list):
        refused(prompt, "no chat template", byte_level(None))


def test_length_limit_includes_special_tokens() -> None:
    assert len(encoded("a" * (LIMIT - 1))) == len(encoded([1] * LIMIT)) == LIMIT
    for prompt in ("a" * LIMIT, [1] * (LIMIT + 1), np.ones(LIMIT + 1, np.int64)):
        refused(prompt, f"has {LIMIT + 1} tokens, at most {LIMIT} fit; shorten it")
    with pytest.raises(PromptError, match="the ids of this bundle are 0 to 9"):  # the tokenizer has more
        encode_prompt("hello", TOKENIZER, 10, LIMIT)


def test_overlong_text_is_refused_before_tokenization(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    most = LIMIT * MAX_BYTES_PER_TOKEN
    refused("é" * (most // 2), f"has {most + 1} tokens", tokenizer)
    monkeypatch.setattr(tokenizer, "encode", lambda text, special: pytest.fail("tokenised"))
    refused("é" * (most // 2 + 1), f"has {most + 2} bytes or more, too many for the {LIMIT} tokens", tokenizer)
    refused([{"role": "user", "content": "é" * most}], "bytes or more", tokenizer)
    refused([{"role": "r" * (most + 1), "content": ""}], "bytes or more", tokenizer)
    refused([{"role": "user", "content": ""}] * 9, "has 9 messages, more than the 8 tokens that fit", tokenizer)
    refused("x" * 1_000_000, "has 1000000 bytes or more", tokenizer)


@given(st.text(max_size=20))
def test_arbitrary_text_is_encoded_or_refused(text: str) -> None:
    try:
        ids = encode_prompt(text, TOKENIZER, VOCAB_SIZE, 100)
    except PromptError:
        assert text == ""
    else:
        assert TOKENIZER.decode(ids.tolist()) == text
