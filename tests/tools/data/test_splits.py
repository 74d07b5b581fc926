from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from freeexport.system.output import OutputError
from tools.data.splits import (
    SHARES,
    TEST_LINES,
    DataError,
    Line,
    fresh,
    json_lines,
    shuffled,
    split_of,
    write_data_set,
)


def examples(name: str, count: int = 2) -> list[Line]:
    return [Line(f"{name} {index}", "é", (f"{name} {index}",)) for index in range(count)]


def data_set() -> dict[str, list[Line]]:
    return {name: examples(name) for name in SHARES}


def test_split_of_a_key_is_stable_and_splits_have_their_shares() -> None:
    # Data sets that exist rely on these.
    assert [split_of(key) for key in ("word", "zoo", "17", "16")] == ["train", "validation", "calibration", "test"]
    counts = Counter(split_of(f"word {index}") for index in range(20_000))
    for name, percent in SHARES.items():
        assert counts[name] / 200 == pytest.approx(percent, abs=1)


def test_order_depends_only_on_the_seed() -> None:
    words = [f"w{index}" for index in range(50)]
    assert shuffled(words, 1, str) == shuffled(reversed(words), 1, str)
    assert shuffled(words, 1, str) != shuffled(words, 2, str)
    assert sorted(shuffled(words, 1, str)) == sorted(words)


def test_later_test_split_contains_no_line_visible_in_an_earlier_version() -> None:
    lines = [Line(f"line {number}", "x", (f"family {number % 900}",)) for number in range(1800)]
    assert fresh(lines, 1) == lines
    second, third = fresh(lines, 2), fresh(lines, 3)
    shown = {line.keys for line in lines[:TEST_LINES]}
    assert {line.keys for line in second} == {line.keys for line in lines} - shown
    shown |= {line.keys for line in second[:TEST_LINES]}
    assert {line.keys for line in third} == {line.keys for line in lines} - shown
    assert third


def test_data_set_is_json_lines_and_is_replaced_only_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data_set(tmp_path / "set", data_set(), {"source": "here"})
    assert "2 train, 2 validation, 2 calibration, 2 test" in capsys.readouterr().out
    lines = (tmp_path / "set/test.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[0] == '{"input": "test 0", "target": "é"}'
    about = json.loads((tmp_path / "set/dataset.json").read_text())
    assert (about["source"], about["sizes"]) == ("here", dict.fromkeys(SHARES, 2))
    with pytest.raises(OutputError, match="--overwrite"):
        write_data_set(tmp_path / "set", data_set(), {})
    write_data_set(tmp_path / "set", {name: examples(name, 3) for name in SHARES}, {}, overwrite=True)
    assert "3 train" in capsys.readouterr().out


def test_overlapping_and_empty_splits_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    splits = data_set()
    splits["test"] += [Line("new", "x", ("own", "train 1")), Line("twice", "x", ("own",))]
    with pytest.raises(DataError, match=r"'train 1' is in train and in test"):
        write_data_set(tmp_path / "set", splits, {})
    with pytest.raises(DataError, match="split calibration has no examples"):
        write_data_set(tmp_path / "set", {**data_set(), "calibration": []}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("line", "problem"), [("{", "line 2 is not JSON"), ("[1]", "line 2 is not an object")])
def test_broken_line_is_named(line: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n')
    with pytest.raises(DataError, match=problem):
        list(json_lines(path))
