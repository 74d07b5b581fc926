"""Text comes as soon as it is final, is what the tokenizer decodes, and ends before the first stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from runtime.errors import OptionError
from runtime.text.detokenizer import Detokenizer
from runtime.text.tokenizer import Tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA_STEPS = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def vocabulary(*tokens: str) -> dict[str, int]:
    return {token: index for index, token in enumerate([*SPECIAL, *tokens])}


def built(backend: tokenizers.Tokenizer, decoder: decoders.Decoder | None) -> Tokenizer:
    backend.add_special_tokens(SPECIAL)
    if decoder is not None:
        backend.decoder = decoder
    return Tokenizer(backend)


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    euro, face = "âĤ¬", "ðŁĺĢ"  # the bytes of € and of a smiley, as letters
    merges = [("Ċ", "Ċ"), ("h", "e"), (euro[0], euro[1]), (euro[1], euro[2]), (face[2], face[3]), (euro[2], euro[0])]
    vocab = vocabulary(*alphabet, *("".join(pair) for pair in merges))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.add_tokens([AddedToken("<tool call>"), AddedToken("é"), AddedToken("日本")])
    return built(backend, decoders.ByteLevel())


def byte_fallback(*steps: decoders.Decoder) -> Tokenizer:
    tokens = ["▁", "a", "b", "ab", "▁a", "▁▁", "é", "�", "<0x+A>", "<0xZZ>", "..."]
    model = models.BPE(vocab=vocabulary(*BYTES, *tokens), merges=[], byte_fallback=True, unk_token="<unk>")
    return built(tokenizers.Tokenizer(model), decoders.Sequence(list(steps or LLAMA_STEPS)))


def unigram(decoder: decoders.Decoder) -> Tokenizer:
    tokens = ["▁", "a", "b", "▁a", "ab", "▁▁", "a▁b", "▁é", "<0x41>", "日本"]
    pieces = [(token, -float(index)) for index, token in enumerate([*SPECIAL, *tokens])]
    return built(tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0)), decoder)


def word_level(decoder: decoders.Decoder | None) -> Tokenizer:
    tokens = ["a", "b", "##a", "ab", ".", "n't", "", "a</w>", "b</w>", "|", "日本"]
    return built(tokenizers.Tokenizer(models.WordLevel(vocabulary(*tokens), unk_token="<unk>")), decoder)


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "llama-2": byte_fallback,
    "gemma": lambda: byte_fallback(*LLAMA_STEPS[:3]),
    "byte-fallback-unfused": lambda: byte_fallback(*LLAMA_STEPS[:2]),
    "strip-three": lambda: byte_fallback(*LLAMA_STEPS[:3], decoders.Strip(" ", 3, 0)),
    "strip-unfused": lambda: byte_fallback(*LLAMA_STEPS[:2], decoders.Strip(" ", 1, 0)),
    "t5": lambda: unigram(decoders.Metaspace()),
    "metaspace-never": lambda: unigram(decoders.Metaspace(prepend_scheme="never")),
    "metaspace-fused": lambda: unigram(decoders.Sequence([decoders.Metaspace(), decoders.Fuse()])),
    "word-level": lambda: word_level(None),
    "word-piece": lambda: word_level(decoders.WordPiece()),
}
# Decoders whose text is only known at the end.
ODD: dict[str, Callable[[], Tokenizer]] = {
    "ctc": lambda: word_level(decoders.CTC("|", "a", True)),
    "bpe-suffix": lambda: word_level(decoders.BPEDecoder()),
    "fused-regex": lambda: word_level(decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("ab+"), "x")])),
    "strip-fuse": lambda: byte_fallback(*LLAMA_STEPS[:2], decoders.Strip(" ", 1, 0), decoders.Fuse()),
    "fallback-last": lambda: byte_fallback(decoders.Replace("▁", " "), decoders.Fuse(), decoders.ByteFallback()),
}
BUILT = {name: build() for name, build in (TOKENIZERS | ODD).items()}
# Bytes that begin, continue, complete and break UTF-8 characters; letters of the stop strings; spaces.
TELLING = """
<0xC3> <0xA9> <0xE2> <0x82> <0xAC> <0xFF> <0x0A> <0x20> <0x61> <0x62> <0xED> <0xA0> <0xF0> <0x9F>
Ã ł Ċ âĤ ¬ ¬â ĤĤ Ĥ¬ ĺĢ ð Ł ÿ Ġ a b ab ▁ ▁a ▁▁ </s> <s> a</w> ##a . | � é
"""


def ids_of(name: str) -> st.SearchStrategy[list[int]]:
    tokenizer = BUILT[name]
    telling = [index for index in range(tokenizer.vocab_size) if tokenizer.token(index) in TELLING.split()]
    return st.lists(st.sampled_from(telling) | st.integers(0, tokenizer.vocab_size + 3), max_size=40)


@st.composite
def named_ids(draw: st.DrawFn) -> tuple[str, list[int]]:
    name = draw(st.sampled_from(sorted(BUILT)))
    return name, draw(ids_of(name))


stops = st.lists(st.text("ab \né€.", min_size=1, max_size=4) | st.sampled_from(["aba", "ab", "abab", " a"]), max_size=4)


def expected(tokenizer: Tokenizer, ids: list[int], stop: Sequence[str]) -> tuple[str, int | None]:
    """The text up to the stop string that is complete first, and how many tokens that takes (None: not stopped)."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        spans = [(text.find(word) + len(word), text.find(word)) for word in stop if word in text]
        if spans:
            return text[: min(spans)[1]], count
    return tokenizer.decode(ids), None


