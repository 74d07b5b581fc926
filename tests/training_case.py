"""Helpers for tests of training: data, options of short runs, and logged values."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from checkpoints import BY_NAME, Case

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.transformers_model import reference_model
from freeexport.training.batches import Collator, described, examples
from freeexport.training.exit_modules import KnownTokens, trained_exit
from freeexport.training.frozen import FrozenExit
from freeexport.training.shallow_deep import MEASURES, ShallowDeep, SharedHead
from freeexport.training.train import Trained
from freeexport.training.trainer import decided_rows
from freeexport.training.training_options import TrainingOptions

T5 = BY_NAME["t5-deep-decoder"]
LLAMA = BY_NAME["llama-tied"]


class Run(NamedTuple):
    out: Path
    trained: Trained


class Runs(Protocol):
    """Trains a case with `run_options(**options)`."""

    def __call__(self, case: Case, **options: Any) -> Run: ...


def write_data(directory: Path) -> None:
    """Write 40 words with their reverse for training, and 8 for validation."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdef", k=draw.randint(2, 9))) for _ in range(48)]
    for name, part in (("train", words[:40]), ("validation", words[40:])):
        lines = (json.dumps({"input": word, "target": word[::-1]}) + "\n" for word in part)
        (directory / f"{name}.jsonl").write_text("".join(lines))


def run_options(data: Path, **changes: Any) -> TrainingOptions:
    """Return options for three steps of about 8 words, with an evaluation at the end."""
    given = {"exit_layer": 2, "steps": 3, "batch_tokens": 160, "evaluate_every": 3, **changes}
    return TrainingOptions(data / "train.jsonl", validation=data / "validation.jsonl", **given)


def logged(out: Path, name: str = "loss") -> list[float]:
    """Return all logged values of a metric."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def tensors(directory: Path) -> dict[str, np.ndarray]:
    opened = open_checkpoint(str(directory))
    return {name: opened.read(name) for name in opened.names()}


def evaluated(out: Path, options: TrainingOptions) -> dict[str, float]:
    """Evaluate a written checkpoint on the validation examples, with the complete model."""
    opened = open_checkpoint(str(out))
    description = described(opened, options)
    _, validation, _ = examples(opened, description, options)
    own, known = trained_exit(opened, description)
    module = ShallowDeep(reference_model(opened), description, options.exit_layer, "ce", own=own, known=known).eval()
    batch = Collator(opened.generation_config.get("decoder_start_token_id") if module.seq2seq else None)(validation)
    with torch.no_grad():
        rows = module(**batch)["measures"]
    decided = decided_rows(batch["labels"], module.seq2seq)
    means = dict(zip(MEASURES, rows.mean(0).tolist(), strict=True))
    agreement = float(rows[decided, MEASURES.index("agreement")].mean())
    return {"shallow_loss": means["shallow_loss"], "deep_loss": means["deep_loss"], "agreement": agreement}


def frozen_exit(
    own: Any, head: SharedHead, exit_layer: int, layers: int, known: KnownTokens | None = None
) -> FrozenExit:
    """Return an exit without a model, with distillation of weight 0.5."""
    parts = {"own": own, "head": head, "known": known, "exit_layer": exit_layer, "layers": layers}
    return FrozenExit(SimpleNamespace(**parts, loss="logit-kd", alpha=0.5, seq2seq=False))  # type: ignore[arg-type]
