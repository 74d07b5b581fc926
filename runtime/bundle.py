"""A bundle on disk, checked before anything in it is used."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runtime.bundle_calibration import is_calibration
from runtime.calibration import Calibration, check_calibration, read_calibration
from runtime.errors import BundleError
from runtime.manifest import MANIFEST, File, Manifest

Verify = Literal["sizes", "full"]
VERIFICATION = "verification.json"


@dataclass(frozen=True)
class Bundle:
    """A directory that `freeexport convert` wrote. `sha256` is the hash of its manifest, and so of all its files."""

    path: Path
    manifest: Manifest
    sha256: str

    @classmethod
    def open(cls, path: Path | str, verify: Verify = "sizes") -> Bundle:
        """Read the manifest and check that the files are those it lists: their sizes, or with "full" their content.

        Raises BundleError naming the file that is missing or differs.
        """
        root = Path(path)
        text = _read_text(root)
        manifest = Manifest.from_json(text, MANIFEST)
        for name in engine_files(manifest):
            if name not in manifest.files:
                raise BundleError(f"{MANIFEST} lists no {name}; convert the checkpoint again")
        for name, file in manifest.files.items():
            _check_file(root, name, file, verify)
        return cls(root, manifest, hashlib.sha256(text.encode()).hexdigest())

    def engine(self, name: str) -> Path:
        """The graph of one engine: encoder, prologue, shallow or deep."""
        return self.path / f"{name}.onnx"

    @property
    def verification(self) -> dict[str, Any] | None:
        """What `freeexport verify` measured, or None."""
        file = self.path / VERIFICATION
        if not file.is_file():
            return None
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise BundleError(f"{VERIFICATION} cannot be read ({error}); run freeexport verify again") from None

    @property
    def calibration(self) -> Calibration | None:
        """What its threshold was measured by, or None. Raises BundleError where it is not that of this bundle."""
        manifest = self.manifest
        name = next(filter(is_calibration, manifest.files), None)
        if name is None:
            return None
        calibration = read_calibration(self.path / name)
        check_calibration(
            calibration, manifest.source_sha256, manifest.vocab_size, manifest.exit_layer, manifest.confidence
        )
        return calibration


def engine_files(manifest: Manifest) -> list[str]:
    names = ["encoder", "prologue", "shallow", "deep"] if manifest.encoder_decoder else ["shallow", "deep"]
    return [f"{name}.onnx" for name in names]


def sha256_of(path: Path) -> str:
    """The sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _read_text(root: Path) -> str:
    if not root.is_dir():
        raise BundleError(f"there is no bundle at {root}; make one with: freeexport convert MODEL {root}")
    try:
        return (root / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BundleError(f"{root} is not a bundle: it has no {MANIFEST}") from None
    except UnicodeDecodeError:
        raise BundleError(f"{MANIFEST} is not text; the bundle is damaged, convert the checkpoint again") from None


def _check_file(root: Path, name: str, file: File, verify: Verify) -> None:
    path = root / name
    if not path.is_file():
        raise BundleError(f"{name} is missing from {root}; copy the whole bundle, or convert the checkpoint again")
    size = path.stat().st_size
    if size != file.size:
        raise BundleError(f"{name} has {size} bytes, the manifest says {file.size}; the copy is incomplete")
    if verify == "full" and sha256_of(path) != file.sha256:
        raise BundleError(f"{name} is not the file that was written (sha256 differs); copy or convert it again")
