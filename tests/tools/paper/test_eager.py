"""Eager PyTorch: the full model, FREE, static exits and CALM decode the tokens that engines decode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import BY_NAME, PROMPTS, Bundles, Case
from device_cases import LONGT5

from freeexport.evaluate.settings import Setting
from runtime import GenerationResult, Session
from runtime.bundle.bundle import Bundle
from tools.paper.eager import EagerDecoder

pytestmark = pytest.mark.usefixtures("one_thread")

T5 = BY_NAME["t5-deep-decoder"]
UMT5 = BY_NAME["umt5"]
TOKENS = 32
Directory = Callable[[Case], Path]


def decoder(case: Case, exit_layer: int, bundle: Bundles, checkpoint: Directory) -> EagerDecoder:
    opened = Bundle.open(bundle(case, exit_layer, max_pending=TOKENS))
    return EagerDecoder(opened, str(checkpoint(case)), "cpu", threads=1)


@pytest.mark.parametrize(
    ("case", "exit_layer"),
    [(T5, 2), (UMT5, 1), pytest.param(LONGT5, 1, marks=pytest.mark.slow)],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_eager_method_matches_the_tokens_of_the_engines(
    case: Case, exit_layer: int, bundle: Bundles, checkpoint: Directory
) -> None:
    eager = decoder(case, exit_layer, bundle, checkpoint)
    exits = 0
    with Session(bundle(case, exit_layer, max_pending=TOKENS), threads=1, slots=1) as session:
        for prompt in PROMPTS:

            def ours(mode: Any, threshold: float | None = None, prompt: Any = prompt) -> GenerationResult:
                drafts: Any = "exit" if mode == "free" else None
                return session.generate(
                    list(prompt), mode=mode, threshold=threshold, drafts=drafts, max_new_tokens=TOKENS
                )

            def theirs(method: str, threshold: float | None = None, prompt: Any = prompt) -> dict[str, Any]:
                return eager.decode(Setting(method, threshold), prompt, TOKENS)

            full, free = ours("full"), ours("free", 0.3)
            for method, threshold in (("eager", None), ("eager-full", None), ("calm", 1.0), ("calm-single", 1.0)):
                assert theirs(method, threshold)["token_ids"] == full.token_ids
            assert theirs("eager-static")["token_ids"] == ours("shallow").token_ids
            made = theirs("eager-free", 0.3)
            assert (made["token_ids"], made["exited"]) == (free.token_ids, free.exited)
            assert (made["text"], made["finish_reason"]) == (free.text, free.finish_reason)
            assert 0 < made["first_seconds"] < made["seconds"]
            exits += sum(free.exited)
    assert 0 < exits < TOKENS * len(PROMPTS)


def test_copied_states_are_exact_if_skipped_layers_change_nothing(bundle: Bundles, checkpoint: Directory) -> None:
    """The last layer then reads the same keys and values, whether its input was copied or computed."""
    eager = decoder(T5, 2, bundle, checkpoint)
    with torch.no_grad():
        for number in range(2, T5.layers - 1):
            own, cross, mlp = eager._exits._blocks[number].layer  # type: ignore[union-attr]
            for linear in (own.SelfAttention.o, cross.EncDecAttention.o, mlp.DenseReluDense.wo):
                linear.weight.zero_()
    for prompt in PROMPTS:
        copied, computed, full = (
            eager.decode(Setting(method, 0.3), prompt, TOKENS) for method in ("calm-single", "eager-free", "eager-full")
        )
        assert copied["token_ids"] == computed["token_ids"]
        assert 0 < sum(copied["exited"]) < TOKENS
        assert full["layers"] > copied["layers"]


def test_calm_exits_after_its_first_layer_or_any_later_one(bundle: Bundles, checkpoint: Directory) -> None:
    opened = Bundle.open(bundle(T5, 2, max_pending=TOKENS))
    for least in (1, 4):
        eager = EagerDecoder(opened, str(checkpoint(T5)), "cpu", 1, least)
        made = {bar: eager.decode(Setting("calm", bar), PROMPTS[0], TOKENS) for bar in (0.0, 0.4)}
        assert made[0.0]["layers"] == least * made[0.0]["tokens"]
        assert least * made[0.4]["tokens"] < made[0.4]["layers"] < T5.layers * made[0.4]["tokens"]


def test_model_other_than_t5_supports_only_the_full_method(bundle: Bundles, checkpoint: Directory) -> None:
    llama = BY_NAME["llama-tied"]
    eager = decoder(llama, 1, bundle, checkpoint)
    with Session(bundle(llama, 1), threads=1, slots=1) as session:
        full = session.generate(list(PROMPTS[0]), mode="full", max_new_tokens=8)
    made = eager.decode(Setting("eager"), PROMPTS[0], 8)
    assert (made["token_ids"], made["layers"]) == (full.token_ids, None)
