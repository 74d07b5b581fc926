"""Attention heads whose size is a multiple of 8, not of 16: verified against transformers, and decoded."""

from __future__ import annotations

from typing import Any

import pytest
from checkpoints import HEADS_OF_40, PROMPTS, Bundles, Case

from graphs.errors import GraphError
from runtime import Session

LLAMA, T5 = HEADS_OF_40


@pytest.mark.parametrize(("case", "precision"), [(LLAMA, "int8"), (LLAMA, "int4"), (LLAMA, "fp32"), (T5, "int8")])
def test_heads_of_40_are_those_of_transformers_and_lossless_equals_full(
    case: Case, precision: str, bundle: Bundles
) -> None:
    path = bundle(case, precision=precision, verify="quick")  # fails where logits are further off than the precision is
    options: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True}
    with Session(path, threads=1, slots=3) as session:
        assert session.manifest.verified
        prompts = [list(prompt) for prompt in PROMPTS]
        full = [result.token_ids for result in session.generate(prompts, mode="full", **options)]
        drafted = [result.token_ids for result in session.generate(prompts, mode="lossless", threshold=0.0, **options)]
        assert [session.generate(prompt, mode="full", **options).token_ids for prompt in prompts] == full
        assert drafted == full


def test_heads_of_40_without_our_kernels_are_refused_with_what_to_choose(bundle: Bundles) -> None:
    with pytest.raises(GraphError, match=r"heads of size 40 do not fit .*; choose --kernels freeexport or --precision"):
        bundle(LLAMA, precision="int8", kernels="onnxruntime")


@pytest.mark.parametrize("kernels", ["freeexport", "onnxruntime"])
def test_dialects_of_heads_of_40(kernels: Any, bundle: Bundles) -> None:
    """ONNX Runtime's fused attention with rotary positions has no kernel for them, its own without has one."""
    with Session(bundle(T5, precision="int8", kernels=kernels), threads=1) as session:
        assert session.manifest.dialect == "ort"
    with Session(bundle(LLAMA, precision="fp32"), threads=1) as session:
        assert session.manifest.dialect == "standard"
