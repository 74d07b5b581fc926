from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import CASES, Bundles, Case

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.measure.byte_model import engine_bytes, measure_bandwidth, measured, token_bytes
from graphs.families import describe
from graphs.step_costs import StepCosts, analytic
from runtime.bundle.bundle import Bundle
from runtime.bundle.costs import Costs
from runtime.errors import OptionError
from runtime.kernels import missing

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
    with pytest.raises(OptionError, match="--verify none"):
        measured(SimpleNamespace(costs=None, layers=12))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama-tied", "t5-gated-tied"])
def test_weights_of_engines_are_those_of_their_layers_and_the_head(
    name: str, bundle: Bundles, checkpoint: Callable[[Case], Path]
) -> None:
    opened = open_checkpoint(str(checkpoint(BY_NAME[name])))
    known = analytic(describe(opened.config, opened), opened)
    made = Bundle.open(bundle(BY_NAME[name]))
    shallow, deep = (engine_bytes(made.engine(engine)) for engine in ("shallow", "deep"))
    layers = known.layer * made.manifest.layers
    # Norms and tables of relative positions are a little more.
    assert layers <= shallow.layers + deep.layers <= 1.15 * layers
    for head in (shallow.head, deep.head):
        assert known.head <= head <= 1.15 * known.head


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, 4),
        pytest.param(
            {"precision": "int8", "kernels": "freeexport"},
            1,
            marks=pytest.mark.skipif(missing() is not None, reason="the kernels are not built"),
        ),
    ],
)
def test_an_embedding_that_rows_are_taken_from_is_not_read(options: dict[str, Any], size: int, bundle: Bundles) -> None:
    made = Bundle.open(bundle(BY_NAME["llama-tied"], **options))
    embedding = made.manifest.vocab_size * made.manifest.hidden_size * size
    stored = sum(file.size for name, file in made.manifest.files.items() if name.endswith(".data"))
    shallow, deep = (engine_bytes(made.engine(engine)) for engine in ("shallow", "deep"))
    # Tied: it stands once, as the head of both.
    assert shallow.head >= embedding
    assert shallow.layers + deep.layers + deep.head == pytest.approx(stored, rel=0.05)


def test_bytes_of_a_token(bundle: Bundles) -> None:
    made = Bundle.open(bundle(BY_NAME["llama-tied"]))
    manifest = made.manifest
    shallow, deep = (engine_bytes(made.engine(engine)) for engine in ("shallow", "deep"))
    full = token_bytes(made, 0, 0, exits=False, passes=1)
    assert full == shallow.layers + deep.layers + deep.head
    assert token_bytes(made, 10, 0, False, 1) == full + 10 * manifest.kv_bytes_per_token
    # Cross-attention reads keys and values of the same size.
    assert token_bytes(made, 4, 6, False, 1) == token_bytes(made, 10, 0, False, 1)
    assert token_bytes(made, 0, 0, True, 0) == shallow.layers + shallow.head
    assert token_bytes(made, 0, 0, True, 0.25) == round(shallow.layers + shallow.head + (deep.layers + deep.head) / 4)


def test_bandwidth_is_of_this_world() -> None:
    assert 1e8 < measure_bandwidth(1, size=1 << 22, passes=1) < 1e13
