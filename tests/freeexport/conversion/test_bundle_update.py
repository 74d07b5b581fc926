from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from handmade_bundle import write_bundle
from killed_process import killed_before
from manifest_case import CALIBRATED

from freeexport.conversion.recalibrate import update_bundle
from runtime.bundle.bundle import Bundle
from runtime.errors import CalibrationError

CALIBRATION = replace(CALIBRATED, vocab_size=49152, exit_layer=10, threshold=0.75, rollback_threshold=2.5)
NEWER = replace(CALIBRATION, threshold=0.5, rollback_threshold=1.5)
CHANGES = {Path: ("replace", "unlink"), os: ("fsync",)}


def test_bundle_has_the_latest_calibration_and_its_thresholds(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "bundle")
    update_bundle(path, CALIBRATION)
    bundle = Bundle.open(path, verify="full")
    assert (bundle.manifest.threshold, bundle.manifest.rollback_threshold) == (0.75, 2.5)
    assert bundle.calibration == CALIBRATION
    (file,) = path.glob("calibration-*.json")
    assert json.loads(file.read_text())["method"] == "bmm"
    update_bundle(path, replace(NEWER, rollback_threshold=None))
    bundle = Bundle.open(path, verify="full")
    assert (bundle.manifest.threshold, bundle.manifest.rollback_threshold) == (0.5, None)
    assert len(list(path.glob("*calibration*"))) == 1
    update_bundle(path, replace(NEWER, rollback_threshold=None))  # the same again
    assert Bundle.open(path, verify="full").calibration is not None


def test_update_killed_at_any_step_leaves_the_old_or_new_bundle(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "bundle")
    update_bundle(path, CALIBRATION)
    found, done = [], False
    for change in range(20):
        update_bundle(path, CALIBRATION)
        done = not killed_before(change, CHANGES, lambda: update_bundle(path, NEWER))
        bundle = Bundle.open(path, verify="full")
        assert bundle.calibration in (CALIBRATION, NEWER)
        assert bundle.calibration is not None
        assert bundle.manifest.threshold == bundle.calibration.threshold
        assert bundle.manifest.rollback_threshold == bundle.calibration.rollback_threshold
        found.append(bundle.calibration.threshold)
        if done:
            break
    assert done
    assert found[0] == 0.75  # killed before anything
    assert found[-2:] == [0.5, 0.5]  # killed before clearing up, and not killed
    update_bundle(path, NEWER)
    assert not [file for file in path.iterdir() if "partial" in file.name]
    assert len(list(path.glob("*calibration*"))) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"source_sha256": "cd" * 32}, "another model"),
        ({"vocab_size": 32128}, "another vocabulary 32128, not 49152"),
        ({"exit_layer": 11}, "another exit layer 11, not 10"),
        ({"confidence": "entropy"}, "another confidence measure 'entropy', not 'softmax'"),
    ],
)
def test_mismatched_calibration_is_refused_and_changes_nothing(
    tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    path = write_bundle(tmp_path / "bundle")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(CalibrationError, match=reason):
        update_bundle(path, replace(CALIBRATION, **change))  # type: ignore[arg-type]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
