"""Changes one weight of a bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from runtime.bundle.bundle import Bundle, sha256_of
from runtime.bundle.manifest import MANIFEST, File


def scale_weight(path: Path, engine: str, name: str, factor: float) -> None:
    """Multiply a tensor of a bundle by a factor, and update size and hash of the file in the manifest."""
    tensors = onnx.load(path / f"{engine}.onnx", load_external_data=False).graph.initializer
    tensor = next(t for t in tensors if t.name.startswith(name))
    place = {entry.key: entry.value for entry in tensor.external_data}
    start = int(place["offset"])
    length = int(place["length"])
    content = bytearray((path / "weights.data").read_bytes())
    scaled = np.frombuffer(bytes(content[start : start + length]), np.float32) * np.float32(factor)
    content[start : start + length] = scaled.tobytes()
    (path / "weights.data").write_bytes(content)
    manifest = Bundle.open(path).manifest
    files = {**manifest.files, "weights.data": File(len(content), sha256_of(path / "weights.data"))}
    (path / MANIFEST).write_text(replace(manifest, files=files).to_json())
