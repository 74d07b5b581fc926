"""The JSON files that commands read beside those of a bundle: each is refused in one line, whatever it holds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from freeexport.calibrate.sources import unknown_of_bundle
from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.exit_file import read_exit_file
from runtime.bundle.calibration import read_calibration
from runtime.errors import FreeExportError

READERS: dict[str, Callable[[Path], Any]] = {
    "config.json": lambda path: open_checkpoint(str(path.parent)),
    "adapter_config.json": lambda path: open_checkpoint(str(path.parent)),
    "exit.json": lambda path: read_exit_file(path.parent),
    "calibration.json": read_calibration,
    "tokenizer.json": lambda path: unknown_of_bundle(path.parent),
}
CONTENTS = {"nested": "[" * 100_000, "cut": '{"a"', "digits": '{"a": 1' + "0" * 5000 + "}", "empty": "", "null": "\0"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "out.training").mkdir()
    return tmp_path / "out.training"


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("name", READERS)
def test_damaged_file_is_refused_in_one_line(name: str, content: str, directory: Path) -> None:
    (directory / name).write_text(content)
    with pytest.raises(FreeExportError) as refused:
        READERS[name](directory / name)
    message = str(refused.value)
    assert name in message
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize("name", READERS)
def test_named_pipe_is_refused(name: str, directory: Path) -> None:
    os.mkfifo(directory / name)
    with pytest.raises(FreeExportError):
        READERS[name](directory / name)


def test_named_pipe_in_a_checkpoint_is_refused(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "llama"}')
    os.mkfifo(directory / "tokenizer_config.json")
    with pytest.raises(FreeExportError, match=r"tokenizer_config\.json is no regular file"):
        open_checkpoint(str(directory))
