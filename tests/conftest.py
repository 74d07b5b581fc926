"""Fixtures of the whole session: random checkpoints are written once, and their models are loaded once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Case, load

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """The directory of a case's checkpoint; tests must not write into it."""
    written: dict[str, Path] = {}

    def build(case: Case) -> Path:
        if case.name not in written:
            directory = tmp_path_factory.mktemp("checkpoint") / case.name
            case.build(directory)
            written[case.name] = directory
        return written[case.name]

    return build


@pytest.fixture(scope="session")
def source_model(checkpoint: Callable[[Case], Path]) -> Callable[[Case], Any]:
    """A case's Hugging Face model, float32, in evaluation mode; tests must not change it."""
    loaded: dict[str, Any] = {}

    def model(case: Case) -> Any:
        if case.name not in loaded:
            loaded[case.name] = load(checkpoint(case))
        return loaded[case.name]

    return model


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """The 20 prompts for SmolLM2. They were fixed before any result and never change."""
    return (Path(__file__).parent / "prompts.txt").read_text(encoding="utf-8").splitlines()
