"""Put a calibration into a bundle atomically."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from freeexport.system.output import write_whole
from runtime.bundle.bundle import Bundle
from runtime.bundle.calibration import (
    Calibration,
    calibration_name,
    check_calibration,
    is_calibration,
)
from runtime.bundle.manifest import MANIFEST, File, Manifest
from runtime.errors import CalibrationError


def check_fits(
    calibration: Calibration,
    source_sha256: str,
    vocab_size: int,
    exit_layer: int,
    confidence: str,
    max_pending: int,
) -> None:
    """Check that a calibration fits a bundle."""
    check_calibration(
        calibration, source_sha256, vocab_size, exit_layer=exit_layer, confidence=confidence
    )
    if (calibration.max_pending or 1) > max_pending:
        raise CalibrationError(
            f"this calibration is for sync passes over {calibration.max_pending} rows, the bundle "
            f"has room for {max_pending}; calibrate this bundle"
        )


def with_calibration(manifest: Manifest, calibration: Calibration, directory: Path) -> Manifest:
    """Write the calibration's file to `directory`, and return the manifest with it.

    Raises:
        CalibrationError: If the calibration does not fit. See `check_fits`.
    """
    facts = (manifest.source_sha256, manifest.vocab_size, manifest.exit_layer, manifest.confidence)
    check_fits(calibration, *facts, manifest.max_pending)
    text = calibration.to_json()
    sha256 = hashlib.sha256(text.encode("utf-8")).hexdigest()
    name = calibration_name(sha256)
    write_whole(directory / name, text)
    files = {kept: file for kept, file in manifest.files.items() if not is_calibration(kept)}
    return replace(
        manifest,
        threshold=calibration.threshold,
        rollback_threshold=calibration.rollback_threshold,
        tuned_max_pending=calibration.max_pending,
        files={**files, name: File(len(text.encode("utf-8")), sha256)},
    )


def update_bundle(path: Path, calibration: Calibration) -> Manifest:
    """Replace the calibration of the bundle at `path`, and return the new manifest.

    The manifest is replaced in one step. It names a file that no other calibration has. So the
    bundle stays consistent if it is opened meanwhile or the process is killed.

    Raises:
        BundleError: If the bundle is damaged.
        CalibrationError: If the calibration does not fit.
    """
    manifest = with_calibration(Bundle.open(path).manifest, calibration, path)
    write_whole(path / MANIFEST, manifest.to_json())
    for file in path.iterdir():  # earlier calibrations and files of killed runs
        abandoned = (
            file.name.startswith((".calibration-", f".{MANIFEST}.")) and ".partial-" in file.name
        )
        if abandoned or (is_calibration(file.name) and file.name not in manifest.files):
            file.unlink(missing_ok=True)
    return manifest
