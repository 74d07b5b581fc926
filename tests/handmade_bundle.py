"""Bundles without real engines."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from manifest_case import MANIFEST

from runtime.bundle.manifest import File

CHECK = {"name": "prefill", "tensor": "deep logits", "error": 3.25e-6, "tolerance": 1e-4, "passed": True}
PROMPTS = [{"first_difference": None}, {"first_difference": 7}]
VERIFICATION = {"passed": True, "against": "model", "checks": [CHECK], "greedy": {"tokens": 64, "prompts": PROMPTS}}


def write_bundle(folder: Path, **changes: Any) -> Path:
    """Write a bundle with a complete manifest. Its graphs contain only the name of their producer."""
    folder.mkdir()
    names = ["shallow.onnx", "deep.onnx"]
    if changes.get("encoder_capacity"):
        names += ["encoder.onnx", "prologue.onnx"]
    contents = {name: bytes([0x12, len(name)]) + name.encode() for name in names}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    manifest = dataclasses.replace(
        MANIFEST,
        layers=30,
        exit_layer=10,
        hidden_size=576,
        vocab_size=49152,
        heads=9,
        kv_heads=3,
        head_dim=64,
        capacity=1008,
        max_pending=16,
        threshold=1.0,
        eos_token_ids=(2,),
        pad_token_id=2,
        source="smollm2.gguf",
        weight_bytes=538_000_000,
        files={name: File(len(text), hashlib.sha256(text).hexdigest()) for name, text in contents.items()},
        versions={"freeexport": "0.1.0", "onnxruntime": "1.32.0"},
        copies=(),
        costs=None,
    )
    (folder / "verification.json").write_text(json.dumps(VERIFICATION))
    (folder / "freeexport.json").write_text(dataclasses.replace(manifest, **changes).to_json())
    return folder
