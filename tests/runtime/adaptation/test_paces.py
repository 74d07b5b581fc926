from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from runtime.adaptation.draft_length import DraftLength, DraftOutcome
from runtime.adaptation.draft_lengths import MOST, DraftLengths
from runtime.bundle.bundle import Bundle
from runtime.bundle.calibration import TableRow


def paces(*table: TableRow) -> DraftLengths:
    manifest = SimpleNamespace(
        max_pending=8,
        break_even={"shallow_ms": 2.0, "shallow_without_head_ms": 1.0, "deep_1_ms": 8.0, "deep_8_ms": 12.0},
    )
    calibration = SimpleNamespace(table=table) if table else None
    return DraftLengths(cast(Bundle, SimpleNamespace(manifest=manifest, calibration=calibration)))


def longer(pace: DraftLength) -> float:
    """What drafts of one token are expected to gain."""
    return list(pace.speedups(1))[1]


def test_requests_of_one_threshold_share_what_they_have_seen_and_all_share_costs() -> None:
    learned = paces()
    pace = learned.of(0.5, False)
    assert learned.of(0.5, False) is pace
    assert learned.of(0.5, True) is not pace
    other = learned.of(0.6, False)
    pace.observe_costs(1, 1, 0.004, 0.010, 1)
    pace.observe_drafts([DraftOutcome(True, True)])
    assert longer(other) < longer(pace)
    assert learned.costs["asked"] == 0.004
    assert learned.costs[1] == 0.010


def test_a_calibration_says_what_to_expect_at_the_nearest_threshold() -> None:
    learned = paces(TableRow(0.3, 0.9, 0.9), TableRow(0.8, 0.4, 0.99), TableRow(1.0, 0.0, None))
    assert learned.of(0.35, False).plan(7)[0] > 0
    assert longer(learned.of(0.35, False)) == longer(learned.of(0.3, False)) > longer(learned.of(0.7, False)) > 1.0
    assert learned.of(1.0, False).plan(7)[0] == 0


def test_only_so_many_thresholds_are_remembered() -> None:
    learned = paces()
    first = learned.of(0.0, False)
    for number in range(1, MOST):
        learned.of(number / 100, False)
    assert learned.of(0.0, False) is first
    learned.of(0.99, False)
    assert learned.of(0.0, False) is not first
