from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from freeexport.system.output import OutputError
from tools.data.splits import (
    SHARES,
    DataError,
    Example,
    by_split,
    check_directory,
    check_disjoint,
    command,
    limited,
    run,
    shuffled,
    split_of,
    write_data_set,
)


def examples(name: str, count: int = 2) -> list[Example]:
    return [Example(f"{name} {index}", "é", (f"{name} {index}",)) for index in range(count)]


def data_set() -> dict[str, list[Example]]:
    return {name: examples(name) for name in SHARES}


def test_the_split_of_a_key_never_changes() -> None:
    # Data sets that exist rely on these.
    assert [split_of(key) for key in ("word", "zoo", "17", "16")] == ["train", "validation", "calibration", "test"]
    assert {split_of(key) for key in map(str, range(100))} == set(SHARES)


def test_splits_have_their_shares() -> None:
    counts = Counter(split_of(f"word {index}") for index in range(20_000))
    for name, percent in SHARES.items():
        assert counts[name] / 200 == pytest.approx(percent, abs=1)


def test_more_data_moves_no_key() -> None:
    few, many = (by_split(map(str, range(count)), str) for count in (50, 500))
    for name in SHARES:
        assert few[name] == [key for key in many[name] if int(key) < 50]


def test_the_order_depends_on_the_seed_and_not_on_the_order_before() -> None:
    words = [f"w{index}" for index in range(50)]
    assert shuffled(words, 1, str) == shuffled(reversed(words), 1, str)
    assert shuffled(words, 1, str) != shuffled(words, 2, str)
    assert sorted(shuffled(words, 1, str)) == sorted(words)


def test_limits_cut_train_and_the_others_apart() -> None:
    splits = {name: examples(name, 9) for name in SHARES}
    sizes = {name: len(lines) for name, lines in limited(splits, 5, 2, 0).items()}
    assert sizes == {"train": 5, "validation": 2, "calibration": 2, "test": 2}


def test_a_data_set_is_lines_of_json_and_says_where_it_came_from(tmp_path: Path) -> None:
    sizes = write_data_set(tmp_path / "set", data_set(), {"source": "here"})
    assert sizes == dict.fromkeys(SHARES, 2)
    lines = (tmp_path / "set/test.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[0] == '{"input": "test 0", "target": "é"}'
    assert json.loads((tmp_path / "set/dataset.json").read_text())["source"] == "here"
    assert check_directory(tmp_path / "set") == sizes


def test_overlapping_splits_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    splits = data_set()
    splits["test"].append(Example("new", "x", ("own", "train 1")))
    with pytest.raises(DataError, match=r"'train 1' is in train and in test"):
        write_data_set(tmp_path / "set", splits, {})
    assert list(tmp_path.iterdir()) == []


def test_a_key_may_occur_twice_in_one_split() -> None:
    check_disjoint({"train": [("a",), ("a", "b")], "test": [("c",)]})


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="split calibration has no examples"):
        write_data_set(tmp_path / "set", {**data_set(), "calibration": []}, {})


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    class Interrupting(dict):  # type: ignore[type-arg]
        def items(self) -> object:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_data_set(tmp_path / "set", data_set(), {"x": Interrupting(a=1)})
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_is_replaced_only_when_asked(tmp_path: Path) -> None:
    write_data_set(tmp_path / "set", data_set(), {})
    with pytest.raises(OutputError, match="--overwrite"):
        write_data_set(tmp_path / "set", data_set(), {})
    more = {name: examples(name, 3) for name in SHARES}
    assert write_data_set(tmp_path / "set", more, {}, overwrite=True)["train"] == 3


def test_checking_finds_inputs_that_differ_in_case_and_spaces_only(tmp_path: Path) -> None:
    write_data_set(tmp_path / "set", data_set(), {})
    with (tmp_path / "set/test.jsonl").open("a") as file:
        file.write('{"input": "Train  0", "target": ""}\n')
    with pytest.raises(DataError, match=r"'train 0' is in train and in test"):
        check_directory(tmp_path / "set")


@pytest.mark.parametrize(
    ("line", "message"),
    [("{}", "test.jsonl line 3 has no 'input'"), ("nonsense", "test.jsonl line 3"), ("[1]", "test.jsonl line 3")],
)
def test_checking_names_a_broken_line(tmp_path: Path, line: str, message: str) -> None:
    write_data_set(tmp_path / "set", data_set(), {})
    with (tmp_path / "set/test.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        check_directory(tmp_path / "set")


def test_the_check_is_a_program(tmp_path: Path) -> None:
    write_data_set(tmp_path / "set", data_set(), {})
    result = CliRunner().invoke(command, [str(tmp_path / "set")])
    assert result.exit_code == 0
    assert "2 train, 2 validation, 2 calibration, 2 test" in result.output


def test_an_error_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["splits", str(tmp_path / "missing")])
    with pytest.raises(SystemExit) as stopped:
        run(command)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
