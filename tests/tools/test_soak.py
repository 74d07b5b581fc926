"""Clients of all kinds at one session: nothing is lost or mixed up, and what would be is found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CASES, Bundles
from click.testing import CliRunner

from runtime import Session
from runtime.batching import BatchedCall
from runtime.decoding.decoder import Decoder, SlotCall
from tools import soak as soaking
from tools.soak import Clients, left_over, main, resident, soak

BY_NAME = {case.name: case for case in CASES}


def soaked(path: Path, seconds: float, concurrent: int, **options: Any) -> Clients:
    return soak(path, seconds, concurrent, slots=5, queue=16, asks=30, seed=3, **{"threads": 1, **options})


@pytest.mark.parametrize(
    ("name", "options", "prefix_cache_mb"),
    [("t5-relu-tied", {}, 0), ("t5-relu-tied", {"precision": "int8"}, 1), ("llama-tied", {"precision": "int8"}, 1)],
)
def test_all_ways_get_what_their_requests_give_alone(
    name: str, options: dict[str, Any], prefix_cache_mb: int, bundle: Bundles
) -> None:
    found = soaked(bundle(BY_NAME[name], **options), 1.5, 32, prefix_cache_mb=prefix_cache_mb)
    assert not found.violations
    assert len(found.done.keys() - {"failed"}) == 9
    assert found.done["refused"]


def test_rows_that_are_mixed_up_are_found(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    run = BatchedCall.run

    def mixed_up(batch: BatchedCall, works: Sequence[SlotCall]) -> None:
        run(batch, works)
        tokens = [work.outputs["token"][:1] for work in works]
        if len(works) == 5 and all(map(len, tokens)):
            tokens[0][:], tokens[1][:] = tokens[1].copy(), tokens[0].copy()

    monkeypatch.setattr(BatchedCall, "run", mixed_up)
    result = CliRunner().invoke(main, [str(bundle(BY_NAME["llama-tied"])), "--slots", "5", "--asks", "40"])
    assert result.exit_code == 1
    assert "VIOLATION" in result.output
    assert "not its own" in result.output or "differ" in result.output


def test_a_run_that_fails_before_it_is_watched_is_reported(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soaking, "left_over", lambda session: ["requests are left"])
    monkeypatch.setattr(Clients, "run", lambda clients, number, stop, seed: clients.violations.append("mixed up"))
    result = CliRunner().invoke(main, [str(bundle(BY_NAME["llama-tied"])), "--slots", "2", "--asks", "2"])
    assert result.exit_code == 1
    assert "VIOLATION mixed up" in result.output


def test_memory_that_stays_resident_is_a_leak(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clients, "run", lambda clients, number, stop, seed: None)
    monkeypatch.setattr(soaking, "SETTLED", 0.0)
    for grown, violations in ((30e6, ["memory grew by 30 MB"]), (10e6, [])):
        sizes = iter([100e6, 100e6 + grown])
        monkeypatch.setattr(soaking, "resident", lambda sizes=sizes: int(next(sizes)))
        assert soaked(bundle(BY_NAME["llama-tied"]), 0.2, 1).violations == violations


def test_what_is_left_in_a_session_is_found(bundle: Bundles) -> None:
    with Session(bundle(BY_NAME["llama-tied"]), threads=1, slots=2) as session:
        session.generate([[5, 6], [7, 8]], max_new_tokens=3)
        assert left_over(session) == []
        decoder: Decoder = session._scheduler._free[0]
        decoder.runners[1].cache.lengths[1] = 4
        assert left_over(session) == ["the KV cache is not empty"]
        session._scheduler._free.pop()
        assert left_over(session) == ["slots are lost", "the KV cache is not empty"]


def test_what_is_free_is_no_leak() -> None:
    before = resident()
    arrays = [bytearray(100_000) for _ in range(500)]
    for array in arrays:
        array[::4096] = bytes([1]) * len(array[::4096])
    assert resident() > before + 40e6
    del array, arrays
    assert resident() < before + 20e6
