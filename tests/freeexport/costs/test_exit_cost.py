from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import CASES, Case

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.costs.per_layer import StepCosts, analytic, measured
from graphs.families import describe
from runtime.bundle.costs import Costs
from runtime.errors import OptionError

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize(
    ("name", "layer", "head"),
    [
        ("llama-tied", 4 * 64 * 64 + 3 * 64 * 96, 288 * 64),
        # Cross-attention without keys and values, and a gated MLP.
        ("t5-gated-tied", 6 * 32 * 32 + 3 * 32 * 64, 288 * 32),
    ],
)
def test_analytic_costs_are_the_bytes_a_step_reads(
    name: str, layer: int, head: int, checkpoint: Callable[[Case], Path]
) -> None:
    opened = open_checkpoint(str(checkpoint(BY_NAME[name])))
    costs = analytic(describe(opened.config, opened), opened)
    assert (costs.layer, costs.head) == (4 * layer, 4 * head)
    assert costs.growth[1] == 1
    assert costs.growth[8] == pytest.approx(1.9)
    assert not costs.measured


def test_costs_at_a_layer_split_the_model() -> None:
    costs = StepCosts(layer=2, head=3, growth={1: 1, 4: 1.5}, measured=False).at(4, 10)
    assert (costs.shallow, costs.shallow_without_head) == (11, 8)
    assert costs.deep == {1: 15, 4: 22.5}
    assert costs.full == 10 * 2 + 3


def test_an_early_exit_that_always_exits_is_faster_than_a_late_one() -> None:
    costs = StepCosts(layer=2, head=3, growth={1: 1, 16: 2}, measured=False)
    assert costs.at(2, 10).speedup(0.95, 16) > costs.at(8, 10).speedup(0.95, 16) > 1
    assert costs.at(2, 10).speedup(0, 16) < 1


def test_measured_costs_reproduce_the_bundle_at_its_own_layer() -> None:
    recorded = Costs(0.005, 0.004, {1: 0.009, 8: 0.018})
    costs = measured(SimpleNamespace(costs=recorded, layers=12, exit_layers=0))  # type: ignore[arg-type]
    assert (costs.layer, costs.head) == pytest.approx((1.0, 1.0))
    assert costs.growth == {1: 1.0, 8: 2.0}
    assert costs.at(4, 12).shallow == pytest.approx(5)
    assert costs.at(4, 12).deep == pytest.approx({1: 9, 8: 18})


def test_an_exits_own_layers_are_part_of_a_shallow_step() -> None:
    # 12 layers of 1 ms, exit after 4, 2 layers of its own, a head of 1 ms.
    recorded = Costs(0.007, 0.004, {1: 0.009, 8: 0.018})
    costs = measured(SimpleNamespace(costs=recorded, layers=12, exit_layers=2))  # type: ignore[arg-type]
    assert (costs.layer, costs.head) == pytest.approx((1.0, 1.0))
    at = costs.at(4, 12, own=2)
    assert (at.shallow, at.shallow_without_head, at.deep[1]) == pytest.approx((7, 4, 9))


def test_a_bundle_without_measurements_is_refused() -> None:
    with pytest.raises(OptionError, match="--no-measure"):
        measured(SimpleNamespace(costs=None, layers=12))  # type: ignore[arg-type]


def test_costs_of_a_busy_machine_are_refused() -> None:
    busy = Costs(0.005, 0.004, {1: 0.009}, busy=1.5)
    with pytest.raises(OptionError, match=r"others kept 1\.5 cores busy"):
        measured(SimpleNamespace(costs=busy, layers=12))  # type: ignore[arg-type]
