"""Examples of a property are the same in every run. A search tries more and different ones."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import REPEATED, SEARCH, TIMES, tries


def drawn() -> list[int]:
    found = list[int]()

    @settings(settings.get_profile(REPEATED))
    @given(st.integers(0, 10**9))
    def collect(number: int) -> None:
        found.append(number)

    collect()
    return found


def test_hypothesis_examples_do_not_depend_on_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = drawn()
    constants = range(10**8, 10**8 + 1000)
    (tmp_path / "module_with_constants.py").write_text(f"CONSTANTS = {list(constants)}")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("module_with_constants")
    after = drawn()
    assert after == before
    assert not set(constants) & set(after)


def test_search_profile_tries_more_examples_and_prints_how_to_repeat_them() -> None:
    usual = settings.get_current_profile_name()
    try:
        settings.load_profile(REPEATED)
        assert tries(40).max_examples == 40
        settings.load_profile(SEARCH)
        assert tries(40).max_examples == 40 * TIMES
        assert settings.default.max_examples == 100 * TIMES
        assert settings.default.print_blob
        assert not settings.default.derandomize
    finally:
        settings.load_profile(usual)