def run(stream: Detokenizer, ids: list[int]) -> tuple[list[str], int | None]:
    """The pieces, the last of them from `finish`, and the number of tokens when the stream stopped."""
    pieces, count = [], None
    for index, token_id in enumerate(ids, start=1):
        pieces.append(stream.push(token_id))
        if stream.stopped and count is None:
            count = index
    return [*pieces, stream.finish()], count


@tries(500)
@given(named_ids(), stops)
def test_text_ends_before_the_first_stop_string(case: tuple[str, list[int]], stop: list[str]) -> None:
    """And what was handed out stays true, whatever comes."""
    name, ids = case
    stream = Detokenizer(BUILT[name], stop)
    pieces, count = run(stream, ids)
    final = expected(BUILT[name], ids, stop)
    assert ("".join(pieces), count) == final
    assert stream.stopped == (count is not None)
    assert name in ODD or all(final[0].startswith("".join(pieces[:number])) for number in range(len(pieces)))


def spelt(name: str, *tokens: str) -> list[int]:
    tokenizer = BUILT[name]
    index = {tokenizer.token(i): i for i in range(tokenizer.vocab_size)}
    return [index[token] for token in tokens]


@pytest.mark.parametrize(
    ("name", "tokens", "stop", "pieces"),
    [
        ("byte-level", ["a", "â", "Ĥ¬", "ð", "Ł", "a"], [], ["a", "", "€", "", "", "\ufffda", ""]),
        ("byte-level", ["a", "â", "Ĥ"], [], ["a", "", "", "\ufffd"]),
        # A run of byte tokens waits for its end: one invalid byte changes all of it.
        ("llama-2", ["a", "<0xC3>", "<0xA9>", "b"], [], ["a", "", "", "éb", ""]),
        ("llama-2", ["a", "<0xC3>", "<0xA9>", "<0xFF>", "b"], [], ["a", "", "", "", "\ufffd\ufffd\ufffdb", ""]),
        # The first space is dropped, where it is the first text.
        ("llama-2", ["</s>", "▁a", "</s>", "▁a", "▁", "b"], [], ["", "a", "", " a", " ", "b", ""]),
        ("t5", ["</s>", "▁a", "</s>", "▁a", "▁", "b"], [], ["", "a", "", " a", " ", "b", ""]),
        ("strip-three", ["▁", "▁▁", "▁▁", "a", "▁▁"], [], ["", "", "  ", "a", "  ", ""]),
        # A decoder that may change all of its text gives it at the end.
        ("bpe-suffix", ["a</w>", "b</w>"], [], ["", "", "a b"]),
        ("bpe-suffix", ["a</w>", "b</w>", "a"], ["a b"], ["", "", "", ""]),
        # What may begin a stop string is withheld, and handed out where it does not go on.
        ("byte-level", ["a", "b", "Ċ", "b", "a"], ["b\nb"], ["a", "", "", "", "", ""]),
        ("byte-level", ["a", "b", "Ċ", "a"], ["b\nb"], ["a", "", "", "b\na", ""]),
        ("byte-level", ["a", "b", "Ċ"], ["b\nb"], ["a", "", "", "b\n"]),
        ("byte-level", list("abaabab"), ["abab"], ["", "", "", "aba", "", "", "", ""]),
        # Of two stop strings the one complete first counts, however the text falls into tokens.
        ("byte-level", ["h", "a", "b", "h", "a"], ["abh", "ab"], ["h", "", "", "", "", ""]),
        ("byte-level", ["a", "he", "Ġ", "l", "o"], ["he lo", "e"], ["a", "h", "", "", "", ""]),
        # An incomplete character is no replacement character to stop at.
        ("llama-2", ["a", "<0xC3>", "<0xA9>", "b"], ["\ufffd"], ["a", "", "", "éb", ""]),
        ("llama-2", ["a", "<0xC3>", "b"], ["\ufffd"], ["a", "", "", ""]),
        ("byte-level", ["a", "Ã", "©", "b"], ["\ufffd"], ["a", "", "é", "b", ""]),
        ("byte-level", ["a", "Ã", "b"], ["\ufffd"], ["a", "", "", ""]),
        # Spelt in byte tokens, it stops at its last byte.
        ("llama-2", ["▁a", "<0x0A>"], ["\n"], ["a", "", ""]),
    ],
)
def test_pieces_are_emitted_once_final(name: str, tokens: list[str], stop: list[str], pieces: list[str]) -> None:
    assert run(Detokenizer(BUILT[name], stop), spelt(name, *tokens))[0] == pieces


