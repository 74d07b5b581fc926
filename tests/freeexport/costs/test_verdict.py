from __future__ import annotations

from dataclasses import replace

import pytest

from freeexport.costs.intervals import Share
from freeexport.costs.verdict import (
    ExitFacts,
    basis_of,
    break_even_text,
    prospect,
    trained_verdict,
    verdict,
)
from runtime.bundle.costs import MAX_PENDING, Costs
from runtime.bundle.manifest import DraftGain

UNKNOWN = ExitFacts("out", 10, 30)
TIMED = replace(UNKNOWN, basis="measured", break_even=0.3)
EXITS = replace(
    TIMED, threshold=0.9, exit_rate=Share(0.6, 229, 0.52, 0.67), exit_agreement=Share(0.99, 137, 0.95, 1.0), speedup=1.4
)


POOR = Share(0.04, 252, 0.02, 0.08)
NEVER = replace(EXITS, threshold=1.0, why_never="no token agrees")


@pytest.mark.parametrize(
    ("facts", "level", "text", "next_step"),
    [
        (EXITS, "good", "pays: 1.40x the speed of mode full, predicted by the engines' measured times; ",
         "freeexport evaluate out"),
        (EXITS, "good", "60.0% (95% interval 52.0% to 67.0%) of 229 tokens exit, 99.0% (95% interval 95.0% to 100.0%) "
         "of them agree", ""),
        # Whatever the speed would be, an untrained exit is to be trained.
        (replace(TIMED, trained=False, agreement=POOR), "bad", "is untrained (shallow and deep prediction agree at "
         "4.0% (95% interval 2.0% to 8.0%) of the model's own tokens)", "freeexport train"),
        (replace(TIMED, trained=False, agreement=Share(0.93, 252)), "neutral", "not calibrated", ""),
        (replace(TIMED, trained=True, data="lines.jsonl"), "neutral", "once 30.0% of the tokens exit",
         "freeexport calibrate out --data lines.jsonl"),
        (UNKNOWN, "neutral", "speed not measured", ""),
        (replace(EXITS, basis="bytes"), "neutral", "may pay: 1.40x the speed of mode full, predicted by the bytes that "
         "are read", "on an idle machine"),
        (replace(TIMED, basis="bytes"), "neutral", "30.0%", ""),
        (replace(EXITS, basis="bytes", speedup=0.7), "bad", "does not pay: 0.70x", ""),
        (replace(TIMED, break_even=None), "bad", "saves nothing even if every token exited",
         "exit after an earlier layer"),
        (replace(EXITS, speedup=0.9, break_even=0.7), "bad", "it pays once 70.0% of the tokens exit, by", ""),
        (replace(EXITS, break_even=0.55), "neutral", "may pay: 1.40x", "give more data"),
        # What was measured counts more than what was predicted.
        (replace(EXITS, measured=0.95), "bad", "0.95x the speed of mode full, measured", ""),
        (replace(EXITS, measured=1.2, break_even=0.55), "good", "pays: 1.20x the speed of mode full, measured (1.40x "
         "predicted", ""),
        (replace(EXITS, measured=1.2, basis="unknown"), "good", "pays: 1.20x", ""),
        (NEVER, "bad", "never exits: no token agrees", ""),
        (replace(NEVER, trained=False), "bad", "is untrained and never exits", "lossless"),
    ],
)  # fmt: skip
def test_verdict_states_whether_an_exit_pays_and_the_next_step(
    facts: ExitFacts, level: str, text: str, next_step: str
) -> None:
    found = verdict(facts)
    assert found.level == level
    assert text in found.text
    assert next_step in found.next_step
    assert str(found) == f"{found.text}. Next: {found.next_step}"


def test_heavy_head_is_named() -> None:
    facts = replace(EXITS, trained=False, speedup=0.7)
    assert "--exit-vocab" not in verdict(facts).next_step
    assert "--exit-vocab N" in verdict(replace(facts, heavy_head=True)).next_step


def test_exit_without_a_threshold_requires_one_for_mode_free() -> None:
    assert verdict(TIMED).text == (
        "not calibrated, so mode free needs a threshold; the exit after layer 10 of 30 pays once 30.0% of the tokens "
        "exit, by the engines' measured times"
    )


def test_unmeasured_ready_made_exit_shows_the_results_of_its_file() -> None:
    """Neither the costs nor the bytes that were read tell what its drafts add to those from the text."""
    for basis in ("unknown", "bytes", "measured"):
        facts = replace(TIMED, trained=True, basis=basis, ready_made="chat", card="0.95x in int8.")
        found = verdict(facts)
        assert (found.level, found.text) == (
            "neutral",
            "not measured whether the exit after layer 10 of 30 makes mode lossless faster here; the file of exit "
            "chat says: 0.95x in int8",
        )
        assert found.next_step.startswith("compare on your own prompts (freeexport evaluate out --methods ")
    assert verdict(replace(facts, card="")).text.endswith("faster here; its speed is unknown")


def test_a_measured_gain_decides_whether_an_exit_pays() -> None:
    """Whatever its file says."""
    gain = DraftGain(1.015, 0.999, 1.03, 32)
    facts = replace(TIMED, trained=True, precision="int4", ready_made="chat", card="1.40x", gain=gain)
    found = verdict(facts)
    assert (found.level, found.text) == (
        "bad",
        "does not pay at int4: with drafts of the exit after layer 10 of 30, mode lossless is 1.01x (95 %: 1.00 to "
        "1.03) as fast as without, measured on 32 sample prompts, so it is not used by default",
    )
    found = verdict(replace(facts, precision="int8", gain=DraftGain(1.07, 1.05, 1.08, 32)))
    assert found.level == "good"
    assert found.text.startswith(
        "pays at int8: with drafts of the exit after layer 10 of 30, mode lossless is 1.07x (95 %: "
    )


# A token takes 4 with all layers; 2 of shallow and head when it exits.
BYTES = Costs(2.0, 1.0, {1: 3.0, 8: 4.0}, measured=False)


def test_untrained_exit_has_the_break_even_of_its_bundle() -> None:
    even = BYTES.break_even(MAX_PENDING)
    assert [basis_of(one) for one in (None, BYTES, replace(BYTES, measured=True))] == ["unknown", "bytes", "measured"]
    assert basis_of(replace(BYTES, measured=True, busy=1.3)) == "unknown"
    text = break_even_text(even, "bytes")
    assert text == "pays once 35.1% of the tokens exit, by the bytes that are read"
    few = {"eval_oracle_exits": 0.1, "eval_agreement": 0.5}
    for said in (
        prospect(BYTES, 2, 8),
        trained_verdict(BYTES, {}, few),
        verdict(replace(UNKNOWN, basis="bytes", break_even=even)).text,
    ):
        assert "pays once 35.1% of the tokens exit" in said
    never = Costs(9.0, 1.0, {1: 3.0, 8: 4.0}, measured=False)
    assert prospect(never, 7, 8).startswith("warning: the exit after layer 7 of 8 saves nothing even if every token")
    many = {"eval_oracle_exits": 0.9, "eval_agreement": 0.9}
    assert trained_verdict(never, few, many).startswith("the exit cannot pay: it saves nothing")
    assert trained_verdict(BYTES, few, many).startswith("the exit can pay: up to 1.")
    assert trained_verdict(BYTES, many, few).startswith("training made no better exit")
