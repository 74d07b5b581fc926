"""Whatever stands in a bundle's files: a BundleError in one line, or values that are in order."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from fuzz import fuzz, mutated_bytes, mutated_json
from manifest_case import CALIBRATED, MANIFEST

from runtime.bundle.bundle import Bundle, sha256_of
from runtime.bundle.calibration import Calibration
from runtime.bundle.json_file import UnreadableError, parse_json
from runtime.bundle.manifest import HASH, File, Manifest, _hash
from runtime.bundle.manifest import MANIFEST as NAME
from runtime.errors import BundleError
from runtime.requests.session_state import GENERATION_CONFIG, read_defaults

TEXT = MANIFEST.to_json().encode()
CONTENT = {name: value for name, value in json.loads(TEXT).items() if name != HASH}
CALIBRATION_CONTENT = json.loads(CALIBRATED.to_json())
GENERATION = {"temperature": 0.6, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1, "eos_token_id": 2}
_KEPT = tempfile.TemporaryDirectory()
PLACE = Path(_KEPT.name)
GRAPHS = ("shallow.onnx", "deep.onnx")


def check(manifest: Manifest) -> None:
    """Its numbers can be worked with, and it is what it writes."""
    assert 0 < manifest.kv_bytes_per_sequence < 1 << 80
    assert 0.0 <= manifest.threshold <= 1.0
    assert len(manifest.shallow_layers) + len(manifest.deep_layers) == manifest.layers
    assert Manifest.from_json(manifest.to_json()) == manifest


@fuzz(mutated_bytes(TEXT), BundleError)
def test_altered_manifest_bytes_are_read_or_refused(content: bytes) -> None:
    manifest = Manifest.from_json(content.decode("utf-8", "replace"))
    assert manifest == MANIFEST


@fuzz(mutated_json(CONTENT), BundleError)
def test_altered_and_resigned_manifests_are_read_or_refused(content: Any) -> None:
    signed = {**content, HASH: _hash(content)} if isinstance(content, dict) else content
    check(Manifest.from_json(json.dumps(signed)))


@fuzz(mutated_bytes(TEXT), BundleError)
def test_altered_manifest_file_opens_or_is_refused(content: bytes) -> None:
    (PLACE / NAME).write_bytes(content)
    for name in GRAPHS:
        (PLACE / name).write_bytes(b"\x12\x01x")
    Bundle.open(PLACE)


@fuzz(mutated_bytes(b"\x12\x01x" + b"\x3a\x1a\x2a\x18\x6a\x16" + b"\x0a\x08location\x12\x0aweights.it"), BundleError)
def test_altered_graphs_are_read_or_refused(content: bytes) -> None:
    graph = PLACE / "deep.onnx"
    graph.write_bytes(content)
    (PLACE / "shallow.onnx").write_bytes(b"\x12\x01x")
    files = {name: File((PLACE / name).stat().st_size, sha256_of(PLACE / name)) for name in GRAPHS}
    written = Manifest(**{**vars(MANIFEST), "files": files})
    (PLACE / NAME).write_text(written.to_json())
    Bundle.open(PLACE, verify="full")


@fuzz(mutated_bytes(CALIBRATED.to_json().encode()), BundleError)
def test_altered_calibration_bytes_are_read_or_refused(content: bytes) -> None:
    Calibration.from_json(content.decode("utf-8", "replace"))


@fuzz(mutated_json(CALIBRATION_CONTENT), BundleError)
def test_altered_calibrations_are_read_or_refused(content: Any) -> None:
    read = Calibration.from_json(json.dumps(content))
    assert 0.0 <= read.threshold <= 1.0
    assert Calibration.from_json(read.to_json()) == read


@fuzz(mutated_json(GENERATION), BundleError)
def test_altered_generation_configs_are_read_or_refused(content: Any) -> None:
    (PLACE / GENERATION_CONFIG).write_text(json.dumps(content))
    read_defaults(PLACE)


@fuzz(mutated_bytes(TEXT), UnreadableError)
def test_arbitrary_json_is_read_or_refused(content: bytes) -> None:
    json.dumps(parse_json(content), allow_nan=False, ensure_ascii=False).encode()
