"""An exit's own parameters in torch: layers as transformers has them, and losses of a frozen exit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import CASES, Case, load
from exit_layer_case import write_exit
from training_case import LLAMA, frozen_exit

from freeexport.checkpoints.checkpoint import CheckpointError, open_checkpoint
from freeexport.checkpoints.exit_file import EXIT_FILE
from freeexport.training import losses
from freeexport.training.exit_modules import ExitLayers
from freeexport.training.layer_modules import Encoded, norm_module
from freeexport.training.shallow_deep import SharedHead
from graphs.families import describe


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_copied_last_layers_reproduce_the_model(checkpoint: Callable[[Case], Path], case: Case) -> None:
    opened = open_checkpoint(str(checkpoint(case)))
    description = describe(opened.config, opened)
    norm, identity = description.decoder.head.norm, np.eye(description.hidden_size, dtype=np.float32)
    own = ExitLayers(description.decoder.layers[1:], opened.read, identity, norm_module(norm, opened.read))
    model = load(checkpoint(case))
    ids, mask = torch.from_numpy(np.random.default_rng(0).integers(3, 250, (2, 21))), torch.ones(2, 21)
    given: dict[str, torch.Tensor] = {"input_ids": ids}
    if description.encoder is not None:  # two prompts, one of them shorter
        mask[1, 9:] = 0
        given |= {"decoder_input_ids": ids.flip(0), "attention_mask": mask}
    with torch.no_grad():
        out = model(**given, output_hidden_states=True, use_cache=False)
        encoded = Encoded(out["encoder_last_hidden_state"], mask > 0) if description.encoder is not None else None
        states = out.get("decoder_hidden_states", out.get("hidden_states"))
        ours = own.norm(own(states[1], encoded))
    # transformers norms the last of its hidden states
    torch.testing.assert_close(ours, states[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("exit_layers", "reason"),
    [
        (0, r"has exit\.\S+, which exit\.json does not"),
        (1, r"has exit\.layers\.1\.\S+, which exit\.json does not"),
        (3, r"exit\.layers\.2\.\S+ is missing"),
        (99, "cannot have"),
    ],
)
def test_exit_files_with_other_layers_are_refused(tmp_path: Path, exit_layers: int, reason: str) -> None:
    LLAMA.build(tmp_path)
    write_exit(tmp_path)
    text = json.loads((tmp_path / EXIT_FILE).read_text())
    (tmp_path / EXIT_FILE).write_text(json.dumps({**text, "exit_layers": exit_layers}))
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(str(tmp_path))


def test_top_token_distillation_over_all_tokens_is_full_distillation() -> None:
    generator = torch.Generator().manual_seed(0)
    deep, shallow = (4 * torch.randn(5, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    meant, said = deep.log_softmax(-1), shallow.log_softmax(-1)
    whole = (meant.exp() * (meant - said)).sum()
    assert float(losses.best_distillation(meant, said)) == pytest.approx(float(whole), rel=1e-6)
    top = meant.topk(3).indices
    some = losses.best_distillation(meant.gather(1, top), said.gather(1, top))
    # All others as one token.
    rest = [1 - part.gather(1, top).exp().sum(-1) for part in (meant, said)]
    inside = (meant.gather(1, top).exp() * (meant - said).gather(1, top)).sum()
    assert float(some) == pytest.approx(float(inside + (rest[0] * (rest[0] / rest[1]).log()).sum()), rel=1e-6)


def test_sampled_softmax_approximates_the_full_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(16, 30_000, bias=False)
    linear.weight.data = torch.randn(30_000, 16, generator=generator) / 4
    module = frozen_exit(torch.nn.Identity(), SharedHead(torch.nn.Identity(), linear, 1.0), 1, 2)
    student, tokens = torch.randn(6, 16, generator=generator), torch.randint(30_000, (6, 33), generator=generator)
    torch.manual_seed(0)
    found, places = module._log_chances(student, tokens)
    assert found.shape[1] < 3000
    whole = (student @ linear.weight.T).log_softmax(-1).gather(1, tokens)
    np.testing.assert_allclose(found.gather(1, places).detach(), whole.detach(), atol=0.2)
