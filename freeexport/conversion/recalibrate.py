"""A calibration put into a bundle: the old bundle or the new one, whatever happens between."""

from __future__ import annotations

import os
import secrets
from dataclasses import replace
from pathlib import Path

from freeexport.system.output import replacing
from runtime.bundle.bundle import Bundle, sha256_of
from runtime.bundle.calibration import Calibration, calibration_name, check_calibration, is_calibration
from runtime.bundle.manifest import MANIFEST, File, Manifest
from runtime.errors import CalibrationError


def check_room(calibration: Calibration, max_pending: int) -> None:
    """Raises CalibrationError where a calibration is of longer sync passes than `max_pending` rows."""
    if (calibration.max_pending or 1) > max_pending:
        raise CalibrationError(
            f"this calibration is for sync passes over {calibration.max_pending} rows, the bundle has room for "
            f"{max_pending}; calibrate this bundle"
        )


def with_calibration(manifest: Manifest, calibration: Calibration, directory: Path) -> Manifest:
    """The manifest with the calibration's thresholds, and its file, which is written to `directory` here.

    Raises CalibrationError where the calibration is of another model, vocabulary, exit layer or confidence measure, or
    of longer sync passes.
    """
    check_calibration(
        calibration, manifest.source_sha256, manifest.vocab_size, manifest.exit_layer, manifest.confidence
    )
    check_room(calibration, manifest.max_pending)
    partial = directory / f".calibration.partial-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        _write(partial, calibration.to_json())
        sha256 = sha256_of(partial)
        name = calibration_name(sha256)
        partial.replace(directory / name)
    finally:
        partial.unlink(missing_ok=True)
    files = {kept: file for kept, file in manifest.files.items() if not is_calibration(kept)}
    files[name] = File((directory / name).stat().st_size, sha256)
    return replace(
        manifest,
        threshold=calibration.threshold,
        rollback_threshold=calibration.rollback_threshold,
        tuned_max_pending=calibration.max_pending,
        files=files,
    )


def update_bundle(path: Path, calibration: Calibration) -> Manifest:
    """Put a calibration into the bundle at `path` in place of any other.

    The manifest is replaced in one step and names a file that no other calibration has, so a bundle that is opened
    meanwhile, or after a kill, is whole. Raises BundleError, and as `with_calibration` does.
    """
    manifest = with_calibration(Bundle.open(path).manifest, calibration, path)
    with replacing(path / MANIFEST) as partial:
        _write(partial, manifest.to_json())
    _remove_others(path, manifest)
    return manifest


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _remove_others(path: Path, manifest: Manifest) -> None:
    """Earlier calibrations, and what killed runs left."""
    for file in path.iterdir():
        abandoned = file.name.startswith((".calibration.partial-", f".{MANIFEST}.partial-"))
        if abandoned or (is_calibration(file.name) and file.name not in manifest.files):
            file.unlink(missing_ok=True)
