"""Which evaluation's weights a run keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CASES, Case
from click.testing import CliRunner

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.text_format import end_ids
from freeexport.checkpoints.tokenizer_files import load_tokenizer
from freeexport.checkpoints.transformers_model import reference_model
from freeexport.cli import main
from freeexport.training.options import TrainingOptions
from freeexport.training.train import train

sacrebleu = pytest.importorskip("sacrebleu")

T5, LLAMA = (next(case for case in CASES if case.name == name) for name in ("t5-deep-decoder", "llama-tied"))
WORDS = ("ab", "cab", "bead", "face", "decaf", "feed", "dad", "abbe")


@pytest.fixture
def options(tmp_path: Path) -> TrainingOptions:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input": word, "target": word[::-1]}) + "\n" for word in WORDS))
    return TrainingOptions(
        data, exit_layer=2, validation=data, steps=6, batch_size=4, evaluate_every=2, learning_rate=3e-3, patience=0
    )


def evaluations(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval_loss" in line]


def chrf_of_outputs(directory: Path) -> float:
    """By transformers, one prompt at a time."""
    checkpoint = open_checkpoint(str(directory))
    tokenizer, model = load_tokenizer(checkpoint), reference_model(checkpoint)
    outputs = []
    for word in WORDS:
        ids = torch.tensor([tokenizer(word)["input_ids"]])
        most = 2 * max(len(tokenizer(word[::-1], add_special_tokens=False)["input_ids"]) + 1 for word in WORDS)
        use = {} if not model.config.is_encoder_decoder else {"use_cache": False}
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=end_ids(checkpoint),
            **use,
        )
        start = 1 if model.config.is_encoder_decoder else ids.shape[1]
        outputs.append(tokenizer.decode(out[0, start:], skip_special_tokens=True))
    return float(sacrebleu.corpus_chrf(outputs, [[word[::-1] for word in WORDS]]).score) / 100


@pytest.mark.parametrize("case", [T5, LLAMA], ids=lambda case: case.name)
def test_the_weights_of_the_best_outputs_are_kept(
    case: Case, checkpoint: Callable[[Case], Path], options: TrainingOptions, tmp_path: Path
) -> None:
    result = train(str(checkpoint(case)), tmp_path / "out", replace(options, select_by="chrf"))
    seen = evaluations(tmp_path / "out")
    best = max(line["eval_chrf"] for line in seen)
    assert len(seen) == 3
    assert result.metrics["eval_chrf"] == best
    assert result.best_step == next(line["step"] for line in seen if line["eval_chrf"] == best)
    assert chrf_of_outputs(tmp_path / "out") == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("measure", ["agreement", "exits"])
def test_a_measure_of_the_exit_selects_as_well(
    measure: str, checkpoint: Callable[[Case], Path], options: TrainingOptions, tmp_path: Path
) -> None:
    result = train(str(checkpoint(LLAMA)), tmp_path / "out", replace(options, select_by=measure))
    found = [line[f"eval_{measure}"] for line in evaluations(tmp_path / "out")]
    assert result.metrics[f"eval_{measure}"] == max(found)
    assert result.best_step == 2 * (1 + found.index(max(found)))


def test_a_metric_that_does_not_fit_the_targets_is_one_line(
    checkpoint: Callable[[Case], Path], options: TrainingOptions, tmp_path: Path
) -> None:
    arguments = [*("--data", options.data, "--validation", options.data), "--exit-layer", 2, "--steps", 2]
    command = ["train", checkpoint(LLAMA), tmp_path / "out", *arguments, "--select-by", "punct-f1"]
    result = CliRunner().invoke(main, [str(part) for part in command])
    assert result.exit_code != 0
    assert "punct-f1 does not fit" in result.output
    assert not (tmp_path / "out").exists()
