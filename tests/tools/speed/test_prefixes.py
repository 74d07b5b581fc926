"""The time to the first token of prompts that begin alike is measured, and their tokens are compared."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from runtime.engines.kv_cache import KVCache
from tools.speed.prefixes import main

GIVEN = ["--force", "--rounds", "2", "--shared", "150", "--own", "9"]


def test_prompts_are_read_and_reused_in_turn(chat: Path) -> None:
    result = CliRunner().invoke(main, [*GIVEN, str(chat)], catch_exceptions=False)
    assert re.match(r"150 shared tokens and 9 own, 144 reused, .* after [\d.]+ ms, reused [\d.]+ ms", result.output)


def test_tokens_that_differ_are_an_error(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = KVCache.write
    monkeypatch.setattr(KVCache, "write", lambda cache, slot, first, rows: write(cache, slot, first, np.negative(rows)))
    result = CliRunner().invoke(main, [*GIVEN, str(chat)])
    assert result.exit_code == 1
    assert "tokens differ: (" in result.output
