"""The measurement on a random model: what it says of settings that are equal by construction."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
from checkpoints import CASES
from click.testing import CliRunner
from conftest import Bundles

from tools import adaptive_shift

CASE = next(case for case in CASES if case.name == "t5-relu-tied")


@pytest.fixture
def a_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ("ba", "ce", "di", "fo", "gu", "ha", "ke", "li", "mo", "nu")
    short = ["".join(letters) for letters in product(parts, parts)]
    long = ["".join(letters) * 2 for letters in product(parts, parts, parts)]
    entries = [(spelling, ["B", "AH1"]) for spelling in short + long]
    monkeypatch.setattr(adaptive_shift, "dictionary", lambda: (entries, "0"))


def test_settings_are_compared_on_the_same_phrases(bundle: Bundles, a_dictionary: None, tmp_path: Path) -> None:
    output = tmp_path / "shift.json"
    sizes = ["--calibrate", "12", "--decode", "4", "--timed", "4", "--words", "2", "3", "--target", "0.5", "--force"]
    done = CliRunner().invoke(
        adaptive_shift.command, [str(bundle(CASE, 2, capacity=40)), "--output", str(output), *sizes]
    )
    assert done.exit_code == 0, done.output
    assert "adapting adds" in done.output
    content = json.loads(output.read_text())
    settings = content["settings"]
    for kind in adaptive_shift.KINDS:
        full, fixed, adaptive = (settings[name][kind] for name in ("full", "fixed", "adaptive"))
        assert full["exit_rate"] == full["phonemes_unlike_full"] == 0
        assert len(set(fixed["thresholds"])) == 1
        assert len(adaptive["thresholds"]) == 4
    common = {name: settings[name]["common"] for name in ("fixed", "adaptive")}
    assert common["adaptive"]["thresholds"][0] == pytest.approx(common["fixed"]["thresholds"][0])
    assert content["cost"]["median_ratio"] > 0
