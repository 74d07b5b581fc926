"""Checkpoints that `train` writes go through `convert` and `verify`, for every tune mode."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import BY_NAME, CASES, Case
from command_line import invoke, succeed

from freeexport.verification.batches import QUICK
from freeexport.verification.verification import verify
from runtime.bundle.bundle import Bundle

LLAMA = BY_NAME["llama-tied"]
T5 = next(case for case in CASES if case.name.startswith("t5"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"input": f"word {n} is", "target": f"{n % 7} and {n % 5}"}) for n in range(60)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(("case", "tune"), [(T5, "full"), (LLAMA, "lora"), (T5, "exit")])
def test_trained_exit_is_converted_at_its_layer_and_verified(
    case: Case, tune: str, data: Path, tmp_path: Path, checkpoint: Callable[[Case], Path]
) -> None:
    trained, out = tmp_path / "trained", tmp_path / "bundle"
    options = {"full": [], "lora": ["--rank", 4], "exit": ["--exit-head-layers", 1]}[tune]
    succeed("train", checkpoint(case), trained, "--data", data, "--exit-layer", 2, "--tune", tune, "--steps", 3,
            "--batch-tokens", 512, *options, "--learning-rate", 0.01)  # fmt: skip
    succeed("convert", trained, out, "--verify", "none")
    bundle = Bundle.open(out)
    assert bundle.manifest.exit_layer == 2
    report = verify(bundle, str(trained), extent=QUICK)
    assert report["passed"], report
    result = invoke("convert", trained, tmp_path / "other", "--exit-layer", "1")
    assert result.exit_code == 1
    assert "was trained to exit after layer 2, not 1" in result.output
