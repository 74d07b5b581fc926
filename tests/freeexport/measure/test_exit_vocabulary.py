"""Ranks and losses of exit vocabularies on made traces, against counting by hand; `convert --exit-vocab`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CASES, Bundles, Case
from click.testing import CliRunner, Result
from command_errors import error
from hypothesis import given
from hypothesis import strategies as st
from traces import trace

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.cli import main
from freeexport.measure import exit_vocabulary
from freeexport.measure.exit_vocabulary import Gain, best, choose_exit_vocabulary, exit_gains
from freeexport.measure.sources import CheckpointSource, Facts
from freeexport.measure.threshold import Choice
from freeexport.measure.traces import Traces, replay
from graphs.errors import GraphError
from runtime import Bundle, Session
from runtime.bundle.costs import Costs
from runtime.errors import CalibrationError, OptionError

BY_NAME = {case.name: case for case in CASES}
LLAMA, T5, MANY_EOS = (BY_NAME[name] for name in ("llama-tied", "t5-deep-decoder", "llama-untied-many-eos"))
COSTS = Costs(shallow=3.0, shallow_without_head=1.0, deep={1: 2.0, 16: 2.0})
Directory = Callable[[Case], Path]


def traces(*sequences: list[tuple[int, float]]) -> Traces:
    """Sequences of tokens and confidences, all of which agree."""
    return Traces.joined(
        trace([confidence for _, confidence in one], [True] * len(one), line, [token for token, _ in one])
        for line, one in enumerate(sequences, start=1)
    )


def gains(
    found: Traces, threshold: float = 0.5, costs: Costs = COSTS, vocabulary: int = 512, ends: Any = (2,), **more: Any
) -> tuple[dict[int, Gain], np.ndarray]:
    facts = Facts("model", "", "", vocabulary, 4, 1, "softmax", more.pop("max_pending", 16), tuple(ends))
    return exit_gains(found, threshold, costs, facts, **more)


def test_ends_come_first_then_exits_then_predictions_then_text_then_low_ids() -> None:
    seen = traces([(9, 0.9), (9, 0.9), (7, 0.1), (7, 0.1), (7, 0.1)], [(5, 0.9), (8, 0.1), (9, 0.9)])
    _, ranked = gains(seen, ends=[2, 3], text=[[300, 300, 11], [11, 300]])
    assert ranked[:9].tolist() == [2, 3, 9, 5, 7, 8, 300, 11, 0]
    assert sorted(ranked.tolist()) == list(range(512))


def test_losses_are_those_of_sequences_that_were_not_ranked() -> None:
    # Of the first sequence the second knows token 400 only, and the other way round.
    seen = traces([(400, 0.9), (401, 0.9), (402, 0.9), (403, 0.1)], [(400, 0.9)] * 3 + [(410, 0.9)])
    gain = gains(seen)[0][64]
    assert gain.lost == pytest.approx(3 / 7)
    assert gain.covers == pytest.approx(4 / 8)
    # What is known runs on: 1 exit, then a pass over 2 rows ends the first run, and so on.
    assert (int(gain.replayed.exits.sum()), len(gain.replayed.exits)) == (4, 8)


def test_a_head_costs_in_proportion_to_its_tokens() -> None:
    found, _ = gains(traces(*[[(token, 0.9) for token in range(10)]] * 4))
    assert list(found) == [64, 128, 256, 512]
    assert [gain.costs.shallow for gain in found.values()] == [1.25, 1.5, 2.0, 3.0]
    assert (best(found).size, best(found).lost) == (64, 0)
    assert best(found).speedup > found[512].speedup
    # Where rare tokens exit, the whole vocabulary is best.
    rare = traces(*[[(100 * line + token, 0.9) for token in range(20)] for line in range(1, 5)])
    found, _ = gains(rare, costs=Costs(shallow=1.1, shallow_without_head=1.0, deep=COSTS.deep))
    assert (best(found).size, found[512].lost, found[64].lost) == (512, 0, 1)


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 63), st.floats(0, 1, width=32)), min_size=1, max_size=12),
        min_size=2,
        max_size=6,
    ),
    st.integers(2, 64),
)
def test_a_larger_vocabulary_loses_no_more_and_all_of_it_nothing(
    sequences: list[list[tuple[int, float]]], size: int
) -> None:
    seen = traces(*sequences)
    whole = replay(seen, 0.5, 4)
    if not whole.exits.any():
        return
    found, _ = gains(seen, vocabulary=64, max_pending=4, sizes=[size])
    lost = [gain.lost for gain in found.values()]
    assert lost == sorted(lost, reverse=True)
    assert found[64].lost == 0
    assert found[64].replayed.sync_sizes == whole.sync_sizes
    assert all(np.isfinite(gain.speedup) for gain in found.values())


def test_a_threshold_that_nothing_passes_and_a_single_sequence_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"nothing exits at threshold 0.95"):
        gains(traces([(1, 0.9)], [(1, 0.9)]), threshold=0.95)
    with pytest.raises(CalibrationError, match="1 sequence cannot be both"):
        gains(traces([(1, 0.9)]))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exit_vocabulary, "MAX_NEW_TOKENS", 12)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, arguments), "--verify", "none"])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", [LLAMA, T5], ids=lambda case: case.name)
def test_exits_of_a_converted_bundle_are_of_its_exit_vocabulary(
    case: Case, checkpoint: Directory, bundle: Bundles, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody trained these: no rule would let a token exit.
    monkeypatch.setattr(exit_vocabulary, "choose", lambda *given: Choice(0.0, None))
    out = tmp_path / "out"
    given = ("--exit-vocab", 100, "--data", data, "--exit-layer", 1, "--capacity", 128)
    converted = run(checkpoint(case), out, *given)
    assert converted.exit_code == 0, converted.output
    assert "exit vocabulary: 100 of " in converted.stdout
    chosen = choose_exit_vocabulary(str(checkpoint(case)), data, 100, out, 1)  # from the traces beside it
    with Session(out) as session:
        options: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True}
        freely = session.generate("Hello", mode="free", threshold=0.0, **options)
        full = session.generate("Hello", mode="full", **options)
    exits = {token for token, exited in zip(freely.token_ids, freely.exited, strict=True) if exited}
    assert exits
    assert exits <= set(chosen.tokens)
    facts = Bundle.open(out, "full").manifest.exit_vocabulary
    assert facts == chosen.facts
    assert facts.size == 100
    # The deep head knows all tokens.
    with Session(bundle(case)) as whole:
        assert whole.generate("Hello", mode="full", **options).token_ids == full.token_ids


@pytest.mark.usefixtures("one_thread")
def test_sizes_and_data_that_do_not_do_are_refused(checkpoint: Directory, data: Path, tmp_path: Path) -> None:
    out, many = tmp_path / "out", str(checkpoint(MANY_EOS))
    with pytest.raises(GraphError, match="11 that end a sequence, choose 11 to 288"):
        choose_exit_vocabulary(many, data, 10, out, 1, threshold=0.0)
    data.write_text(data.read_text() + json.dumps({"input": "a", "target": "zebra quiz"}) + "\n")
    chosen = choose_exit_vocabulary(many, data, 180, out, 1, threshold=0.0)
    assert {2, *range(223, 233)} < set(chosen.tokens)  # every end of sequence is known
    # So are tokens of targets that the decoded lines do not have.
    (expected,) = CheckpointSource(open_checkpoint(many), 1, "cpu").token_ids(["zebra quiz"])
    assert set(expected) <= set(chosen.tokens)
    with pytest.raises(OptionError, match="train the exit first"):
        choose_exit_vocabulary(many, data, 12, out, 1, threshold=1.0)
    given = (checkpoint(LLAMA), tmp_path / "bundle", "--exit-layer", 1)
    assert "give both, or neither" in error(run(*given, "--exit-vocab", 100))
    assert "--data is for --exit-vocab, or weights in 4 bits" in error(run(*given, "--data", data))
    both = ("--exit-vocab", 100, "--data", data, "--calibration", tmp_path / "x.json")
    assert "calibrate the bundle" in error(run(*given, *both))
    assert not (tmp_path / "bundle").exists()
