"""Runs are made once a session: tests must not write into what they left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Case
from training_case import Run, Runs, run_options, write_data

from freeexport.training.train import train


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl and validation.jsonl."""
    directory = tmp_path_factory.mktemp("words")
    write_data(directory)
    return directory


@pytest.fixture(scope="session")
def run(checkpoint: Callable[[Case], Path], words: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made: dict[Any, Run] = {}

    def build(case: Case, **options: Any) -> Run:
        key = (case.name, *sorted(options.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("run") / "out"
            made[key] = Run(out, train(str(checkpoint(case)), out, run_options(words, **options)))
        return made[key]

    return build
