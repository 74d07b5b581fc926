"""The layers in torch are those of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import CASES, Case, load

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.training.exit_layers.module import ExitLayers
from graphs.families import describe

CASES_OF_DECODERS = [case for case in CASES if not case.name.endswith("t5") and "t5" not in case.name]


@pytest.mark.parametrize("case", CASES_OF_DECODERS, ids=lambda case: case.name)
def test_copies_of_the_last_layers_behind_no_map_say_what_the_model_says(
    checkpoint: Callable[[Case], Path], case: Case
) -> None:
    opened = open_checkpoint(str(checkpoint(case)))
    description = describe(opened.config, opened)
    norm = description.decoder.head.norm
    own = ExitLayers(
        description.decoder.layers[1:],
        opened.read,
        np.eye(description.hidden_size, dtype=np.float32),
        opened.read(norm.weight),
        norm.epsilon,
    )
    model = load(checkpoint(case))
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 250, (2, 21)))
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, use_cache=False)
        ours = own.norm(own(out["hidden_states"][1]))
    # transformers norms the last of its hidden states
    torch.testing.assert_close(ours, out["hidden_states"][-1], rtol=1e-4, atol=1e-4)
