"""JSON that someone else wrote: each kind of bad file is refused at once, in one line of the caller's own error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.bundle.json_file import (
    DEEPEST,
    MAX_DIGITS,
    UnreadableError,
    parse_json,
    read_json,
    read_object,
    read_text,
)
from runtime.errors import OptionError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**90), 10**90) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=20,
)  # fmt: skip


def refusal(text: str | bytes, **options: bool) -> str:
    with pytest.raises(UnreadableError) as refused:
        parse_json(text, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@given(VALUES, st.booleans())
def test_written_json_is_read_back(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parse_json(text) == parse_json(text.encode()) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON: Expecting value"),
        ("{'a': 1}", "not JSON: Expecting property name"),
        ("[" * 100_000, "not JSON of at most"),
        ('{"a":' * 100_000, "not JSON of at most"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "not JSON of at most"),
        ("1" + "0" * MAX_DIGITS, f"integer of {MAX_DIGITS + 1} digits"),
        ("1" + "0" * 5000, "integer of 5001 digits"),
        ("-1e999", "-1e999, which is out of the range of floats"),
        ("NaN", "NaN"),
        ("[-Infinity]", "-Infinity"),
        ('[{"a": 1, "b": 2, "a": 1}]', "the key 'a' twice"),
        (r'"\ud800"', "half of a surrogate pair"),
        (r'{"\uDFFF": 1}', "half of a surrogate pair"),
        (b'"\xff"', "not text in UTF-8"),
    ],
)
def test_malformed_json_is_refused_with_the_reason(text: str | bytes, reason: str) -> None:
    assert reason in refusal(text)


def test_numbers_and_levels_at_the_limit_are_read() -> None:
    assert float(parse_json("9" * MAX_DIGITS)) > 1e99
    assert parse_json("[" * DEEPEST + "]" * DEEPEST)
    assert parse_json(r'"\ud83d\ude00"') == "\U0001f600"


def test_nan_is_read_on_request() -> None:
    assert str(parse_json("[NaN, Infinity]", nan=True)) == "[nan, inf]"


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (pipe, "a named pipe, not a regular file"),
        (device, "a device, not a regular file"),
        (Path.mkdir, "a directory, not a regular file"),
        (lambda path: None, "No such file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (lambda path: path.write_text("[" + "1," * 50 + "1]"), "103 bytes, at most 100"),
        (lambda path: path.write_bytes(b"\xff"), "not text in UTF-8"),
        (lambda path: path.write_text("{"), "not JSON"),
    ],
)
def test_unreadable_file_is_named_with_the_remedy(make: Callable[[Path], Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    make(path)
    with pytest.raises(OptionError) as refused:
        read_json(path, "write it again", OptionError, limit=100)
    message = str(refused.value)
    assert message.startswith(f"{path} cannot be read (")
    assert reason in message
    assert message.endswith("; write it again")
    assert "\n" not in message


def test_file_of_unknown_size_is_not_read_beyond_the_limit() -> None:
    # Files of the kernel say that they have 0 bytes.
    with pytest.raises(UnreadableError, match="more than the 10 bytes"):
        read_text(Path("/proc/cpuinfo"), 10)


def test_null_character_in_a_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError):
        read_text(tmp_path / "a\0b")


def test_non_object_is_refused_if_an_object_is_required(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("[1]")
    with pytest.raises(OptionError, match="holds list, not an object; repair it"):
        read_object(path, "repair it", OptionError)
    path.write_text('{"a": 1}')
    assert read_object(path, "repair it", OptionError) == {"a": 1}
