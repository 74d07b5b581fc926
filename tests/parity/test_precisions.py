"""Sessions on rounded bundles: modes agree with each other, and what cannot be converted is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, HEADS_OF_40, PROMPTS, Bundles, Case
from command_line import invoke, succeed

from graphs.errors import GraphError
from graphs.quantization.rounding import IntegerScheme
from runtime import Session
from runtime.bundle.bundle import Bundle

each_precision = pytest.mark.parametrize("precision", ["int8", "int4", "mixed"])


@each_precision
@pytest.mark.parametrize("kernels", ["freeexport", "onnxruntime"])
@pytest.mark.parametrize("name", ["t5-wide-heads", "t5gemma", "llama-tied", "qwen3"])
def test_lossless_and_threshold_1_give_the_tokens_of_full(
    name: str, kernels: str, precision: str, bundle: Bundles
) -> None:
    """Sync passes of many rows against single steps, where kernels are our own."""
    options: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True}
    with Session(bundle(BY_NAME[name], 1, precision=precision, kernels=kernels), threads=1) as session:
        for prompt in PROMPTS:
            full = session.generate(prompt, mode="full", **options).token_ids
            assert session.generate(prompt, mode="free", drafts="exit", threshold=1.0, **options).token_ids == full
            if kernels == "freeexport":
                assert session.generate(prompt, mode="lossless", threshold=0.0, **options).token_ids == full


def test_int8_mostly_agrees_with_fp32(bundle: Bundles) -> None:
    case, same = BY_NAME["llama-untied-many-eos"], []
    with Session(bundle(case, 1)) as exact, Session(bundle(case, 1, precision="int8")) as rounded:
        for prompt in PROMPTS:
            tokens = exact.generate(prompt, mode="full", max_new_tokens=24, ignore_eos=True).token_ids
            # Teacher-forced, so that one difference does not make all that follow differ.
            for count in range(0, 24, 6):
                context = [*prompt, *tokens[:count]]
                (answer,) = rounded.generate(context, mode="full", max_new_tokens=1, ignore_eos=True).token_ids
                same.append(answer == tokens[count])
    assert np.mean(same) >= 0.7


@each_precision
def test_standard_dialect_refuses_quantized_precisions(
    precision: str, checkpoint: Callable[[Case], Path], tmp_path: Path
) -> None:
    arguments = ["convert", str(checkpoint(BY_NAME["llama-tied"])), str(tmp_path / "out"), "--exit-layer", "1"]
    result = invoke(*arguments, "--dialect", "standard", "--precision", precision)
    assert result.exit_code == 1
    assert f"precision {precision} needs operators of ONNX Runtime; choose --dialect ort" in result.stderr
    assert not (tmp_path / "out").exists()


def test_tensor_kept_in_a_higher_precision_is_recorded_and_shown(
    checkpoint: Callable[[Case], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IntegerScheme, "limits", {**IntegerScheme.limits, "int4": 0.0785})
    arguments = ["convert", str(checkpoint(BY_NAME["llama-tied"])), str(tmp_path / "out"), "--exit-layer", "2"]
    result = succeed(*arguments, "--precision", "int4", "--verify", "none")
    quantization = Bundle.open(tmp_path / "out").manifest.quantization
    assert quantization is not None
    assert 0 < len(quantization.higher) < 20
    for item in quantization.higher:
        assert (item.wanted, item.stored) == ("int4", "int8-block")
        assert item.error > 0.0785
    shown = ", ".join(f"{item.tensor} ({item.stored})" for item in quantization.higher[:3])
    rest = len(quantization.higher) - 3
    assert f"kept at a higher precision: {shown} and {rest} more (see inspect)" in result.stdout
    page = invoke("inspect", tmp_path / "out").stdout
    assert "Layers at a higher precision" in page
    with Session(tmp_path / "out") as session:
        assert len(session.generate("Hello", max_new_tokens=5, ignore_eos=True).token_ids) == 5


# Attention heads whose size is a multiple of 8, not of 16

LLAMA, T5 = HEADS_OF_40


@pytest.mark.parametrize(
    ("case", "precision"),
    [(LLAMA, "int8"), (LLAMA, "int4"), (LLAMA, "fp32"), (LLAMA, "fp16"), (T5, "int8"), (T5, "fp32")],
)
def test_heads_of_size_40_match_transformers_and_lossless_equals_full(
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


def test_heads_of_size_40_without_our_kernels_are_refused_with_a_remedy(bundle: Bundles) -> None:
    with pytest.raises(
        GraphError, match=r"40 values of each head are rotated.*; choose --kernels freeexport or --precision"
    ):
        bundle(LLAMA, precision="int8", kernels="onnxruntime")


@pytest.mark.parametrize("kernels", ["freeexport", "onnxruntime"])
def test_heads_of_size_40_select_the_dialect_by_kernels(kernels: Any, bundle: Bundles) -> None:
    """ONNX Runtime's fused attention with rotary positions has no kernel for them, its own without has one."""
    with Session(bundle(T5, precision="int8", kernels=kernels), threads=1) as session:
        assert session.manifest.dialect == "ort"
    with Session(bundle(LLAMA, precision="fp32", kernels=kernels), threads=1) as session:
        assert session.manifest.dialect == ("ort" if kernels == "freeexport" else "standard")
