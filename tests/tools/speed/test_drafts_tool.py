"""The tool that measures drafts from text, on a tiny bundle."""

from __future__ import annotations

import re

import pytest
from checkpoints import BY_NAME, Bundles
from click.testing import CliRunner

from tools.speed import drafts

LLAMA = BY_NAME["llama-tied"]


def test_every_ratio_is_shown_and_what_does_not_pay_fails_where_that_is_required(
    bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tiny bundle has no chat template.
    monkeypatch.setattr(drafts, "chat", lambda prompt: prompt)
    given = [str(bundle(LLAMA, 2, capacity=512)), *("--rounds", "2", "--max-new-tokens", "12")]
    given += ["--prompt", "repeat sentence"]
    done = CliRunner().invoke(drafts.main, given, catch_exceptions=False)
    assert done.exit_code == 0
    first, *_, fresh, following = done.output.splitlines()
    assert first.endswith("1 threads, 2 rounds")
    for line, name in ((fresh, "fresh"), (following, "next")):
        found = re.match(rf"  repeat sentence, {name}: worst [\d.]+ \[([\d.]+) ([\d.]+)\] ", line)
        assert found is not None
        assert float(found[1]) <= float(found[2])
    monkeypatch.setattr(drafts, "WORST_REPEATED", 1e9)
    assert CliRunner().invoke(drafts.main, [*given, "--require"]).exit_code == 1
