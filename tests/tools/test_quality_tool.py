"""Answers of precisions compared with fp32's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from checkpoints import BY_NAME, Bundles
from click.testing import CliRunner

from runtime.errors import OptionError
from tools import quality
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


def test_unfit_bundles_and_outputs_are_refused_before_any_work(
    bundle: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "quality_rows", lambda *arguments: pytest.fail("it decoded"))
    fp32, int4 = (str(bundle(BY_NAME["llama-tied"], precision=name)) for name in ("fp32", "int4"))
    other = str(bundle(BY_NAME["qwen3"], precision="fp32"))
    for given, problem in {
        (int4, fp32): "is in int4; name the fp32 bundle first",
        (fp32, other): "is not of the checkpoint of",
        (fp32, "--output", str(tmp_path / "none" / "q.json")): "--output: directory .* does not exist",
    }.items():
        raised = CliRunner().invoke(main, given).exception
        assert isinstance(raised, OptionError)
        assert re.search(problem, str(raised))
