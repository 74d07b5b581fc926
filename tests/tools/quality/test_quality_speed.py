from __future__ import annotations

from pathlib import Path

from checkpoints import CASES
from conftest import Bundles

from freeexport.demo.g2p import phrases
from runtime import Session
from tools.quality.quality_speed import SETTINGS, draw, measure

CASE = next(case for case in CASES if case.name == "t5-relu-tied")


def test_every_setting_is_measured_against_the_full_model_and_drawn(bundle: Bundles, tmp_path: Path) -> None:
    with Session(bundle(CASE, 2), slots=1) as session:
        points = measure(session, phrases()[:2], rounds=1)
    assert [(point.mode, point.threshold) for point in points] == SETTINGS
    assert points[0].speedup == 1.0
    assert points[0].exit_rate == 0.0
    assert points[1].exit_rate == 1.0
    draw(points, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
