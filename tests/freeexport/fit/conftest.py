"""A machine whose speeds are known, and a task for tiny models."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import BY_NAME, Case

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.exit_file import ExitFile, write_exit_file
from freeexport.costs import bytes as counting
from freeexport.fit import fit_plan
from freeexport.fit.fit_options import FitOptions

STEP = {"step": 0.01, "tokens_per_second": 1000.0}
# Two conversions, and four seconds of training.
BUDGET = 95.0


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "CALL_BYTES", 0)  # which is more than these models weigh
    monkeypatch.setattr(fit_plan, "bandwidth_of", lambda threads: 1e10)
    monkeypatch.setattr(fit_plan, "training_speed", lambda *given, **options: STEP)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """330 words and their reverse."""
    draw, words = random.Random(0), set[str]()
    while len(words) < 330:
        words.add("".join(draw.choices("abcdef", k=draw.randint(3, 8))))
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps({"input": word, "target": word[::-1]}) + "\n" for word in sorted(words)))
    return path


@pytest.fixture
def options(checkpoint: Callable[[Case], Path], task: Path, tmp_path: Path) -> Callable[..., FitOptions]:
    """Options for a tiny decoder and the task."""

    def make(case: str = "llama-tied", **given: Any) -> FitOptions:
        defaults = {"data": task, "metric": "chrf", "budget": BUDGET, "threads": 1}
        return FitOptions(str(checkpoint(BY_NAME[case])), tmp_path / "out", **{**defaults, **given})

    return make


@pytest.fixture
def with_exit(options: Callable[..., FitOptions], tmp_path: Path) -> Callable[..., FitOptions]:
    """Options for a model whose weights count as trained for an exit after layer 2."""

    def make(**given: Any) -> FitOptions:
        found = options(**given)
        model = tmp_path / "model"
        shutil.copytree(found.model, model)
        sha256 = open_checkpoint(str(model)).sha256
        write_exit_file(model, ExitFile(2, sha256, "logit-kd", "full"))
        return replace(found, model=str(model))

    return make
