"""Grammars over the tokens of other kinds of tokenizers."""

from __future__ import annotations

import json
from itertools import count

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from runtime import OptionError
from runtime.text.grammar import Grammars
from runtime.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")

NONE = np.empty(0, np.int64)
WORDS = ["<pad>", "</s>", "<unk>", "▁", "▁pos", "itive", "pos", "▁neg", "ative", "a"]


def unigram() -> Backend:
    """T5's: the first token's leading space is no text."""
    backend = Backend(models.Unigram([(word, -float(place)) for place, word in enumerate(WORDS)], 2, False))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens([AddedToken(word, special=True) for word in WORDS[:3]])
    return backend


def byte_fallback() -> Backend:
    """Llama 2's."""
    words = ["<pad>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "p", "os", "▁pos", "n"]
    backend = Backend(models.BPE({word: place for place, word in enumerate(words)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.normalizer, backend.decoder = None, decoders.Sequence(steps)
    backend.add_special_tokens(WORDS[:3])
    return backend


def word_piece() -> Backend:
    words = ["[PAD]", "[END]", "[UNK]", "pos", "##itive", "neg", "##ative"]
    backend = Backend(models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    backend.add_special_tokens(words[:3])
    return backend


def allowed(grammars: Grammars, size: int, choices: list[str], output: list[int]) -> set[int]:
    grammar = grammars.open("choice", json.dumps(choices), 99)
    scores = grammar.mask(np.zeros(size, np.float32), np.array(output, np.int64))
    return set(np.flatnonzero(np.isfinite(scores)).tolist())


def test_first_token_may_have_a_leading_space_that_is_not_text() -> None:
    tokenizer = Tokenizer(unigram())
    grammars = Grammars(tokenizer, 16, [1])
    choices = ["positive", "negative"]
    assert allowed(grammars, 16, choices, []) == {3, 4, 6, 7}
    grammar = grammars.open("choice", json.dumps(choices), 99)
    assert grammar.allows(NONE, [4, 5, 1]) == grammar.allows(NONE, [6, 5, 1]) == 3
    assert grammar.allows(NONE, [4, 8]) == 1
    assert [grammar.forced(np.array(output)) for output in ([4], [4, 5], [6], [6, 5])] == [5, 1, 5, 1]
    assert tokenizer.decode([4, 5]) == tokenizer.decode([6, 5]) == "positive"


def test_byte_tokens_spell_characters_without_a_token() -> None:
    tokenizer = Tokenizer(byte_fallback())
    grammars = Grammars(tokenizer, tokenizer.vocab_size, [1])
    grammar = grammars.open("choice", '["positive"]', 99)
    spelled = [3 + byte for byte in b"positive"]
    assert grammar.allows(NONE, [*spelled, 1]) == len(spelled) + 1
    assert grammar.allows(NONE, [tokenizer.encode("p", special=False)[-1], spelled[1]]) == 2


def test_word_piece_tokens_spell_a_choice() -> None:
    grammars = Grammars(Tokenizer(word_piece()), 7, [1])
    grammar = grammars.open("choice", '["positive", "negative"]', 99)
    assert grammar.allows(NONE, [3, 4, 1]) == 3
    assert grammar.allows(NONE, [3, 6]) == 1


def test_constraint_that_the_vocabulary_cannot_spell_is_named() -> None:
    grammars = Grammars(Tokenizer(unigram()), 16, [1])
    grammar = grammars.open("choice", '["{}"]', 99)
    with pytest.raises(OptionError, match="choice"):
        grammar.mask(np.zeros(16, np.float32), np.array([3]))


def test_grammar_time_is_counted_even_if_a_call_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.text.grammar.perf_counter", count().__next__)  # each call takes one second
    grammars = Grammars(Tokenizer(unigram()), 16, [1])
    scores = np.zeros(16, np.float32)
    grammar = grammars.open("choice", '["positive"]', 99)
    assert grammar.mask(scores, np.array([4, 8])) is scores  # a beam that is no longer valid
    assert grammar.seconds == 1
    grammar = grammars.open("choice", '["{}"]', 99)
    with pytest.raises(OptionError):
        grammar.mask(scores, np.array([3]))
    assert grammar.seconds == 1

    def fail(output: np.ndarray) -> bool:
        raise OptionError("it takes too much to follow")

    grammar = grammars.open("choice", '["positive"]', 99)
    monkeypatch.setattr(grammar, "_follow", fail)
    for call in (
        lambda: grammar.forced(NONE),
        lambda: grammar.allows(NONE, [4]),
        lambda: grammar.mask(scores, NONE),
    ):
        with pytest.raises(OptionError):
            call()
    assert grammar.seconds == 3


def test_tokenizer_may_have_more_tokens_than_the_model() -> None:
    grammars = Grammars(Tokenizer(unigram()), 8, [1])
    assert allowed(grammars, 8, ["positive", "negative"], []) == {3, 4, 6, 7}
    grammar = grammars.open("choice", '["negative", "positive"]', 99)
    assert grammar.forced(np.array([7])) is None  # "ative" is token 8


def test_missing_tokenizer_or_end_token_is_refused() -> None:
    for grammars, missing in (
        (Grammars(None, 16, [1]), "no tokenizer"),
        (Grammars(Tokenizer(unigram()), 16, []), "no end-of-sequence token"),
    ):
        with pytest.raises(OptionError, match=missing):
            grammars.open("regex", "a", 99)


def test_compiled_grammars_are_cached_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, compiled = Grammars(Tokenizer(unigram()), 16, [1]), list[str]()
    compile_ = grammars._compile
    monkeypatch.setattr("runtime.text.grammar.MAX_KEPT", 2)
    monkeypatch.setattr(grammars, "_compile", lambda kind, text: compiled.append(text) or compile_(kind, text))
    for regex in ("a", "a+", "a", "a*", "a", "a+"):
        grammars.open("regex", regex, 99)
    assert compiled == ["a", "a+", "a*", "a+"]
