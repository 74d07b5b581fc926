"""Answers of precisions compared with fp32's, and tokens of modes and batches with each other."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CASES, Bundles
from click.testing import CliRunner

from runtime.decoding.calls import SlotCall
from tools.quality import chat_prompts, first_difference, main

BY_NAME = {case.name: case for case in CASES}


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


@pytest.mark.parametrize("name", ["llama-tied", "t5-wide-heads"])
def test_modes_and_batches_of_quantized_bundles_give_the_same_tokens(name: str, bundle: Bundles) -> None:
    path = bundle(BY_NAME[name], precision="mixed")
    arguments = ["modes", str(path), "--samples", "16", "--tokens", "16", "--threshold", "0.3", "--slots", "5"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    assert all("16 of 16 the same" in line for line in lines)
    assert "drafts accepted" in lines[-1]
    assert ", 0 drafts accepted" not in lines[-1]


def test_a_difference_is_listed_and_fails(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    run = SlotCall.run

    def wrong(call: SlotCall) -> None:
        run(call)
        if len(call.outputs.get("nll", ())) > 1:
            call.outputs["token"][:] = 5

    monkeypatch.setattr(SlotCall, "run", wrong)
    arguments = ["modes", str(bundle(BY_NAME["llama-tied"])), "--samples", "4", "--tokens", "12", "--threshold", "0.0"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "differences that are no ties: lossless, threshold 0, alone" in str(result.exception)


@pytest.mark.parametrize(
    ("ours", "theirs", "place"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 3], 1), ([1, 3], [1], 1), ([], [], None)],
)
def test_the_first_difference_is_found(ours: list[int], theirs: list[int], place: Any) -> None:
    assert first_difference(ours, theirs) == place
