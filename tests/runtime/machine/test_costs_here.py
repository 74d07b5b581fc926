"""Costs that were measured elsewhere decide nothing here."""

from __future__ import annotations

from dataclasses import replace

import pytest
from checkpoints import PROMPTS, Open
from manifest_case import MANIFEST as A_MANIFEST

from runtime.bundle.costs import Costs
from runtime.machine.machine import costs_here, host

HERE = host(threads=1)
# A further row costs nothing: wait for all of them.
MEASURED = Costs(0.002, 0.001, {1: 0.01, 8: 0.01}, host=HERE)
ELSEWHERE = {
    "unknown": replace(MEASURED, host=None),
    "processor": replace(MEASURED, host=replace(HERE, processor="another")),
    "cores": replace(MEASURED, host=replace(HERE, cores=HERE.cores + 1)),
    "threads": replace(MEASURED, host=replace(HERE, threads=2)),
    "onnxruntime": replace(MEASURED, host=replace(HERE, onnxruntime="1.0")),
    "busy": replace(MEASURED, busy=1.5),
}


def test_processor_and_onnxruntime_version_are_detected() -> None:
    import onnxruntime

    assert HERE.processor
    assert (HERE.threads, HERE.onnxruntime) == (1, onnxruntime.__version__)
    assert HERE.cores >= 1


def test_costs_measured_on_this_machine_are_used() -> None:
    assert costs_here(replace(A_MANIFEST, costs=MEASURED), threads=1) == MEASURED


@pytest.mark.parametrize("costs", ELSEWHERE.values(), ids=list(ELSEWHERE))
def test_costs_of_another_or_a_busy_machine_are_ignored(costs: Costs) -> None:
    assert costs_here(replace(A_MANIFEST, costs=costs), threads=1) is None


def test_session_without_costs_learns_them_from_its_calls(open_session: Open) -> None:
    session = open_session(slots=4)
    before = session._scheduler._calls.rules
    for threshold in (0.05, 1.0) * 2:
        options = {"threshold": threshold, "output_confidence": True, "max_new_tokens": 40, "ignore_eos": True}
        session.generate([list(prompt) for prompt in PROMPTS], **options)
    assert session._scheduler._calls.rules.row_cost != before.row_cost
