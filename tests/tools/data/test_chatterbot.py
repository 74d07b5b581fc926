from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.data import chatterbot
from tools.data.chatterbot import corpus, examples
from tools.data.splits import DataError


def test_the_first_two_turns_are_question_and_answer() -> None:
    file = {"conversations": [["What is AI?", "A branch.", "Which?"], ["Alone"], ["", "x"], ["In what year?", 1984]]}
    assert [(example.input, example.target) for example in examples([file])] == [
        ("answer: What is AI?", "A branch."),
        ("answer: In what year?", "1984"),
    ]


def test_a_pair_stands_once_and_a_questions_answers_share_its_key() -> None:
    file = {"conversations": [["Are you?", "Yes."], ["are  you", "yes."], ["Are you!", "No."]]}
    made = list(examples([file, file]))
    assert [example.target for example in made] == ["Yes.", "No."]
    assert made[0].keys == made[1].keys == ("are you",)


def test_a_missing_corpus_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chatterbot, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install chatterbot-corpus"):
        corpus("english")


def test_an_unknown_language_lists_the_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data/english").mkdir(parents=True)
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(chatterbot, "find_spec", lambda name: spec)
    with pytest.raises(DataError, match="no 'klingon'; it has english"):
        corpus("klingon")
