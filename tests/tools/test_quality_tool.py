"""Answers of precisions compared with fp32's."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from checkpoints import BY_NAME, Bundles
from click.testing import CliRunner

from tools.quality import chat_prompts, first_different_token, main


def test_there_are_200_different_prompts_of_ten_kinds() -> None:
    prompts = chat_prompts(200)
    assert set(Counter(kind for kind, _ in prompts).values()) == {20}
    assert len({prompt[0]["content"] for _, prompt in prompts}) == 200
    assert len({kind for kind, _ in chat_prompts(10)}) == 10


def test_fp32_equals_itself_and_a_coarser_precision_is_less_likely(bundle: Bundles, tmp_path: Path) -> None:
    paths = [str(bundle(BY_NAME["llama-tied"], precision=name)) for name in ("fp32", "int4")]
    arguments = ["precisions", *paths, "--samples", "10", "--tokens", "12", "--output", str(tmp_path / "q.json")]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert "| fp32 | 10 of 10 |" in result.stdout
    fp32, int4 = json.loads((tmp_path / "q.json").read_text())["rows"]
    assert (fp32["same_answers"], fp32["agreement"], fp32["gap"]) == (10, 1.0, None)
    assert int4["same_answers"] < 10
    assert 0.3 < int4["agreement"] < 1.0
    assert int4["likelihood"] < fp32["likelihood"] < 0
    assert int4["gap"] > 0
    assert sum(int4["same_by_kind"].values()) == int4["same_answers"]


@pytest.mark.parametrize(
    ("ours", "theirs", "place"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 3], 1), ([1, 3], [1], 1), ([], [], None)],
)
def test_the_first_difference_is_found(ours: list[int], theirs: list[int], place: Any) -> None:
    assert first_different_token(ours, theirs) == place