def test_text_requires_a_tokenizer_and_stop_strings_must_be_text() -> None:
    stream = Detokenizer(None, [])
    assert (stream.push(7), stream.finish(), stream.stopped) == ("", "", False)
    with pytest.raises(OptionError, match="no tokenizer"):
        Detokenizer(None, ["a"])
    for stop in ("word", [""], [3], ["a", None]):
        with pytest.raises(OptionError, match="stop"):
            Detokenizer(BUILT["byte-level"], stop)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("byte-level", ["ÿ"]),
        ("byte-level", ["¬â"]),
        ("llama-2", ["<0xFF>"]),
        ("llama-2", ["<0x61>"]),
        ("llama-2", ["<0x20>"]),
        ("llama-2", ["<0xE2>", "<0x82>", "<0xAC>"]),
    ],
)
@pytest.mark.parametrize("stop", [[], ["never"]])
def test_long_runs_of_byte_tokens_are_decoded_once(
    name: str, tokens: list[str], stop: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = spelt(name, *tokens) * 3000
    tokenizer, counts = BUILT[name], list[int]()
    decode, text = tokenizer.decode, tokenizer.decode(ids)
    monkeypatch.setattr(tokenizer, "decode", lambda ids: counts.append(len(ids)) or decode(ids))
    assert "".join(run(Detokenizer(tokenizer, stop), ids)[0]) == text
    assert sum(counts) <= 2 * len(ids)


def test_every_byte_of_a_byte_level_tokenizer_is_decoded() -> None:
    tokenizer = BUILT["byte-level"]
    for index in range(tokenizer.vocab_size + 2):
        assert tokenizer.bytes_of(index).decode(errors="replace") == tokenizer.decode([index])


@pytest.mark.parametrize("name", ["byte-level", "llama-2", "t5", "word-level"])
def test_each_push_decodes_only_the_newest_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = BUILT[name]
    stream = Detokenizer(tokenizer, ["never"])
    decode, counts = tokenizer.decode, list[int]()
    monkeypatch.setattr(tokenizer, "decode", lambda ids: counts.append(len(ids)) or decode(ids))
    ids = [i for i in range(tokenizer.vocab_size) if tokenizer.token(i) in ("a", "b", "▁a", "Ġ")]
    text = "".join(stream.push(token_id) for token_id in ids * 20)
    assert len(text) >= len(ids) * 20
    assert max(counts, default=0) <= 2
