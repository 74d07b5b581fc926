from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import CASES
from click.testing import CliRunner
from conftest import Bundles

from tools.speed.draft_lengths import Seen, figures_of, kinds_of, main

BY_NAME = {case.name: case for case in CASES}


def test_every_kind_has_a_threshold_of_its_own_so_that_none_learns_from_another() -> None:
    kinds = kinds_of([0.0, 0.8], [0.5], [1, 4])
    drafting = [kind for kind in kinds if kind.mode == "lossless"]
    assert len(drafting) == 3 * 4
    assert len({kind.threshold for kind in drafting}) == len(drafting)
    assert [kind.name for kind in kinds[:2]] == ["full", "full again"]
    assert {kind.rate for kind in drafting if kind.name.startswith("threshold")} == {None}


def test_ratios_are_of_requests_side_by_side() -> None:
    """The machine becomes twice as slow half-way, for all."""
    figures = figures_of([1.0, 1.0, 2.0, 2.0], Seen([0.5, 0.5, 1.0, 1.0], tokens=100, exits=60, rejected=20))
    assert figures == {"ratio": 2.0, "low": 2.0, "high": 2.0, "drafted": 0.6, "kept": 0.75}


@pytest.mark.parametrize("name", ["llama-tied", "t5-relu-tied"])
def test_figures_of_a_bundle(name: str, bundle: Bundles, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    few = ["--tokens", "12", "--samples", "2", "--rounds", "2", "--warm", "1", "--threads", "1", "--force"]
    asked = ["--rate", "1", "--threshold", "0.5", "--length", "2", *few]
    done = CliRunner().invoke(main, [str(bundle(BY_NAME[name])), *asked, "--save", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())["kinds"]
    assert set(found) == {
        *("full", "full again"),
        *(f"{what}{how}" for what in ("100% right", "threshold 0.5") for how in ("", ", first request", ", 2 drafted")),
    }
    assert found["full"]["ratio"] == 1.0
    assert found["100% right, 2 drafted"]["kept"] == 1.0
    assert found["100% right, 2 drafted"]["drafted"] > 0.5
