from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from traces import trace

from freeexport.traces.cache import TraceCache, TraceKey
from runtime.errors import OptionError

KEY = TraceKey("ab" * 32, "cd" * 32, 2, "softmax", 64)
FIRST, SECOND = trace([0.1, 1 / 3, 1.0], [True, False, True], line=3), trace([], [], line=7)


def filled(path: Path) -> Path:
    cache = TraceCache(path, KEY)
    cache.add(FIRST)
    cache.add(SECOND)
    return path


def test_what_was_added_is_there_to_the_last_bit(tmp_path: Path) -> None:
    cache = TraceCache(filled(tmp_path / "traces"), KEY)
    for one in (FIRST, SECOND):
        found = cache.get(one.line)
        assert found is not None
        for name in ("confidence", "agrees", "nll", "token"):
            assert getattr(found, name).dtype == getattr(one, name).dtype
            np.testing.assert_array_equal(getattr(found, name), getattr(one, name))
    assert cache.get(4) is None


def test_wherever_a_run_was_killed_whole_lines_are_kept(tmp_path: Path) -> None:
    content = filled(tmp_path / "whole").read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content)):
        path = tmp_path / "cut"
        path.write_bytes(content[:cut])
        cache = TraceCache(path, KEY)
        assert (cache.get(3) is not None) == (cut >= ends[1])
        assert cache.get(7) is None
        cache.add(SECOND)
        assert TraceCache(path, KEY).get(7) is not None


@pytest.mark.parametrize("change", [{"model": "ef" * 32}, {"data": "x"}, {"confidence": "entropy"}, {"exit_layer": 3}])
def test_traces_of_another_run_are_not_used_and_replaced_at_the_first_new_one(
    tmp_path: Path, change: dict[str, object]
) -> None:
    path = filled(tmp_path / "traces")
    before = path.read_bytes()
    other = replace(KEY, **change)  # type: ignore[arg-type]
    cache = TraceCache(path, other)
    assert cache.get(3) is None
    assert path.read_bytes() == before
    cache.add(SECOND)
    assert TraceCache(path, KEY).get(3) is None
    assert TraceCache(path, other).get(7) is not None


@pytest.mark.parametrize("content", ["hello\n", "hello", '{"input": "a"}\n', "[1]\n", '{"kinds'])
def test_a_file_of_another_kind_is_left_as_it_is(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes"
    path.write_text(content)
    with pytest.raises(OptionError, match="holds no traces"):
        TraceCache(path, KEY)
    assert path.read_text() == content
