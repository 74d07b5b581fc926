"""transformers in float64, whatever type its code names, and as coarse as a bundle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import BY_NAME, PROMPTS, Case

from freeexport.verification.arithmetic import BITS, Float64, add_quantization_errors, round_outputs
from freeexport.verification.checks import Check
from freeexport.verification.reference import States, state_checks
from runtime.bundle.manifest import Precision
from runtime.bundle.quantization import EnginePrecision

pytestmark = pytest.mark.usefixtures("one_thread")

Model = Callable[[Case], Any]


def logits(model: Any, **options: Any) -> torch.Tensor:
    ids = torch.tensor([PROMPTS[2]])
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False, **inputs, **options).logits
    return found


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", ["llama-grouped-llama3-rope", "mistral-window", "t5-gated-untied"])
def test_reference_computes_in_float64_and_restores_the_model(name: str, source_model: Model) -> None:
    model = source_model(BY_NAME[name])
    plain = logits(model)
    with Float64():
        exact = logits(model)
    assert exact.dtype is torch.float64
    assert 1e-8 < distance(plain, exact) < 2e-5
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(logits(model), plain)


def test_explicit_float32_operations_run_in_float64_too() -> None:
    scores = torch.tensor([1000.0, 1000.0 + 1e-4], dtype=torch.float64)
    expected = np.exp(scores.numpy() - scores.numpy().max())
    expected /= expected.sum()
    with Float64():
        found = [
            torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32),
            torch.nn.functional.softmax(scores.float(), dim=-1),
            torch.nn.functional.softmax(scores.to(torch.float32), dim=-1),
            torch.nn.functional.softmax(scores.to(dtype=torch.float32), dim=-1),
        ]
    for each in found:
        assert each.dtype is torch.float64
        np.testing.assert_allclose(each.numpy(), expected, rtol=1e-12)


def test_values_are_rounded_as_in_half_precision() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    with round_outputs(layer := torch.nn.Identity(), BITS["fp16"]):
        assert torch.equal(layer(values), values.half().float())
    with round_outputs(layer, BITS["bf16"]):
        assert torch.equal(layer(values), values.bfloat16().float())


def test_simulated_int8_has_the_error_of_rounding() -> None:
    layer = torch.nn.Linear(256, 512, bias=False)
    read = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    scale = read.abs().amax(-1, keepdim=True) / 127
    with torch.no_grad():
        wanted = layer(read)
        rounded = layer((read / scale).round() * scale)
        with add_quantization_errors(
            layer, lambda name: EnginePrecision("deep", "int8", None, 1, 0.0), activations=True
        ):
            coarse = layer(read)
    assert float((coarse - wanted).norm()) == pytest.approx(float((rounded - wanted).norm()), rel=0.1)


def test_encoder_row_sensitive_to_rounding_passes_and_a_wrong_row_fails() -> None:
    """One row of Whisper tiny.en, in 3,000, was five times as far off as with transformers."""
    generator = np.random.default_rng(0)
    names = ("deep", "shallow", "hidden", "encoded")
    truth = {name: generator.normal(size=(3000, 24)).astype(np.float32) for name in names}

    def encoder(error: float) -> Check:
        def states(far: float) -> States:
            encoded = truth["encoded"] * np.float32(1 + 1e-6)
            encoded[1496] *= 1 + far
            return States(**{**truth, "encoded": encoded})

        found, *_ = state_checks(states(error), States(**truth), states(1e-5), "fp32")
        return found

    assert (encoder(5e-5).passed, encoder(5e-5).measure) == (True, "rms")
    assert not encoder(1e-2).passed


COARSE: tuple[Precision, ...] = ("int8", "mixed", "int4", "bf16")
TENSORS = ["encoder hidden", "shallow hidden", "shallow logits", "deep logits"]


def checks(precision: Precision, own: float, times: float) -> list[Check]:
    """Transformers' states are `own` of their root mean square from float64's, the bundle's `times` as far."""
    generator = np.random.default_rng(0)
    shapes = {"deep": (40, 96), "shallow": (40, 96), "hidden": (40, 24), "encoded": (30, 24)}
    truth = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    off = {name: generator.normal(size=shape) for name, shape in shapes.items()}

    def states(share: float) -> States:
        parts = {name: share * np.linalg.norm(truth[name]) / np.linalg.norm(off[name]) * off[name] for name in shapes}
        return States(**{name: (truth[name] + parts[name]).astype(np.float32) for name in shapes})

    return list(state_checks(states(own * times), states(0), states(own), precision))


@pytest.mark.parametrize("precision", COARSE)
def test_hidden_state_tolerance_is_a_few_times_the_error_of_transformers(precision: Precision) -> None:
    # A sound T5 in 8 bits was 2.7 times as far off as transformers.
    found = checks(precision, 0.05, 2.7)
    assert [check.tensor for check in found] == TENSORS
    assert all(check.passed for check in found)
    assert [check.error / check.reference for check in found if check.reference] == pytest.approx([2.7] * 4, rel=1e-3)
    assert not any(check.passed for check in checks(precision, 0.05, 4.5))
