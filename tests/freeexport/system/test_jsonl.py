from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freeexport.system.answers import ResultWriter
from freeexport.system.jsonl import BrokenLine, Request, read_requests
from runtime.errors import OptionError

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def requests(tmp_path: Path) -> Callable[..., list[Request | BrokenLine]]:
    """The requests in a file of these lines; what is no bytes or string is written as JSON."""

    def read(*lines: Any) -> list[Request | BrokenLine]:
        path = tmp_path / "input.jsonl"
        path.write_bytes(b"\n".join(_bytes(line) for line in lines))
        return list(read_requests(path))

    return read


def _bytes(line: Any) -> bytes:
    return line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()


def finish(writer: ResultWriter, request: Request, text: str = "é") -> None:
    result = {"text": text, "token_ids": [1, 2], "exited": [True, False], "finish_reason": "eos"}
    writer.write(request, **result, seconds=0.25, exit_rate=0.5)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_has_input_and_perhaps_target_and_id(requests: Callable[..., list[Any]]) -> None:
    assert requests(
        {"input": "text"},
        {"input": CHAT, "target": "yo", "id": "a", "more": [1]},
        {"input": "é\u2028x", "id": 7, "target": None},
    ) == [Request(1, "text"), Request(2, CHAT, "yo", "a"), Request(3, "é\u2028x", None, 7)]


def test_blank_lines_count_but_are_left_out(requests: Callable[..., list[Any]]) -> None:
    content = requests("", '{"input": "a"}\r', "  ", '{"input": "b"}', "")
    assert content == [Request(2, "a"), Request(4, "b")]


def test_a_byte_order_mark_is_ignored(requests: Callable[..., list[Any]]) -> None:
    assert requests(b'\xef\xbb\xbf{"input": "a"}') == [Request(1, "a")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"input": "a"', "not JSON: .* at position 13"),
        ("text", "not JSON"),
        ("[" * 100_000, "not JSON that can be read"),
        ('{"input": "a", "id": ' + "1" * 5000 + "}", "not JSON that can be read"),
        (b'{"input": "\xff"}', "not UTF-8: byte 0xff at position 11"),
        (["a"], "list instead of an object with 'input'"),
        ("null", "NoneType instead of an object"),
        ({"target": "a"}, "'input' is missing$"),
        ({"text": "a"}, "'input' is missing, it has 'text'; rename it to 'input'"),
        ({"messages": CHAT}, "it has 'messages'; rename it to 'input'"),
        ({"input": 10**400}, "'input' is int"),
        ('{"input": 1e400}', "'input' is float"),
        ('{"input": "a", "target": ' + "9" * 400 + "}", "'target' is int"),
        ({"input": ""}, "'input' is empty"),
        ({"input": []}, "'input' is empty"),
        ({"input": None}, "'input' is NoneType, not a string or a list of messages"),
        ({"input": 3}, "'input' is int"),
        ({"input": {"role": "user", "content": "a"}}, "'input' is dict"),
        ({"input": ["a"]}, "message 0 of 'input' is str"),
        ({"input": [*CHAT, {"role": "user"}]}, "message 1 of 'input' has no string 'content'"),
        ({"input": [{"role": 3, "content": "a"}]}, "message 0 of 'input' has no string 'role'"),
        ({"input": "a", "id": 1.5}, "'id' is float"),
        ({"input": "a", "id": True}, "'id' is bool"),
        ({"input": "a", "target": ["b"]}, "'target' is list"),
    ],
)
def test_a_broken_line_is_named_and_the_others_go_on(
    requests: Callable[..., list[Any]], line: Any, reason: str
) -> None:
    first, broken, last = requests({"input": "a"}, line, {"input": "b"})
    assert (first, last) == (Request(1, "a"), Request(3, "b"))
    assert isinstance(broken, BrokenLine)
    assert broken.line_number == 2
    assert re.search(reason, broken.reason)


def test_a_broken_line_keeps_its_id(requests: Callable[..., list[Any]]) -> None:
    assert requests({"id": "x"}) == [BrokenLine(1, "'input' is missing", "x")]


