"""Batches of a bundle in a closed loop: what is counted, where a mode stops paying, and what the table says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CASES, PROMPTS
from click.testing import CliRunner, Result
from conftest import Bundles

from runtime import Session
from tools.speed.batch_rows import Setting, rows_of, table, verdict
from tools.speed.batches import Load, main, options_of
from tools.speed.closed_loop import Asked, ClosedLoop, Window

CASE = next(case for case in CASES if case.name == "llama-tied")


def window(*requests: tuple[float, list[float], int], began: float = 1.0, ended: float = 3.0) -> Window:
    return Window(began, ended, [Asked(joined, times, exits) for joined, times, exits in requests])


def test_tokens_and_gaps_count_inside_the_window_and_requests_in_whole() -> None:
    found = window((0.0, [1.0, 1.5, 2.5], 1), (0.5, [1.0, 3.0, 3.5], 2), (2.5, [], 0))
    assert found.tokens == 3
    assert found.tokens_per_second == 1.5
    assert sorted(found.gaps) == [0.5, 1.0, 2.0]
    assert sorted(found.latencies) == [2.5, 3.0]
    assert found.exit_rate == 3 / 4


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ({1: 1.5, 2: 1.2, 4: 0.9, 8: 1.1}, "free stops paying between batch 2 (1.20x) and 4 (0.90x)"),
        ({8: 1.01, 1: 2.0}, "free pays at every batch measured, up to 8 (1.01x)"),
        ({1: 0.99, 4: 1.2}, "free pays at no batch from 1 on (0.99x)"),
    ],
)
def test_the_verdict_names_where_a_mode_stops_paying(ratios: dict[int, float], said: str) -> None:
    assert verdict(ratios, "free") == said


def test_a_row_is_the_median_round_against_full_at_the_same_batch() -> None:
    def turn(count: int) -> Window:
        return window((0.0, [1.0, *(1 + 2 * (n + 1) / count for n in range(count))], 0))

    rows = rows_of(
        {
            Setting("full", 2): [turn(4), turn(8), turn(6)],
            Setting("free", 2): [turn(9)],
            Setting("full", 4): [turn(10)],
        }
    )
    assert [(row.mode, row.batch, row.tokens_per_second) for row in rows] == [
        *(("full", 2, 3.0), ("full", 4, 5.0), ("free", 2, 4.5)),
    ]
    assert [row.ratio for row in rows] == [1, 1, 1.5]
    assert rows[0].spread == pytest.approx(2 / 3)
    about: dict[str, Any] = dict.fromkeys(("model", "exit_layer", "precision", "exits", "threads", "of_cores"), "x")
    about |= {"cpu": "x", "prompts": 1, "tokens": 1, "rounds": 1, "seconds": 1, "idle": False}
    assert "| 2 | free | 4.5 | 0% | 1.50x |" in table(about, rows)
    assert "BUSY" in table(about, rows)
    assert "BUSY" not in table({**about, "idle": True}, rows)


def test_replayed_lengths_differ_and_are_the_same_for_all_modes() -> None:
    load = Load([[1]] * 9, None, "0.8", 40, 1.0, 1)
    full, free = (options_of(mode, load) for mode in ("full", "free"))
    lengths = [options["max_new_tokens"] for options in free]
    assert lengths == [options["max_new_tokens"] for options in full]
    assert len(set(lengths)) > 3
    assert all(20 <= length <= 40 for length in lengths)
    assert all(options["threshold"] == 0.5 for options in free)


def test_as_many_are_in_flight_as_asked_for_and_all_come_to_their_end(bundle: Bundles) -> None:
    prompts = [list(prompt) for prompt in PROMPTS]
    options = [{"max_new_tokens": 4 + number, "ignore_eos": True, "threshold": 0.2} for number in range(len(prompts))]
    with Session(bundle(CASE), threads=1, slots=4) as session:
        found = ClosedLoop(session, prompts, options, 3).run(0.2)
        assert session._scheduler.empty
    wanted = [options[number % len(options)]["max_new_tokens"] for number in range(len(found.asked))]
    assert [len(request.times) for request in found.asked] == wanted
    for moment in found.asked[3:]:
        others = sum(other.joined <= moment.joined < other.times[-1] for other in found.asked)
        assert others <= 3
    assert found.tokens > 10
    assert found.exit_rate > 0


def test_an_error_of_a_request_is_raised(bundle: Bundles) -> None:
    def broken(ids: Any, scores: Any) -> Any:
        raise ValueError("broken")

    with Session(bundle(CASE), threads=1, slots=2) as session:
        with pytest.raises(ValueError, match="broken"):
            ClosedLoop(session, [[5, 6]], [{"logits_processor": broken}], 2).run(0.1)
        assert session._scheduler.empty


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["--threads", "1", "--force", "--seconds", "0.05", "--rounds", "1", *arguments])


@pytest.mark.parametrize("exits", [("--threshold", "0.2", "--mode", "lossless"), ("--replay", "0.8")])
def test_a_table_comes_out_and_is_saved(
    exits: tuple[str, ...], bundle: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.speed.batches.SETTLE", 0)
    saved = tmp_path / "figures.json"
    batches = ("--batch", "1", "--batch", "3", "--tokens", "8")
    result = run(str(bundle(CASE)), "--mode", "free", *exits, *batches, "--save", str(saved))
    assert result.exit_code == 0, result.output
    figures = json.loads(saved.read_text())
    rows = {(row["mode"], row["batch"]): row for row in figures["rows"]}
    assert rows.keys() >= {("full", 1), ("full", 3), ("free", 1), ("free", 3)}
    assert rows["full", 3]["exit_rate"] == 0 < rows["free", 3]["exit_rate"]
    assert figures["settings"]["threads"] == 1
    assert "free " in result.output.splitlines()[-1] or "lossless " in result.output.splitlines()[-1]


def test_what_does_not_go_together_is_a_usage_error(tmp_path: Path) -> None:
    for arguments in (("--replay", "0.8", "--threshold", "0.5"), ("--replay", "0.8", "--mode", "lossless")):
        assert run(str(tmp_path), *arguments).exit_code == 2
    assert run(str(tmp_path), "--save", str(tmp_path / "no" / "x.json")).exit_code == 2
    assert run(str(tmp_path), "--batch", "0").exit_code == 2
