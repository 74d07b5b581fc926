"""A bundle that version 0.1 converted and calibrated keeps opening, and gives the tokens that it gave then."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from runtime import Session
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import SCHEMA_VERSION, Manifest

FROZEN = Path(__file__).parents[2] / "data" / "bundle-0.1"
PROMPT = "line 7 of 49"
FULL = (98, 190, 117, 116, 240, 265, 128, 150, 186, 66, 216, 66, 224, 89, 85, 60)
FREE = (98, 190, 117, 116, 240, 265, 156, 276, 236, 276, 138, 107, 240, 197, 286, 29)


@pytest.mark.parametrize(
    ("options", "tokens", "exits"),
    [
        ({"mode": "full"}, FULL, 0),
        ({"mode": "free"}, FULL, 0),  # at its calibrated threshold
        ({"mode": "free", "threshold": 0.3}, FREE, 3),
        ({"mode": "lossless", "threshold": 0.3}, FULL, None),
    ],
)
def test_it_generates_the_tokens_that_it_gave_then(
    options: dict[str, Any], tokens: tuple[int, ...], exits: int | None
) -> None:
    with Session(FROZEN, threads=1, verify="full") as session:
        result = session.generate(PROMPT, max_new_tokens=16, ignore_eos=True, **options)
    assert result.token_ids == tokens
    assert exits is None or sum(result.exited) == exits


def test_it_is_migrated_in_memory() -> None:
    bundle = Bundle.open(FROZEN, "full")
    manifest, calibration = bundle.manifest, bundle.calibration
    assert manifest.schema_version == SCHEMA_VERSION
    assert manifest.costs is not None
    assert manifest.costs.deep[4] == pytest.approx(0.000148, rel=0.01)
    assert manifest.costs.host is None
    assert calibration is not None
    assert calibration.costs is not None
    assert calibration.costs.break_even(manifest.max_pending) == pytest.approx(0.058)
    assert calibration.costs.speedup(0.5, manifest.max_pending) == pytest.approx(1.22870209)


def test_a_new_calibration_puts_its_manifest_on_disk_in_the_new_version(tmp_path: Path) -> None:
    from freeexport.conversion.recalibrate import update_bundle

    shutil.copytree(FROZEN, tmp_path / "bundle")
    calibration = Bundle.open(FROZEN).calibration
    assert calibration is not None
    update_bundle(tmp_path / "bundle", calibration)
    opened = Bundle.open(tmp_path / "bundle", "full")
    assert f'"schema_version": {SCHEMA_VERSION}' in (opened.path / "freeexport.json").read_text()
    assert opened.calibration == calibration
    assert opened.manifest.costs == Manifest.from_json((FROZEN / "freeexport.json").read_text()).costs
