from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, Case
from safetensors.numpy import save_file

from freeexport.checkpoints.checkpoint import CheckpointError, open_checkpoint
from freeexport.checkpoints.exit_file import EXIT_FILE, EXIT_WEIGHTS, ExitFile, read_exit_file, write_exit_file
from freeexport.system.output import link_or_copy
from graphs.exit_head import EXIT_MAP
from graphs.families import describe
from graphs.shapes import own_shapes

LLAMA = BY_NAME["llama-tied"]
WIDTH = 64
PLAIN = ExitFile(2, "0" * 64, "kd-dyn", "full")


@pytest.fixture
def with_exit(checkpoint: Callable[[Case], Path], tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint with an exit of its own; `change` replaces tensors, None drops one."""

    def build(base_sha256: str | None = None, **change: np.ndarray | None) -> Path:
        directory = tmp_path / "exit"
        directory.mkdir()
        for path in checkpoint(LLAMA).iterdir():
            link_or_copy(path, directory / path.name)
        base = open_checkpoint(str(directory)).sha256
        exit_file = ExitFile(2, base_sha256 or base, "logit-kd", "exit", exit_layers=1)
        opened = open_checkpoint(str(directory))
        shapes = exit_file.shapes(WIDTH) | own_shapes(describe(opened.config, opened), opened, 1)
        tensors: dict[str, Any] = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
        tensors.update(change)
        save_file({name: value for name, value in tensors.items() if value is not None}, directory / EXIT_WEIGHTS)
        write_exit_file(directory, exit_file)
        return directory

    return build


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema_version": 2}, "schema version 2"),
        ({"exit_layer": 0}, "exit_layer is '0'"),
        ({"exit_norm": True}, "the exit has a norm of its own, which is no longer supported; train one with --exit-h"),
        ({"exit_norm": True, "adapter_rank": 8}, "the exit has an adapter of rank 8 of its own"),
        ({"exit_layers": -1}, "exit_layers is '-1'"),
        ({"base_sha256": "ab"}, "base_sha256 is 'ab'"),
        ({"loss": "hinge"}, "loss is 'hinge'"),
        ({"tune": "left out"}, "lacks tune"),
        ({"text": "{"}, "cannot be read"),
        ({"text": "[]"}, "holds list"),
    ],
)
def test_invalid_values_are_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    assert read_exit_file(tmp_path) is None
    write_exit_file(tmp_path, PLAIN)
    assert read_exit_file(tmp_path) == PLAIN
    values = json.loads((tmp_path / EXIT_FILE).read_text()) | change
    text = json.dumps({name: value for name, value in values.items() if value != "left out"})
    (tmp_path / EXIT_FILE).write_text(change.get("text", text))
    with pytest.raises(CheckpointError, match=reason):
        read_exit_file(tmp_path)


def test_fields_of_older_versions_are_read(tmp_path: Path) -> None:
    written = ExitFile(2, "0" * 64, "logit-kd", "exit", exit_layers=1)
    write_exit_file(tmp_path, written)
    values = json.loads((tmp_path / EXIT_FILE).read_text()) | {"exit_norm": True, "adapter_rank": 0}
    (tmp_path / EXIT_FILE).write_text(json.dumps(values))
    assert read_exit_file(tmp_path) == written


def test_exit_tensors_are_read_and_hashed_with_the_checkpoint(
    with_exit: Callable[..., Path], checkpoint: Callable[[Case], Path]
) -> None:
    directory = with_exit()
    opened = open_checkpoint(str(directory))
    assert opened.exit is not None
    assert opened.shape(EXIT_MAP) == (WIDTH, WIDTH)
    assert np.array_equal(opened.read("exit.norm.weight"), np.full(WIDTH, 0.5, np.float32))
    plain = open_checkpoint(str(checkpoint(LLAMA)))
    assert plain.exit is None
    assert "exit.norm.weight" not in plain
    assert opened.sha256 != plain.sha256
    changed = {name: opened.read(name) for name in opened.names() if name.startswith("exit.")}
    changed["exit.norm.weight"][0] = 0.25
    save_file(changed, directory / EXIT_WEIGHTS)
    assert open_checkpoint(str(directory)).sha256 != opened.sha256


def test_exit_of_other_weights_is_refused(with_exit: Callable[..., Path]) -> None:
    opened = open_checkpoint(str(with_exit(base_sha256="f" * 64)))
    with pytest.raises(CheckpointError, match="trained on other weights"):
        _ = opened.sha256


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"exit.norm.weight": None}, "exit.norm.weight is missing"),
        ({EXIT_MAP: np.zeros((3, WIDTH), np.float32)}, rf"is \[3, {WIDTH}\], not \[{WIDTH}, {WIDTH}\]"),
    ],
)
def test_exit_weights_of_wrong_shape_are_refused(
    with_exit: Callable[..., Path], change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(str(with_exit(**change)))
