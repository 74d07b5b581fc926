"""Losses of the compared methods, given to `train` by tools/paper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Case
from click.testing import CliRunner
from training_case import LLAMA, logged, run_options, tensors, write_data

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.exit_file import read_exit_file
from runtime.errors import OptionError
from tools.paper.__main__ import main
from tools.paper.losses import LOSSES


def test_weighted_cross_entropy_trains_all_layers_and_allows_any_exit(
    checkpoint: Callable[[Case], Path], tmp_path: Path
) -> None:
    write_data(tmp_path)
    out = tmp_path / "out"
    given = ["--data", tmp_path / "train.jsonl", "--validation", tmp_path / "validation.jsonl", "--loss", "weighted-ce"]
    sizes = ["--exit-layer", 2, "--steps", 3, "--batch-tokens", 160, "--evaluate-every", 3, "--learning-rate", 3e-3]
    arguments = list(map(str, ["train", checkpoint(LLAMA), out, *given, *sizes]))
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert len(logged(out)) == 3
    before, after = tensors(checkpoint(LLAMA)), tensors(out)
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    exit_file = read_exit_file(out)
    assert exit_file is not None
    assert (exit_file.exit_layer, exit_file.loss, exit_file.trained) == (2, "weighted-ce", True)
    assert open_checkpoint(str(out)).exit_layer(LLAMA.layers, 1) == 1
    unknown = CliRunner().invoke(main, [*arguments[:-2], "--loss", "ce"])
    assert "'ce' is not 'weighted-ce'" in unknown.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exit_head_layers": 2}, "--loss weighted-ce is for an exit without"),
        ({"exit_vocab": 99}, "--loss weighted-ce is for an exit without"),
        ({"tune": "exit", "exit_head_layers": 1}, "--loss weighted-ce trains layers, which --tune exit freezes"),
        ({"loss_alpha": 0.5}, "--loss weighted-ce has none"),
    ],
)
def test_loss_over_layers_is_refused_for_an_exit_with_its_own_layers(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        run_options(Path(), loss=LOSSES["weighted-ce"], **change)


def test_run_records_the_name_of_its_loss() -> None:
    assert run_options(Path(), loss=LOSSES["weighted-ce"]).recorded()["loss"] == {"name": "weighted-ce"}
