"""How far a bundle's states may be from float64's, beside transformers' own in the same precision."""

from __future__ import annotations

import numpy as np
import pytest

from freeexport.verification.checks import Check
from freeexport.verification.reference import COARSE_LEAST, States, state_checks
from runtime.bundle.manifest import Precision

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
def test_states_that_are_coarse_in_themselves_may_be_several_times_as_coarse(precision: Precision) -> None:
    # A sound T5 in 8 bits was 2.7 times as far off as transformers.
    found = checks(precision, 0.05, 2.7)
    assert [check.tensor for check in found] == TENSORS
    assert all(check.passed for check in found)
    assert [check.error / check.reference for check in found if check.reference] == pytest.approx([2.7] * 4, rel=1e-3)


@pytest.mark.parametrize("precision", COARSE)
def test_states_further_off_than_that_are_refused(precision: Precision) -> None:
    assert not any(check.passed for check in checks(precision, 0.05, 4.5))


def test_a_model_that_is_hardly_coarse_may_be_as_coarse_as_any() -> None:
    assert all(check.passed for check in checks("int8", 1e-4, 0.9 * COARSE_LEAST / 1e-4))
    assert not any(check.passed for check in checks("int8", 1e-4, 1.1 * COARSE_LEAST / 1e-4))
