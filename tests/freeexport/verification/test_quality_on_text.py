"""The cost of a precision: against the same model, against a spoilt one, and against figures computed apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import BY_NAME, Bundles, Case
from command_line import invoke, succeed

from freeexport.verification.batches import QUICK
from freeexport.verification.divergence import Quality, predictions_on, quality_of
from freeexport.verification.verification import verify
from runtime.bundle.bundle import Bundle
from runtime.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA, T5 = BY_NAME["llama-tied"], BY_NAME["t5-relu-tied"]
Model = Callable[[Case], Any]
each = pytest.mark.parametrize("case", [LLAMA, T5], ids=lambda case: case.name)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    lines = [{"input": f"What is {n}?", "target": f"{n} is a number, and so is {n * n}."} for n in range(11)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def measured(path: Path, model: Any, text: Path) -> Quality:
    bundle = Bundle.open(path)
    return quality_of(predictions_on(bundle, model, text), bundle.manifest.precision)


@each
def test_fp32_predictions_match_the_checkpoint(case: Case, text: Path, bundle: Bundles, source_model: Model) -> None:
    """The reference: one line at a time, without padding, by the model's own loss."""
    quality = measured(bundle(case, 2), source_model(case), text)
    assert quality.passed
    assert quality.agreement == 1.0
    assert quality.divergence == pytest.approx(0, abs=1e-6)
    assert quality.nll == pytest.approx(quality.reference_nll, abs=1e-5)
    assert quality.perplexity_ratio == pytest.approx(1, abs=1e-5)
    tokenizer, total, count = Tokenizer.load(bundle(case, 2)), 0.0, 0
    assert tokenizer is not None
    for line in map(json.loads, text.read_text().splitlines()):
        prompt, target = tokenizer.encode(line["input"]), tokenizer.encode(line["target"], special=False)
        if case is T5:
            inputs = {"input_ids": torch.tensor([prompt]), "labels": torch.tensor([target])}
            predicted = len(target)
        else:
            whole = torch.tensor([prompt + target])
            inputs, predicted = {"input_ids": whole, "labels": whole}, whole.shape[1] - 1
        with torch.no_grad():
            total += float(source_model(case)(**inputs, use_cache=False).loss) * predicted
        count += predicted
    assert quality.tokens == count
    assert quality.reference_nll == pytest.approx(total / count, rel=1e-4)


@each
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_weights_lose_some_quality_and_pass(
    case: Case, precision: str, text: Path, bundle: Bundles, source_model: Model
) -> None:
    quality = measured(bundle(case, 2, precision=precision), source_model(case), text)
    assert quality.passed
    assert 1e-6 < quality.divergence < quality.tolerance
    assert quality.agreement > 0.3


def test_a_quantized_bundle_is_verified(bundle: Bundles, checkpoint: Callable[[Case], Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(bundle(LLAMA, 2, precision="mixed"), tmp_path / "copy"))
    result = succeed("verify", path, "--quick", "--against", checkpoint(LLAMA))
    assert "quality on " in result.stdout
    opened = Bundle.open(path)
    assert opened.manifest.verified
    assert opened.verification is not None
    assert opened.verification["quality"]["passed"]
    assert opened.verification["greedy"]["tie"] is None
    page = invoke("inspect", path).stdout
    assert "same best token" in page
    assert "largest error" in page


def test_data_requires_a_checkpoint(bundle: Bundles) -> None:
    result = invoke("verify", bundle(LLAMA), "--data", "x.jsonl")
    assert result.exit_code == 2
    assert "requires --against MODEL" in result.stderr


def test_quality_is_measured_on_the_given_data(text: Path, bundle: Bundles, checkpoint: Callable[[Case], Path]) -> None:
    path = bundle(LLAMA, 2)
    report = verify(Bundle.open(path), str(checkpoint(LLAMA)), text, QUICK)
    tokenizer = Tokenizer.load(path)
    assert tokenizer is not None
    lines = [json.loads(line) for line in text.read_text().splitlines()]
    lengths = [len(tokenizer.encode(d["input"])) + len(tokenizer.encode(d["target"], special=False)) for d in lines]
    assert report["quality"]["tokens"] == int(np.sum(lengths)) - len(lines)
