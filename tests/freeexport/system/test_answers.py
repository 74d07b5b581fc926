"""Lines in flight together: answered in order, each with its own error, and written as soon as they can be."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from checkpoints import BY_NAME, Bundles
from click.testing import Result
from command_line import invoke
from hypothesis import given
from hypothesis import strategies as st

from freeexport.system.answers import AHEAD, Line, ResultFile, answer_file, answers, fields_of
from freeexport.system.jsonl import BrokenLine, InputLine
from runtime import FreeExportError, GenerationResult, OptionError, PromptError
from runtime.result import Stats

CASE = BY_NAME["llama-tied"]
LINES = [
    *('{"input": "Hi", "id": "a"}', "not JSON", '{"input": "one two three four"}', '{"id": 7, "input": ""}'),
    *('{"input": "x", "id": "b"}', json.dumps({"input": "y" * 400}), '{"input": [{"role": "user", "content": "Hi"}]}'),
    *("", '{"input": 5, "id": "c"}', '{"input": "Hi", "id": "a"}', '{"input": "the last"}'),
]
Run = Callable[..., Result]


@pytest.fixture
def run(bundle: Bundles, tmp_path: Path) -> Run:
    """`freeexport generate` on LINES."""
    path, source = str(bundle(CASE)), tmp_path / "in.jsonl"
    source.write_text("\n".join(LINES) + "\n")
    common = ("--max-new-tokens", "8", "--threads", "1", "--threshold", "0.2")

    def generate(*arguments: str, text: str | None = None) -> Result:
        given = ("--input", str(source) if text is None else "-")
        return invoke("generate", path, *given, *common, *arguments, input=text)

    return generate


def without_seconds(text: str) -> str:
    return re.sub(r'"seconds": [0-9.e-]+, ', "", text)


def result_of(text: str, finish_reason: Any = "eos") -> GenerationResult:
    return GenerationResult(text, (1,), (False,), (None,), finish_reason, Stats())


def test_concurrent_lines_give_the_results_of_single_lines(run: Run, tmp_path: Path) -> None:
    outputs = []
    for batch in ("1", "3", "64"):
        result = run("--output", str(tmp_path / batch), "--batch-size", batch)
        assert result.exit_code == 1
        outputs.append(without_seconds((tmp_path / batch).read_text()))
    assert outputs[0] == outputs[1] == outputs[2]
    records = [json.loads(line) for line in outputs[0].splitlines()]
    names = ["a", 2, 3, 7, "b", 6, 7, "c", "a", 11]
    assert [record.get("id", record.get("line")) for record in records] == names
    assert records[0]["input"] == "Hi"
    assert records[6]["input"] == [{"role": "user", "content": "Hi"}]
    failed = [place for place, record in enumerate(records) if "error" in record]
    assert failed[:3] == [1, 3, 5]
    assert "not JSON" in records[1]["error"]
    assert "'input' is empty" in records[3]["error"]
    assert "128" in records[5]["error"]
    assert records[0] == records[8]
    assert f"{len(failed)} of 10 lines of" in result.stderr


def test_line_beyond_its_deadline_fails(run: Run, tmp_path: Path) -> None:
    result = run("--output", str(tmp_path / "out"), "-o", "deadline=1e-9")
    records = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert result.exit_code == 1
    assert "10 of 10 lines" in result.stderr
    assert re.search("deadline exceeded after [01] tokens; raise it with -o deadline=", records[0]["error"])
    assert set(records[0]) == {"id", "input", "error"}
    for deadline in ("0", "-1", "NaN"):
        result = run("--output", str(tmp_path / "other"), "-o", f"deadline={deadline}", "--batch-size", "2")
        assert result.exit_code == 1
        assert "deadline is" in result.stderr.splitlines()[-1]


def test_lines_are_written_in_order_with_limited_lookahead() -> None:
    hold, asked = threading.Event(), list[str]()

    def ask(text: str, cancel: threading.Event) -> list[GenerationResult]:
        asked.append(text)
        assert text != "2" or hold.wait(20)
        return [result_of(text)]

    going = answers(ask, (InputLine(number, str(number)) for number in range(100)), 2)
    assert [next(going)[0].line_number for _ in range(2)] == [0, 1]
    reader = threading.Thread(target=lambda: next(going))
    reader.start()
    reader.join(0.2)
    assert reader.is_alive()
    assert len(asked) <= 2 * AHEAD + 2
    hold.set()
    reader.join(20)
    assert [line.line_number for line, _ in going] == list(range(3, 100))


def test_error_of_a_line_is_recorded_and_an_option_error_ends_the_run() -> None:
    errors: dict[str, Exception] = {
        "a": PromptError("no"),
        "b": RuntimeError("engine\nfailed"),
        "d": OptionError("all"),
    }

    def ask(text: str, cancel: threading.Event) -> list[GenerationResult]:
        if text in errors:
            raise errors[text]
        return [] if text == "late" else [result_of(text)]

    going = answers(ask, [InputLine(number, text) for number, text in enumerate(("a", "b", "c", "late", "d", "e"))], 3)
    found = [next(going)[1] for _ in range(4)]
    assert found[:2] == [errors["a"], errors["b"]]
    assert isinstance(found[2], list)
    assert "deadline exceeded" in str(found[3])
    with pytest.raises(OptionError, match="all"):
        next(going)


def test_interrupt_keeps_finished_results_and_cancels_running_requests(tmp_path: Path) -> None:
    ended = list[str]()

    def ask(text: str, cancel: threading.Event) -> list[GenerationResult]:
        if text == "1":
            raise KeyboardInterrupt
        if text == "2":
            assert cancel.wait(20)
            ended.append(text)
        return [result_of(text)]

    def broken(text: str, cancel: threading.Event) -> list[GenerationResult]:
        raise RuntimeError("engine\nfailed")

    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text("".join(f'{{"input": "{number}"}}\n' for number in range(3)))
    with pytest.raises(KeyboardInterrupt):
        answer_file(ask, source, target, 3, resume=False, overwrite=False)
    assert [record["text"] for record in records(target)] == ["0"]
    assert ended == ["2"]
    with pytest.raises(FreeExportError, match="2 of 3 lines"):
        answer_file(broken, source, target, 3, resume=True, overwrite=False)
    assert records(target)[2] == {"line": 3, "input": "2", "error": "RuntimeError: engine failed"}


def answered(path: Path, lines: Sequence[Line], resume: bool = False, overwrite: bool = False) -> list[Line]:
    """The lines that were answered in `path` with fixed results, broken ones with an error."""
    with ResultFile(path) as results:
        left = list(results.resume(list(lines)) if resume else results.begin(lines, overwrite))
        for line in left:
            result = {"error": line.reason} if isinstance(line, BrokenLine) else fields_of(result_of("é"))
            results.write(line, **result)
    return left


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_line_has_its_id_input_result_and_target(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    answered(path, [InputLine(3, "x", "y", "a"), BrokenLine(4, "bad"), InputLine(5, "\ud800", "", "\ud800é")])
    assert path.read_text(encoding="utf-8").splitlines()[0] == (
        '{"id": "a", "input": "x", "text": "é", "token_ids": [1], "exited": [false], "finish_reason": "eos", '
        '"seconds": 0.0, "exit_rate": 0.0, "target": "y"}'
    )
    _, broken, escaped = records(path)
    assert broken == {"line": 4, "error": "bad"}
    assert (escaped["id"], escaped["input"], escaped["target"]) == ("\ud800é", "\ud800", "")


def test_nonempty_output_is_refused_or_truncated_at_the_first_result(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("precious")
    with pytest.raises(OptionError, match="exists; continue with --resume, replace with --overwrite"):
        answered(path, [InputLine(1, "x")])
    answered(path, [], overwrite=True)
    assert path.read_text() == "precious"
    answered(path, [InputLine(1, "x"), InputLine(2, "x")], overwrite=True)
    assert [record["line"] for record in records(path)] == [1, 2]


def test_run_that_fails_before_its_first_result_leaves_no_file(tmp_path: Path) -> None:
    path, kept = tmp_path / "out.jsonl", tmp_path / "kept.jsonl"
    kept.touch()
    for output in (path, kept):
        with pytest.raises(KeyboardInterrupt), ResultFile(output):
            raise KeyboardInterrupt
    assert (path.exists(), kept.exists()) == (False, True)
    with pytest.raises(OptionError, match="cannot be written"):
        ResultFile(tmp_path)
    with pytest.raises(OptionError, match=r"directory .*absent does not exist; create it first"):
        ResultFile(tmp_path / "absent" / "out.jsonl")


def test_resume_continues_after_the_finished_lines(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    done: list[Line] = [InputLine(1, "x"), InputLine(2, "x", id=5), InputLine(3, "x", id="5"), BrokenLine(4, "bad")]
    answered(path, done, resume=True)  # nothing to resume is no error
    others: list[Line] = [
        InputLine(5, "x"),
        InputLine(6, "x", id=1),
        InputLine(7, "x", id="x"),
        InputLine(8, "x", id=5),
    ]
    with ResultFile(path) as results:
        assert results.resume([*done, *others]) == others
        assert (results.count, results.failures) == (4, 1)


@given(st.data())
def test_file_truncated_anywhere_is_resumed_to_the_same_results(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.unlink(missing_ok=True)
    lines = [InputLine(1, "x", id="é"), InputLine(2, "x"), InputLine(3, "x", id=3), InputLine(4, "x", id=3)]
    answered(path, lines)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    answered(path, lines, resume=True)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "content",
    [
        '{"input": "a", "id": 1}\n',
        '{"line": 1, "input": "a"}\n',
        '{"line": 10, "error": "x"}\n',
        '{"id": 1, "input": "a"}',
        '{"line": 1, "error": "x"}\nnotes\n',
        '{"line": 1, "error": "x"}\nnotes',
        '{"line": 1, "error": "x"}\n{"line": 2, "error": "x"}\n{"line": 3, "error": "x"}\n',
        "[]\n",
        "\n",
        "\x00\x00\x00",
    ],
)
def test_resume_refuses_a_foreign_file_and_leaves_it_unchanged(tmp_path: Path, content: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(OptionError, match=r"line \d is not the result of that input line"):
        answered(path, [InputLine(1, "x"), InputLine(2, "x")], resume=True)
    assert path.read_text() == content


def test_full_disk_leaves_complete_lines(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    code = """
        import resource, signal, sys
        from pathlib import Path
        from freeexport.system.jsonl import InputLine
        from freeexport.system.answers import ResultFile
        from runtime.errors import FreeExportError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
        with ResultFile(Path(sys.argv[1])) as results:
            try:
                for number in range(9):
                    results.write(InputLine(number, "x"), text="y" * 90, token_ids=[], exited=[])
            except FreeExportError as error:
                print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "cannot be written" in printed
    assert "--resume" in printed
    assert [record["line"] for record in records(path)] == [0, 1]


def test_results_are_written_to_standard_output_or_a_pipe(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, unread = tmp_path / "pipe", tmp_path / "unread"
    os.mkfifo(path)
    os.mkfifo(unread)
    with monkeypatch.context() as patched:
        patched.setattr("freeexport.system.jsonl.PIPE_SECONDS", 0.05)
        result = run("--output", str(unread))
    assert "nothing reads the pipe" in result.stderr.splitlines()[-1]
    with subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE, text=True) as reader:
        run("--output", str(path))
        assert reader.stdout is not None
        read = reader.stdout.read()
    assert len(read.splitlines()) == 10
    for more in ([], ["--output", "-"]):
        result = run(*more, text="\n".join(LINES) + "\n")
        assert result.exit_code == 1
        assert without_seconds(result.stdout) == without_seconds(read)
