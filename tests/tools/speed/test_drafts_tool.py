"""The tool that measures drafts from text, on a tiny bundle."""

from __future__ import annotations

import pytest
from checkpoints import CASES, Bundles
from click.testing import CliRunner

from tools.speed import drafts

LLAMA = next(case for case in CASES if case.name == "llama-tied")


def run(bundle: Bundles, *arguments: object) -> tuple[int, list[str]]:
    path = bundle(LLAMA, 2, capacity=512)
    given = [path, "--rounds", 2, "--max-new-tokens", 12, "--prompt", "repeat sentence", *arguments]
    result = CliRunner().invoke(drafts.main, list(map(str, given)), catch_exceptions=False)
    return result.exit_code, result.output.splitlines()


@pytest.fixture
def plain_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny bundle has no chat template."""
    monkeypatch.setattr(drafts, "chat", lambda prompt: prompt)


@pytest.mark.usefixtures("plain_prompts")
def test_every_ratio_is_shown_for_fresh_and_following_requests(bundle: Bundles) -> None:
    code, lines = run(bundle)
    assert code == 0
    assert lines[0].endswith("1 threads, 2 rounds")
    fresh, following = lines[-2:]
    assert fresh.startswith("  repeat sentence, fresh: worst ")
    assert following.startswith("  repeat sentence, next: worst ")
    for line in (fresh, following):
        ratios = [float(ratio) for ratio in line.partition("[")[2].partition("]")[0].split()]
        assert len(ratios) == 2
        assert ratios == sorted(ratios)


@pytest.mark.usefixtures("plain_prompts")
def test_what_does_not_pay_fails_where_that_is_required(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "WORST_REPEATED", 1e9)
    assert run(bundle)[0] == 0
    assert run(bundle, "--require")[0] == 1
