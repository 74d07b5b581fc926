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

from freeexport.system.jsonl import BrokenLine, InputLine, open_pipe, read_requests
from runtime.errors import OptionError

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def requests(tmp_path: Path) -> Callable[..., list[InputLine | BrokenLine]]:
    """The requests in a file of these lines; what is no bytes or string is written as JSON."""

    def content(line: Any) -> bytes:
        return line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()

    def read(*lines: Any) -> list[InputLine | BrokenLine]:
        path = tmp_path / "input.jsonl"
        path.write_bytes(b"\n".join(map(content, lines)))
        return list(read_requests(path))

    return read


def test_line_has_an_input_and_optionally_target_and_id(requests: Callable[..., list[Any]]) -> None:
    assert requests(
        b'\xef\xbb\xbf{"input": "after a byte order mark"}\r',
        " ",
        {"input": CHAT, "target": "yo", "id": "a", "more": [1]},
        {"input": "é\u2028x", "id": 7, "target": None},
        "",
    ) == [InputLine(1, "after a byte order mark"), InputLine(3, CHAT, "yo", "a"), InputLine(4, "é\u2028x", None, 7)]
    assert requests({"id": "x"}) == [BrokenLine(1, "'input' is missing", "x")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"input": "a"', "not JSON: .* at position 13"),
        ("text", "not JSON"),
        ("[" * 100_000, "invalid JSON"),
        ('{"input": "a", "id": ' + "1" * 5000 + "}", "invalid JSON"),
        (b'{"input": "\xff"}', "not UTF-8: byte 0xff at position 11"),
        (["a"], "list instead of an object with 'input'"),
        ("null", "NoneType instead of an object"),
        ({"target": "a"}, "'input' is missing$"),
        ({"text": "a"}, "'input' is missing, it has 'text'; rename it to 'input'"),
        ({"input": 10**400}, "'input' is int"),
        ('{"input": 1e400}', "'input' is float"),
        ('{"input": "a", "target": ' + "9" * 400 + "}", "'target' is int"),
        ({"input": ""}, "'input' is empty"),
        ({"input": []}, "'input' is empty"),
        ({"input": None}, "'input' is NoneType, not a string or a list of messages"),
        ({"input": {"role": "user", "content": "a"}}, "'input' is dict"),
        ({"input": ["a"]}, "message 0 of 'input' is str"),
        ({"input": [*CHAT, {"role": "user"}]}, "message 1 of 'input' has no string 'content'"),
        ({"input": [{"role": 3, "content": "a"}]}, "message 0 of 'input' has no string 'role'"),
        ({"input": "a", "id": 1.5}, "'id' is float"),
        ({"input": "a", "id": True}, "'id' is bool"),
        ({"input": "a", "target": ["b"]}, "'target' is list"),
    ],
)
def test_malformed_line_is_reported_and_the_others_are_read(
    requests: Callable[..., list[Any]], line: Any, reason: str
) -> None:
    first, broken, last = requests({"input": "a"}, line, {"input": "b"})
    assert (first, last) == (InputLine(1, "a"), InputLine(3, "b"))
    assert isinstance(broken, BrokenLine)
    assert broken.line_number == 2
    assert re.search(reason, broken.reason)


def test_overlong_line_is_reported_and_the_others_are_read(
    requests: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freeexport.system.jsonl.MAX_LINE", 1 << 20)
    longest = json.dumps({"input": "x" * ((1 << 20) - 14)})
    assert len(longest) + 1 == 1 << 20
    read = requests({"input": "a"}, longest, longest + " ", longest * 5, {"input": "b"}, longest + " ")
    assert [line.line_number for line in read] == [1, 2, 3, 4, 5, 6]
    assert [isinstance(line, BrokenLine) for line in read] == [False, False, True, True, False, False]
    assert read[3] == BrokenLine(4, "longer than 1 MiB")


def test_endless_input_without_newlines_fails_with_little_memory() -> None:
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
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == ["/dev/zero, line 1 is longer than 1024 MiB; name a JSONL file", "True"]


def test_pipe_is_read_and_one_without_a_writer_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with subprocess.Popen(["sh", "-c", f'echo \'{{"input": "a"}}\' > "{path}"']):
        assert list(read_requests(path)) == [InputLine(1, "a")]
    monkeypatch.setattr("freeexport.system.jsonl.PIPE_SECONDS", 0.05)
    for mode, nobody in (("rb", "nothing writes to"), ("wb", "nothing reads")):
        os.mkfifo(path := tmp_path / mode)
        with pytest.raises(OptionError, match=f"{nobody} the pipe .*; start the other process"):
            open_pipe(path, mode)
        assert f"waiting for a process that {'writes to' if mode == 'rb' else 'reads'}" in capfd.readouterr().err
        (path.open if mode == "rb" else path.read_bytes)(*(["wb"] * (mode == "rb")))  # so that the thread ends


def test_unreadable_input_is_refused_immediately(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(OptionError, match="cannot be read"):
            read_requests(path)
