"""Answers of precisions compared with fp32's."""

from __future__ import annotations

import json
from pathlib import Path

from checkpoints import BY_NAME, Bundles
from click.testing import CliRunner

from tools.quality import chat_prompts, main


def test_chat_prompts_are_200_distinct_prompts() -> None:
    prompts = chat_prompts(200)
    assert len({prompt[0]["content"] for prompt in prompts}) == len(prompts) == 200


def test_fp32_equals_itself_and_a_lower_precision_is_less_likely(bundle: Bundles, tmp_path: Path) -> None:
    paths = [str(bundle(BY_NAME["llama-tied"], precision=name)) for name in ("fp32", "int4")]
    arguments = [*paths, "--samples", "10", "--tokens", "12", "--output", str(tmp_path / "q.json")]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert "| fp32 | 10 of 10 |" in result.stdout
    fp32, int4 = json.loads((tmp_path / "q.json").read_text())["rows"]
    assert (fp32["same_answers"], fp32["agreement"]) == (10, 1.0)
    assert int4["same_answers"] < 10
    assert 0.3 < int4["agreement"] < 1.0
    assert int4["likelihood"] < fp32["likelihood"] < 0
