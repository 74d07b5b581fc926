from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from checkpoints import BY_NAME, CASES, PROMPTS, Case, Model
from reference import (
    Mode,
    Reference,
    assert_same_tokens,
    cut_after,
    free_decode,
    predicted_of,
    replay,
)

TOKENS = 24
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
few_cases = pytest.mark.parametrize("name", ["t5-deep-decoder", "umt5", "llama-tied", "mistral-window"])


def generate(model: Any, prompt: tuple[int, ...], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        use_cache=False,
        max_new_tokens=tokens,
        pad_token_id=0,
    )
    return output[0, 1 if model.config.is_encoder_decoder else len(prompt) :].tolist()


@each_case
def test_threshold_one_is_greedy_decoding_of_the_full_model(case: Case, source_model: Model) -> None:
    model = source_model(case)
    reference = free_decode(model, PROMPTS[0], case.exit_layers[0], 1.0, TOKENS)
    assert reference.token_ids == generate(model, PROMPTS[0], TOKENS)
    assert not any(reference.exited)
    assert reference.sync_sizes == [1] * (len(reference.token_ids) - predicted_of(model))


@few_cases
@pytest.mark.parametrize("mode", ["free", "full"])
def test_replay_of_a_reference_run_reproduces_it(name: str, mode: Mode, source_model: Model) -> None:
    case, model = BY_NAME[name], source_model(BY_NAME[name])
    reference = free_decode(model, PROMPTS[2], case.exit_layers[1], 0.3, 24, max_pending=3, mode=mode)
    again = replay(model, PROMPTS[2], reference.token_ids, case.exit_layers[1], 0.3, max_pending=3, mode=mode)
    assert assert_same_tokens(again, reference) is None
    assert (again.sync_sizes, again.forced) == (reference.sync_sizes, reference.forced)
    assert again.gaps == pytest.approx(reference.gaps, abs=1e-4)


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "t5-relu-tied", "t5-gated-untied", "umt5", "mt5"])
def test_truncated_model_applies_norm_and_head_after_the_exit_layer(name: str, source_model: Model) -> None:
    case, model = BY_NAME[name], source_model(BY_NAME[name])
    ids = torch.tensor([PROMPTS[2]])
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
    with torch.no_grad():
        whole = model(**inputs, use_cache=False, output_hidden_states=True)
        with cut_after(model, case.exit_layers[0]):
            cut = model(**inputs, use_cache=False).logits
        states = whole.decoder_hidden_states if model.config.is_encoder_decoder else whole.hidden_states
        norm = model.get_decoder().final_layer_norm if model.config.is_encoder_decoder else model.get_decoder().norm
        scale = 32**-0.5 if name == "t5-relu-tied" else 1.0
        expected = scale * norm(states[case.exit_layers[0]]) @ model.lm_head.weight.T
    torch.testing.assert_close(cut, expected, atol=1e-4, rtol=1e-4)
    assert len(states) == case.layers + 1
    assert not torch.allclose(cut, whole.logits, atol=1e-2)


def _reference() -> Reference:
    return Reference(
        threshold=0.5,
        mode="free",
        token_ids=[5, 6, 7],
        exited=[False, True, False],
        confidence=[0.9, 0.500005, 0.2],
        gaps=[1.0, 0.00005, 1.0],
    )


def test_tied_logits_are_tolerated_once_and_end_the_comparison() -> None:
    assert assert_same_tokens(replace(_reference(), token_ids=[5, 9, 1]), _reference()) == 1


def test_differing_exit_at_the_threshold_is_tolerated() -> None:
    assert assert_same_tokens(replace(_reference(), exited=[False, False, False]), _reference()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": [4, 6, 7]}, "ids differ at token 0"),
        ({"token_ids": [5, 6, 8]}, "ids differ at token 2"),
        ({"exited": [False, True, True]}, "exit flags differ at token 2"),
        ({"confidence": [0.9, 0.5, 0.25]}, "confidence differ at token 2"),
        ({"confidence": [0.9, None, 0.2]}, "confidence differ at token 1"),
        ({"token_ids": [5, 6]}, "2 tokens, the reference has 3"),
    ],
)
def test_all_other_differences_fail(change: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_same_tokens(replace(_reference(), **change), _reference())