def test_a_line_beyond_the_limit_is_broken_and_the_others_go_on(
    requests: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freeexport.system.jsonl.MAX_LINE", 1 << 20)
    longest = json.dumps({"input": "x" * ((1 << 20) - 14)})
    assert len(longest) + 1 == 1 << 20
    read = requests({"input": "a"}, longest, longest + " ", longest * 5, {"input": "b"}, longest + " ")
    assert [line.line_number for line in read] == [1, 2, 3, 4, 5, 6]
    assert [isinstance(line, BrokenLine) for line in read] == [False, False, True, True, False, False]
    assert read[3] == BrokenLine(4, "longer than 1 MiB")


def test_a_device_without_lines_ends_in_an_error_with_little_memory() -> None:
    script = """
        import resource
        from pathlib import Path
        from freeexport.system.jsonl import read_requests
        from runtime.errors import OptionError
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            list(read_requests(Path("/dev/zero")))
        except OptionError as error:
            print(error)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines() == ["/dev/zero, line 1 has no end in 1024 MiB; name a JSONL file", "True"]


def test_a_pipe_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with subprocess.Popen(["sh", "-c", f'echo \'{{"input": "a"}}\' > "{path}"']):
        assert list(read_requests(path)) == [Request(1, "a")]


def test_an_input_that_cannot_be_opened_is_refused_at_once(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(OptionError, match="cannot be read"):
            read_requests(path)


def test_results_are_written_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResultWriter(path) as writer:
        finish(writer, Request(3, "x", id="a"))
        assert path.read_text(encoding="utf-8") == (
            '{"id": "a", "text": "é", "token_ids": [1, 2], "exited": [true, false], "finish_reason": "eos", '
            '"seconds": 0.25, "exit_rate": 0.5}\n'
        )
        writer.write_error(BrokenLine(4, "bad"), "bad")
        assert records(path)[1] == {"line": 4, "error": "bad"}
        assert (writer.done, writer.failures) == (0, 1)


def test_a_line_repeats_the_target_that_the_input_had(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResultWriter(path) as writer:
        finish(writer, Request(1, "x", target="y"))
        finish(writer, Request(2, "x", target=""))
        finish(writer, Request(3, "x"))
    assert [record.get("target") for record in records(path)] == ["y", "", None]


def test_a_lone_surrogate_is_written_escaped(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResultWriter(path) as writer:
        writer.write_error(Request(1, "x", id="\ud800é"), "bad")
    assert records(path) == [{"id": "\ud800é", "error": "bad"}]


def test_an_output_with_content_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("precious")
    with pytest.raises(OptionError, match="exists; continue with --resume, replace with --overwrite"):
        ResultWriter(path)
    with pytest.raises(OptionError, match="contradict"):
        ResultWriter(path, resume=True, overwrite=True)
    assert path.read_text() == "precious"


def test_overwriting_empties_the_output_at_the_first_result(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")
    with ResultWriter(path, overwrite=True) as writer:
        assert path.read_text() == "old\n"
        finish(writer, Request(1, "x"))
        finish(writer, Request(2, "x"))
    assert [record["line"] for record in records(path)] == [1, 2]


def test_a_run_that_fails_before_its_first_result_leaves_no_file(tmp_path: Path) -> None:
    path, kept = tmp_path / "out.jsonl", tmp_path / "kept.jsonl"
    kept.touch()
    for output in (path, kept):
        with pytest.raises(KeyboardInterrupt), ResultWriter(output):
            raise KeyboardInterrupt
    assert not path.exists()
    assert kept.exists()


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent" / "out.jsonl"):
        with pytest.raises(OptionError, match="cannot be written"):
            ResultWriter(path)


def test_resuming_skips_what_is_done(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    done = [Request(1, "x"), Request(2, "x", id=5), Request(3, "x", id="5"), BrokenLine(4, "bad")]
    with ResultWriter(path, resume=True) as writer:  # nothing to resume is no error
        for request in done[:3]:
            finish(writer, request)  # type: ignore[arg-type]
        writer.write_error(done[3], "bad")
    with ResultWriter(path, resume=True) as writer:
        assert (writer.done, writer.failures) == (4, 1)
        assert all(writer.skip(request) for request in done)
        others = [Request(5, "x"), Request(1, "x", id=1), Request(6, "x", id="x")]
        assert not any(writer.skip(request) for request in others)


def test_of_lines_with_one_id_as_many_are_skipped_as_are_done(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResultWriter(path) as writer:
        finish(writer, Request(1, "x", id="a"))
    with ResultWriter(path, resume=True) as writer:
        assert [writer.skip(Request(number, "x", id="a")) for number in (1, 2)] == [True, False]


@given(st.data())
def test_a_file_cut_anywhere_is_resumed_to_the_same_results(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.unlink(missing_ok=True)
    todo = [Request(1, "x", id="é"), Request(2, "x"), Request(3, "x", id=3)]
    with ResultWriter(path) as writer:
        for request in todo:
            finish(writer, request)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with ResultWriter(path, resume=True) as writer:
        kept = writer.done
        for request in todo:
            if not writer.skip(request):
                finish(writer, request)
    assert path.read_bytes() == whole
    assert kept <= 3


@pytest.mark.parametrize(
    "content",
    [
        '{"input": "a", "id": 1}\n',
        '{"id": 1, "input": "a"}\n',
        '{"id": 1, "input": "a"}',
        '{"line": 1, "error": "x"}\nnotes\n',
        '{"line": 1, "error": "x"}\nnotes',
        '{"line": [1], "error": "x"}\n',
        "[]\n",
        "\n",
        "\x00\x00\x00",
    ],
)
def test_resuming_on_a_file_that_holds_something_else_is_refused_untouched(tmp_path: Path, content: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(OptionError, match=r"line \d is not a result of generate"):
        ResultWriter(path, resume=True)
    assert path.read_text() == content


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    code = """
        import resource, signal, sys
        from pathlib import Path
        from freeexport.system.jsonl import Request
        from freeexport.system.answers import ResultWriter
        from runtime.errors import FreeExportError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
        with ResultWriter(Path(sys.argv[1])) as writer:
            try:
                for number in range(9):
                    result = {"text": "y" * 50, "token_ids": [], "exited": [], "finish_reason": "eos"}
                    writer.write(Request(number, "x"), **result, seconds=1.0, exit_rate=0.0)
            except FreeExportError as error:
                print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "cannot be written" in printed
    assert "--resume" in printed
    assert [record["line"] for record in records(path)] == [0, 1]
