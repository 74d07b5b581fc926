"""Lines in flight together: answered in order, each with its own error, and written as soon as they can be."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CASES
from click.testing import CliRunner, Result
from conftest import Bundles

from freeexport import cli
from freeexport.system.answers import AHEAD, LateError, answer_file, answers
from freeexport.system.jsonl import Request
from runtime import FreeExportError, GenerationResult, OptionError, PromptError
from runtime.result import Stats

BY_NAME = {case.name: case for case in CASES}
LINES = [
    *('{"input": "Hi", "id": "a"}', "not JSON", '{"input": "one two three four"}', '{"id": 7, "input": ""}'),
    *('{"input": "x", "id": "b"}', json.dumps({"input": "y" * 400}), '{"input": [{"role": "user", "content": "Hi"}]}'),
    *("", '{"input": 5, "id": "c"}', '{"input": "Hi", "id": "a"}', '{"input": "the last"}'),
]
Run = Callable[..., Result]


@pytest.fixture(params=["llama-tied", "t5-relu-tied"])
def run(request: pytest.FixtureRequest, bundle: Bundles, tmp_path: Path) -> Run:
    """`freeexport generate` on LINES, of which the chat line fails too where the bundle has no template."""
    path, source = str(bundle(BY_NAME[request.param])), tmp_path / "in.jsonl"
    source.write_text("\n".join(LINES) + "\n")
    common = ("--input", str(source), "--max-new-tokens", "8", "--threads", "1", "--threshold", "0.2")
    return lambda *arguments: CliRunner().invoke(cli.main, ["generate", path, *common, *arguments])


def result_of(text: str, finish_reason: Any = "eos") -> GenerationResult:
    return GenerationResult(text, (1,), (False,), (None,), finish_reason, Stats())


def test_lines_in_flight_together_are_answered_as_one_by_one(run: Run, tmp_path: Path) -> None:
    outputs = []
    for batch in ("1", "3", "64"):
        result = run("--output", str(tmp_path / batch), "--batch-size", batch)
        assert result.exit_code == 1
        outputs.append(re.sub(r'"seconds": [0-9.e-]+, ', "", (tmp_path / batch).read_text()))
    assert outputs[0] == outputs[1] == outputs[2]
    records = [json.loads(line) for line in outputs[0].splitlines()]
    names = ["a", 2, 3, 7, "b", 6, 7, "c", "a", 11]
    assert [record.get("id", record.get("line")) for record in records] == names
    failed = [place for place, record in enumerate(records) if "error" in record]
    assert failed[:3] == [1, 3, 5]
    assert "not JSON" in records[1]["error"]
    assert "'input' is empty" in records[3]["error"]
    assert "128" in records[5]["error"]
    assert records[0] == records[8]
    assert f"{len(failed)} of 10 lines of" in result.stderr


def test_a_line_that_takes_longer_than_its_deadline_failed(run: Run, tmp_path: Path) -> None:
    result = run("--output", str(tmp_path / "out"), "--deadline", "1e-9")
    records = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert result.exit_code == 1
    assert "10 of 10 lines" in result.stderr
    assert re.search("deadline passed after [01] tokens; allow more with --deadline", records[0]["error"])
    assert set(records[0]) == {"id", "error"}


@pytest.mark.parametrize("deadline", ["0", "-1", "nan"])
def test_a_deadline_that_is_no_time_ends_the_command(deadline: str, run: Run, tmp_path: Path) -> None:
    result = run("--output", str(tmp_path / "out"), "--deadline", deadline, "--batch-size", "2")
    assert result.exit_code == 1
    assert "deadline is" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments", [("Hi", "--batch-size", "2"), ("--input", "in", "--output", "out", "--batch-size", "0")]
)
def test_a_batch_without_a_file_or_of_nothing_is_a_usage_error(arguments: tuple[str, ...], tmp_path: Path) -> None:
    assert CliRunner().invoke(cli.main, ["generate", str(tmp_path), *arguments]).exit_code == 2


def test_a_line_is_answered_as_soon_as_those_before_it_are() -> None:
    hold = threading.Event()

    def ask(text: str, cancel: threading.Event) -> list[GenerationResult]:
        if text == "2":
            hold.wait(20)
        return [result_of(text)]

    lines = [Request(number, str(number)) for number in range(2 * AHEAD + 4)]
    going = answers(ask, lines, 2)
    assert [next(going)[0].line_number for _ in range(2)] == [0, 1]
    hold.set()
    assert [line.line_number for line, _ in going] == [line.line_number for line in lines[2:]]


def test_lines_wait_for_one_that_takes_long_only_so_many() -> None:
    hold, asked = threading.Event(), list[str]()

    def ask(text: str, cancel: threading.Event) -> list[GenerationResult]:
        asked.append(text)
        assert text != "0" or hold.wait(20)
        return [result_of(text)]

    going = answers(ask, (Request(number, str(number)) for number in range(100)), 2)
    reader = threading.Thread(target=lambda: next(going))
    reader.start()
    reader.join(0.2)
    assert reader.is_alive()
    assert len(asked) <= 2 * AHEAD
    hold.set()
    reader.join(20)
    going.close()


def test_what_is_wrong_with_one_line_is_its_own_and_what_is_wrong_with_all_is_raised() -> None:
    errors: dict[str, Exception] = {
        "a": PromptError("no"),
        "b": RuntimeError("engine\nfailed"),
        "d": OptionError("all"),
    }

    def ask(text: str, cancel: threading.Event) -> list[GenerationResult]:
        if text in errors:
            raise errors[text]
        return [] if text == "late" else [result_of(text)]

    lines = [Request(number, text) for number, text in enumerate(("a", "b", "c", "late", "d", "e"))]
    going = answers(ask, lines, 3)
    found = [next(going)[1] for _ in range(4)]
    assert found[:2] == [errors["a"], errors["b"]]
    assert isinstance(found[2], list)
    assert isinstance(found[3], LateError)
    with pytest.raises(OptionError, match="all"):
        next(going)


def test_an_interrupted_file_keeps_what_was_answered_and_ends_what_runs(tmp_path: Path) -> None:
    ended = list[str]()

    def ask(text: str, cancel: threading.Event) -> list[GenerationResult]:
        if text == "1":
            raise KeyboardInterrupt
        if text == "2":
            assert cancel.wait(20)
            ended.append(text)
        return [result_of(text)]

    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text("".join(f'{{"input": "{number}"}}\n' for number in range(3)))
    with pytest.raises(KeyboardInterrupt):
        answer_file(ask, source, target, 3, resume=False, overwrite=False)
    assert [json.loads(line)["text"] for line in target.read_text().splitlines()] == ["0"]
    assert ended == ["2"]

    def broken(text: str, cancel: threading.Event) -> list[GenerationResult]:
        raise RuntimeError("engine\nfailed")

    with pytest.raises(FreeExportError, match="2 of 3 lines"):
        answer_file(broken, source, target, 3, resume=True, overwrite=False)
    assert json.loads(target.read_text().splitlines()[2]) == {"line": 3, "error": "RuntimeError: engine failed"}
