"""Splits for `fit`: alike inputs share one, and data that cannot be split are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from freeexport.checkpoints.examples import DataError
from freeexport.fit.splits import TRAIN, families, read_lines, split_lines, write_splits
from freeexport.system.jsonl import InputLine

WORDS = ("amber", "birch", "cedar", "delta", "ember", "frost", "grove", "haven", "inlet", "jetty", "knoll", "larch",
         "maple", "north", "ocean", "plain", "quill")  # fmt: skip


def record(number: int) -> str:
    """A record in the frame that all records of the task have, of words that no other one has in this order."""
    words = [f"{WORDS[(number * step) % 17]}{number}" for step in range(1, 12)]
    return f"please write the following record as one line of json : {' '.join(words)} and write nothing else"


def lines_of(texts: list[str]) -> list[InputLine]:
    return [InputLine(number, text, "target") for number, text in enumerate(texts, 1)]


def test_texts_with_mostly_shared_content_are_one_family() -> None:
    texts = [record(number) for number in range(60)]
    texts += [texts[3] + " indeed", texts[3].upper().casefold(), texts[7], "a short one", "a short one", "another"]
    found = families(texts).tolist()
    assert found[60] == found[61] == found[3]
    assert found[62] == found[7]
    assert found[63] == found[64] != found[65]
    # The frame, which every record has, makes no family.
    assert len({*found[:60]}) == 60


def test_splits_have_their_sizes_and_share_no_family() -> None:
    texts = [f"{record(number)}{suffix}" for number in range(150) for suffix in ("", " once more")]
    sizes = {"test": 40, "calibration": 30, "validation": 20}
    found = split_lines(lines_of(texts), sizes, Path("data.jsonl"))
    assert {name: len(found[name]) for name in sizes} == sizes
    assert sum(map(len, found.values())) == len(texts)
    owner: dict[int, str] = {}
    for name, lines in found.items():
        for line in lines:
            assert owner.setdefault((line.line_number - 1) // 2, name) == name
    backwards = split_lines(lines_of(texts)[::-1], sizes, Path("data.jsonl"))
    assert [line.input for line in backwards["test"]] == [line.input for line in found["test"]]


def test_written_splits_are_read_back(tmp_path: Path) -> None:
    lines = [InputLine(1, "a\u2028b", "ä", references=["c"]), InputLine(2, [{"role": "user", "content": "hi"}], "x")]
    write_splits({TRAIN: lines}, tmp_path)
    found = read_lines(tmp_path / "train.jsonl", 2)
    assert [(one.input, one.target, one.references) for one in found] == [
        (one.input, one.target, one.references) for one in lines
    ]


@pytest.mark.parametrize(
    ("texts", "target", "problem"),
    [
        ([record(number) for number in range(5)], "t", "has 5 lines; .* give 40 or more, or leave --data out"),
        ([record(number) for number in range(50)], None, "line 1: 'target' is missing; give every line an input"),
        (["the very same line of data again"] * 50, "t", "50 of 50 inputs are alike, and there are 1 different ones"),
    ],
    ids=["few", "without targets", "all alike"],
)
def test_data_that_cannot_be_split_are_refused(
    texts: list[str], target: str | None, problem: str, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input": text, "target": target}) + "\n" for text in texts))
    with pytest.raises(DataError, match=problem):
        split_lines(read_lines(data, 40), {"test": 10, "calibration": 10}, data)
