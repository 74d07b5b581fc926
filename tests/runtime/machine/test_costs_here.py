"""Costs that were measured elsewhere decide nothing here."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import CASES, PROMPTS, Bundles
from manifest_case import MANIFEST as A_MANIFEST

from runtime import Session
from runtime.batching import BatchPolicy
from runtime.bundle.bundle import Bundle
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import MANIFEST
from runtime.machine.machine import costs_here, host

LLAMA = next(case for case in CASES if case.name == "llama-tied")
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

WithCosts = Callable[[Costs | None], Session]


@pytest.fixture
def session_of(bundle: Bundles, tmp_path: Path) -> Iterator[WithCosts]:
    """Opens a bundle that records such costs, on one thread."""
    path = tmp_path / "bundle"
    shutil.copytree(bundle(LLAMA), path)
    manifest = Bundle.open(path).manifest
    opened: list[Session] = []

    def open_(costs: Costs | None) -> Session:
        (path / MANIFEST).write_text(replace(manifest, costs=costs).to_json())
        opened.append(Session(path, threads=1))
        return opened[-1]

    yield open_
    for session in opened:
        session.close()


def policy_of(session: Session) -> BatchPolicy:
    return session._scheduler._calls


def test_this_machine_has_a_name_and_a_version_of_onnx_runtime() -> None:
    import onnxruntime

    assert HERE.processor
    assert (HERE.threads, HERE.onnxruntime) == (1, onnxruntime.__version__)
    assert HERE.cores >= 1


def test_costs_measured_here_are_acted_on(session_of: WithCosts) -> None:
    session = session_of(MEASURED)
    assert session._scheduler._calls.rules.patience == 8
    assert session._model.learned.costs.base == MEASURED


@pytest.mark.parametrize("costs", ELSEWHERE.values(), ids=list(ELSEWHERE))
def test_costs_of_another_machine_or_a_busy_one_are_not_those_here(costs: Costs) -> None:
    assert costs_here(replace(A_MANIFEST, costs=costs), threads=1) is None


def test_a_session_without_costs_learns_them_from_its_own_calls(session_of: WithCosts) -> None:
    session = session_of(None)
    before = session._scheduler._calls.rules
    for threshold in (0.05, 1.0) * 2:
        options = {"threshold": threshold, "output_confidence": True, "max_new_tokens": 40, "ignore_eos": True}
        session.generate([list(prompt) for prompt in PROMPTS], **options)
    assert session._scheduler._calls.rules.row_cost != before.row_cost
