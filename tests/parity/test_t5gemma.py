"""T5Gemma 2: one attention over the output and the prompt, against transformers and the slow reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PROMPTS, T5GEMMA2, Bundles, Case, Model
from reference import assert_same_tokens, replay

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.verification.batches import QUICK
from freeexport.verification.verification import failure, verify
from graphs.errors import UnsupportedModelError
from graphs.families import describe
from runtime import Bundle, Session

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 12


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_modes_match_generate_of_transformers(precision: str, bundle: Bundles, source_model: Model) -> None:
    model = source_model(T5GEMMA2)
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "ignore_eos": True}
    exits = 0
    with Session(bundle(T5GEMMA2, 1, precision=precision), threads=1, slots=1) as session:
        for prompt in PROMPTS:
            full = session.generate(prompt, mode="full", **options).token_ids
            assert session.generate(prompt, mode="lossless", threshold=0.0, **options).token_ids == full
            free = session.generate(prompt, mode="free", drafts="exit", threshold=0.5, **options)
            exits += sum(free.exited)
            if precision == "fp32":
                ids = torch.tensor([prompt])
                theirs = model.generate(input_ids=ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
                assert list(full) == theirs[0, 1:].tolist()
                assert_same_tokens(free, replay(model, prompt, free.token_ids, 1, 0.5))
    assert 0 < exits < TOKENS * len(PROMPTS)


@pytest.mark.slow
def test_bundle_passes_verification(bundle: Bundles, checkpoint: Callable[[Case], Path]) -> None:
    report = verify(Bundle.open(bundle(T5GEMMA2, precision="int4")), str(checkpoint(T5GEMMA2)), extent=QUICK)
    assert report["passed"], failure(report)


def test_configuration_values_of_both_stacks_are_validated(checkpoint: Callable[[Case], Path]) -> None:
    source = open_checkpoint(str(checkpoint(T5GEMMA2)))
    for side, changes, said in (
        ("decoder", {"hidden_size": 32}, "the encoder's hidden_size is 64 and the decoder's 32; stacks of two widths"),
        ("decoder", {"num_hidden_layers": -1}, "num_hidden_layers is -1 in the configuration"),
        ("encoder", {"text_config": None}, "encoder is no object in the configuration"),
    ):
        config = {**source.config, side: {**source.config[side], **changes}}
        with pytest.raises(UnsupportedModelError) as refused:
            describe(config, source)
        assert said in str(refused.value)
