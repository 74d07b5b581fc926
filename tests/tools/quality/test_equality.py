"""Lossless says what full says, and a row what it says alone: many prompts, models, thresholds and precisions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CASES
from click.testing import CliRunner
from conftest import Bundles

from runtime import GenerationResult, Session
from runtime.decoding.slot_call import SlotCall
from runtime.result import Stats
from runtime.scheduling.batched_call import BatchedCall
from tools.quality.equality import main, random_prompts
from tools.quality.token_equality import (
    TIE,
    Equality,
    Setting,
    first_difference,
    run,
    settings_of,
)

BY_NAME = {case.name: case for case in CASES}
PRECISIONS = ["fp32", "int8", "int4", "mixed"]
each_precision = pytest.mark.parametrize("precision", PRECISIONS)


def check(path: Path, prompts: int, thresholds: Sequence[float], tokens: int, precision: str) -> Equality:
    with Session(path, threads=1, slots=5) as session:
        asked = random_prompts(session.manifest.vocab_size, prompts)
        equality = Equality(session, asked, tokens, 8, ignore_eos=True)
        found = run(equality, settings_of(thresholds))
    tie = TIE if precision == "fp32" else 0.0
    assert all(one.distance < tie for one in found), found
    assert equality.drafts
    return equality


@each_precision
@pytest.mark.parametrize("name", ["t5-wide-heads", "llama-tied"])
def test_tokens_are_those_of_full_and_those_alone(name: str, precision: str, bundle: Bundles) -> None:
    equality = check(bundle(BY_NAME[name], 1, precision=precision), 24, [0.3], 16, precision)
    assert set(equality.compared.values()) == {24}


@pytest.mark.slow
@each_precision
@pytest.mark.parametrize("name", ["t5-wide-heads", "mt5", "llama-tied", "qwen3"])
def test_tokens_of_200_prompts_are_those_of_full_and_those_alone(name: str, precision: str, bundle: Bundles) -> None:
    check(bundle(BY_NAME[name], 1, precision=precision), 200, [0.0, 0.2, 0.6], 32, precision)


def test_a_row_that_is_another_when_it_is_not_alone_is_found(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    run_batch = BatchedCall.run

    def wrong(batch: BatchedCall, works: Sequence[SlotCall]) -> None:
        run_batch(batch, works)
        for work in works:
            work.outputs["token"][:] = 5

    monkeypatch.setattr(BatchedCall, "run", wrong)
    with pytest.raises(AssertionError):
        check(bundle(BY_NAME["llama-tied"]), 8, [0.3], 12, "fp32")
    result = CliRunner().invoke(main, [str(bundle(BY_NAME["llama-tied"])), "--samples", "8", "--tokens", "12"])
    assert result.exit_code == 1
    assert "are not ties" in str(result.exception)
    assert "full, together: 8 of 8" not in result.output
    assert "lossless, threshold 0.5, alone: 8 of 8 the same" in result.output


def result(ids: Sequence[int], reason: Any = "length") -> GenerationResult:
    flags = (False,) * len(ids)
    return GenerationResult("", tuple(ids), flags, (None,) * len(ids), reason, Stats())


@pytest.mark.parametrize(
    ("ours", "alone", "place"),
    [
        (result([1, 2]), result([1, 2]), None),
        (result([1, 2]), result([1, 3]), 1),
        (result([1]), result([1, 3]), 1),
        (result([1, 2]), result([1, 2], "eos"), 2),
        (result([]), result([]), None),
    ],
)
def test_the_first_difference_is_found(ours: GenerationResult, alone: GenerationResult, place: int | None) -> None:
    assert first_difference(ours, alone) == place


def test_each_mode_is_compared_with_what_it_must_equal() -> None:
    settings = settings_of([0.5])
    assert [setting.name for setting in settings] == [
        "full, together",
        "lossless, threshold 0.5, alone",
        "lossless, threshold 0.5, together",
        "free, threshold 0.5, together",
    ]
    assert Setting("lossless", "full", 0.5, True) in settings
