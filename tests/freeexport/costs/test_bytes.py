"""Bytes that calls read: those of engines, of calls that ran, and the speed that they predict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import BY_NAME, Bundles, Case
from exit_layer_case import EXIT_CASES, EXIT_LAYER

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.costs import bytes as counting
from freeexport.costs.bytes import (
    CALL_BYTES,
    ByteModel,
    Calls,
    StepBytes,
    bundle_costs,
    calls_of,
    engine_bytes,
    known_costs,
    row_share,
    step_bytes,
)
from graphs.families import describe
from runtime import Session
from runtime.bundle.bundle import Bundle
from runtime.bundle.costs import Costs
from runtime.decoding.calls import SlotCall
from runtime.decoding.draft_sources import NO_PROPOSAL
from runtime.decoding.drafts import Drafts
from runtime.engines.kernels import missing

OWN = EXIT_CASES[0]
REPEATED = "one two three one two three one two three"


@pytest.mark.parametrize("name", ["llama-tied", "t5-gated-tied"])
def test_engine_bytes_are_those_of_their_layers_and_the_head(
    name: str, bundle: Bundles, checkpoint: Callable[[Case], Path]
) -> None:
    opened = open_checkpoint(str(checkpoint(BY_NAME[name])))
    known = step_bytes(describe(opened.config, opened), opened)
    made = Bundle.open(bundle(BY_NAME[name]))
    shallow, deep = (engine_bytes(made.engine(engine)) for engine in ("shallow", "deep"))
    layers = 4 * known.layer * made.manifest.layers  # in float32
    # Norms and tables of relative positions are a little more.
    assert layers <= shallow.layers + deep.layers <= 1.15 * layers
    for head in (shallow.head, deep.head):
        assert 4 * known.head <= head <= 1.15 * 4 * known.head
    assert shallow.own == deep.own == 0


def test_exit_layers_are_counted_apart_from_model_layers_and_head(bundle: Bundles) -> None:
    plain, own = (Bundle.open(bundle(case, EXIT_LAYER)) for case in (BY_NAME["llama-tied"], OWN))
    without, found = (engine_bytes(one.engine("shallow")) for one in (plain, own))
    assert found.layers == pytest.approx(without.layers, rel=0.01)  # and a constant
    assert found.head == pytest.approx(without.head, rel=0.02)  # of other norms
    # Two layers like the one before the exit, and a map. Tables of rotary positions count as the model's.
    width = own.manifest.hidden_size
    tables = 2 * 4608
    assert found.own == pytest.approx(2 * (without.layers - tables) + 4 * width * width, rel=0.01)


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
def test_embedding_table_is_not_counted_as_read(options: dict[str, Any], size: int, bundle: Bundles) -> None:
    made = Bundle.open(bundle(BY_NAME["llama-tied"], **options))
    embedding = made.manifest.vocab_size * made.manifest.hidden_size * size
    stored = sum(file.size for name, file in made.manifest.files.items() if name.endswith(".data"))
    shallow, deep = (engine_bytes(made.engine(engine)) for engine in ("shallow", "deep"))
    # Tied: it stands once, as the head of both.
    assert shallow.head >= embedding
    assert shallow.layers + deep.layers + deep.head == pytest.approx(stored, rel=0.05)


def test_bytes_per_token_are_summed_over_engines(bundle: Bundles) -> None:
    made = Bundle.open(bundle(BY_NAME["llama-tied"]))
    shallow, deep = (engine_bytes(made.engine(engine)) for engine in ("shallow", "deep"))
    model = ByteModel(made, "")

    def read(prompt: int = -2, heads: int = 0, **passes: int) -> float:
        sizes = {int(rows[1:]): count for rows, count in passes.items()}
        return model.token([Calls(prompt, 4, steps=4, heads=heads, own=False, further=0, passes=sizes)])

    # Half of the four tokens are valid on average, so a prompt of -2 leaves no positions to read.
    full = read(x1=4)
    assert full == shallow.layers + deep.layers + deep.head + 2 * CALL_BYTES
    assert read(prompt=8, x1=4) == full + 10 * made.manifest.kv_bytes_per_token
    assert read(heads=4) == shallow.layers + shallow.head + CALL_BYTES
    row = 1 + 3 * model.row_share
    assert read(heads=4, x4=1) == pytest.approx(read(heads=4) + (row * (deep.layers + deep.head) + CALL_BYTES) / 4)


@pytest.mark.parametrize("case", [OWN, BY_NAME["t5-relu-tied"]], ids=lambda case: case.name)
@pytest.mark.parametrize(
    "options",
    [
        {"mode": "full"},
        {"mode": "shallow"},
        {"mode": "free", "threshold": 0.05},
        {"mode": "free", "drafts": "exit", "threshold": 0.05},
        {"mode": "rollback", "threshold": 0.05, "rollback_threshold": 3.0},
        {"mode": "lossless", "threshold": 0.05},
        {"mode": "lossless", "drafts": "exit", "threshold": 0.02},
        {"mode": "lossless", "drafts": "lookup"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_calls_of_a_result_equal_the_engine_calls_that_ran(
    case: Case, options: dict[str, Any], bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[bool, int, int, bool]] = []
    run = SlotCall.run

    def noted(call: SlotCall) -> None:
        ran.append(("input_ids" in call.inputs, call.rows, call.heads, call.exits))
        run(call)

    monkeypatch.setattr(SlotCall, "run", noted)
    # A text that continues a draft of the exit takes another call, which `calls_of` does not count.
    monkeypatch.setattr(Drafts, "continuation", lambda self, *args: NO_PROPOSAL)
    with Session(bundle(case, EXIT_LAYER), threads=1, slots=1) as session:
        for _ in range(2):  # what pays is learned in the first
            ran.clear()
            result = session.generate(REPEATED, max_new_tokens=40, ignore_eos=True, **options)
    calls = calls_of(result)
    steps = [(rows, heads, own) for shallow, rows, heads, own in ran if shallow]
    assert calls.passes == Counter(rows for shallow, rows, *_ in ran if not shallow)
    # A draft that ends the request is not read after its last token.
    assert calls.steps + calls.further in (sum(rows for rows, *_ in steps), sum(rows for rows, *_ in steps) + 1)
    assert abs(calls.steps - len(steps)) <= 1
    rejected = sum(one.proposed - one.accepted for one in result.stats.drafts.values())
    assert abs(calls.heads - sum(heads for _, heads, _ in steps)) <= rejected
    assert {calls.own} == {own for *_, own in steps}
    assert calls.tokens == result.stats.candidates
    assert calls.prompt == result.stats.prompt_tokens
    assert Calls.read({**vars(calls), "passes": {str(rows): count for rows, count in calls.passes.items()}}) == calls


def test_bytes_and_predicted_speed_match_hand_computed_values(bundle: Bundles) -> None:
    """Ten tokens after a prompt of five: all of them by the whole model, eight that exit, and drafts from text."""
    made = Bundle.open(bundle(OWN, EXIT_LAYER))
    manifest, model = made.manifest, ByteModel(made, "avx2")
    shallow, deep = (engine_bytes(made.engine(engine)) for engine in ("shallow", "deep"))
    position = manifest.kv_bytes_per_token / (manifest.layers + manifest.exit_layers) * 10
    late = manifest.layers - EXIT_LAYER
    one_pass = deep.layers + deep.head + late * position + CALL_BYTES
    step = shallow.layers + EXIT_LAYER * position + CALL_BYTES
    own = shallow.own + manifest.exit_layers * position
    full = Calls(5, 10, 10, 0, False, 0, {1: 10})
    assert model.token([full]) == pytest.approx(step + one_pass)
    free = Calls(5, 10, 10, 10, True, 0, {5: 2})
    row = row_share("fp32", "avx2")
    assert row_share("int8", "amx") < row_share("int8", "avx512-vnni") < row_share("int8", "avx2")
    assert row_share("mixed", "avx2") == row_share("int4", "avx2")
    longer = one_pass + 4 * row * (deep.layers + deep.head)
    assert model.token([free]) == pytest.approx(step + own + shallow.head + longer / 5)
    lookup = Calls(5, 10, 2, 0, False, 8, {5: 2})
    assert model.token([lookup]) == pytest.approx((2 * step + 8 * row * shallow.layers + 2 * longer) / 10)
    assert model.token([full, free]) == pytest.approx((model.token([full]) + model.token([free])) / 2)


@pytest.mark.parametrize(
    ("name", "layer", "head"),
    [
        ("llama-tied", 4 * 64 * 64 + 3 * 64 * 96, 288 * 64),
        # Cross-attention without keys and values, and a gated MLP.
        ("t5-gated-tied", 6 * 32 * 32 + 3 * 32 * 64, 288 * 32),
    ],
)
def test_step_bytes_are_those_of_its_int8_matrices(
    name: str, layer: int, head: int, checkpoint: Callable[[Case], Path]
) -> None:
    opened = open_checkpoint(str(checkpoint(BY_NAME[name])))
    found = step_bytes(describe(opened.config, opened), opened)
    assert (found.layer, found.head) == (layer, head)


def test_costs_of_an_exit_split_the_model_and_earlier_exits_save_more() -> None:
    size = CALL_BYTES
    step = StepBytes(layer=20 * size, head=30 * size, map=size, row=0.1)
    at = step.at(4, 10)
    assert (at.shallow_without_head, at.shallow) == (81 * size, 111 * size)
    assert at.full == (10 * 20 + 30 + 2) * size
    assert at.deep_pass(8) == pytest.approx((150 * (1 + 0.1 * 7) + 1) * size)
    assert step.at(2, 10).speedup(0.95, 16) > step.at(8, 10).speedup(0.95, 16) > 1
    assert step.at(2, 10).speedup(0, 16) < 1
    # An exit that reads the feature is a call of its own, with a map of two inputs.
    assert step.at(0, 10, 1, 0.5, "feature").shallow == (20 + 2 + 15 + 1) * size
    assert step.at(0, 10, 1, 0.5, "fused").shallow == (20 + 4 + 15 + 1) * size


@pytest.mark.parametrize("case", [BY_NAME["llama-tied"], BY_NAME["t5-gated-tied"]], ids=lambda case: case.name)
def test_checkpoint_and_bundle_have_the_same_break_even(
    case: Case, bundle: Bundles, checkpoint: Callable[[Case], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train` and `convert` say the same of one exit."""
    monkeypatch.setattr(counting, "CALL_BYTES", 0)  # which is more than these models weigh
    opened = open_checkpoint(str(checkpoint(case)))
    made = Bundle.open(bundle(case, 1))
    before = step_bytes(describe(opened.config, opened), opened).at(1, made.manifest.layers)
    after = bundle_costs(made)
    assert after is not None
    one, other = (costs.break_even(16) for costs in (before, after))
    assert one is not None
    assert other == pytest.approx(one, abs=0.05)


def test_bytes_replace_timings_of_a_busy_machine(bundle: Bundles) -> None:
    made = Bundle.open(bundle(BY_NAME["llama-tied"]))
    timed = Costs(2.0, 1.0, {1: 3.0})
    assert known_costs(made, None, timed) is timed
    busy = replace(timed, busy=1.3)
    assert known_costs(made, busy) == bundle_costs(made)
    assert known_costs(made, busy, timed) is timed
