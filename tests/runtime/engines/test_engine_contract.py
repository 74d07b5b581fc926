"""Graphs and manifest of a bundle must be of one model; where they are not, and its hashes fit, the session says so."""

from __future__ import annotations

import json
from pathlib import Path
from time import process_time, sleep
from typing import Any

import numpy as np
import onnx
import pytest
from checkpoints import BY_NAME, Bundles

from runtime import Bundle, BundleError, EngineError, Session
from runtime.bundle.bundle import sha256_of
from runtime.bundle.manifest import HASH, MANIFEST, _hash
from runtime.engines.onnx import OnnxEngine


def resign(path: Path, **changes: Any) -> None:
    """Change fields of the manifest, and make sizes and hashes of all files fit."""
    content = json.loads((path / MANIFEST).read_text())
    del content[HASH]
    sizes = {name: (path / name).stat().st_size for name in content["files"]}
    files = {name: {"size": size, "sha256": sha256_of(path / name)} for name, size in sizes.items()}
    content |= {"files": files, **changes}
    (path / MANIFEST).write_text(json.dumps({**content, HASH: _hash(content)}))
    Bundle.open(path, verify="full")


def refusal(path: Path) -> str:
    with pytest.raises(BundleError) as refused:
        Session(path)
    message = str(refused.value)
    assert "\n" not in message
    assert MANIFEST in message
    return message


@pytest.mark.parametrize(
    ("name", "changes", "both"),
    [
        ("llama-tied", {"exit_layer": 2}, ["past.1.key"]),
        ("llama-tied", {"layers": 9}, ["no input", "past.", "key"]),
        ("llama-tied", {"layers": 2}, ["past.2.key", "expects none"]),
        ("llama-tied", {"hidden_size": 128}, ["hidden", "64]", "128]"]),
        ("llama-tied", {"kv_heads": 2}, ["[B, 4, cache, 16]", "[B, 2, cache, 16]"]),
        ("llama-tied", {"head_dim": 32}, ["[B, 4, cache, 16]", "[B, 4, cache, 32]"]),
        ("llama-tied", {"vocab_size": 300}, ["logits", "288]", "300]"]),
        ("llama-tied", {"kv_cache": "fp16"}, ["tensor(float)", "tensor(float16)"]),
        ("t5-relu-tied", {"kv_heads": 2}, ["[P, 4, ", "[P, 2, "]),
        ("t5-relu-tied", {"hidden_size": 16}, ["hidden", "32]", "16]"]),
        ("t5-relu-tied", {"encoder_capacity": 0}, ["cross"]),
    ],
)
def test_manifest_of_another_model_is_refused_with_both_values(
    name: str, changes: dict[str, Any], both: list[str], copied: Bundles
) -> None:
    path = copied(name)
    resign(path, **changes)
    message = refusal(path)
    assert all(part in message for part in both), message


def test_swapped_graphs_are_refused(copied: Bundles) -> None:
    path = copied()
    (path / "deep.onnx").rename(path / "other")
    (path / "shallow.onnx").rename(path / "deep.onnx")
    (path / "other").rename(path / "shallow.onnx")
    resign(path)
    assert ".onnx has" in refusal(path)


def test_graph_with_fixed_batch_size_is_refused(copied: Bundles) -> None:
    path = copied()
    model = onnx.load(path / "deep.onnx", load_external_data=False)
    (hidden,) = (value for value in model.graph.input if value.name == "hidden")
    hidden.type.tensor_type.shape.dim[0].dim_value = 3
    (path / "deep.onnx").write_bytes(model.SerializeToString())
    resign(path)
    assert "'hidden' tensor(float) [3, k, 64]" in refusal(path)


def test_failed_run_raises_a_one_line_engine_error(bundle: Bundles) -> None:
    path = bundle(BY_NAME["t5-relu-tied"]) / "prologue.onnx"
    engine = OnnxEngine(path, 1)
    with pytest.raises(EngineError, match=r"cannot run prologue\.onnx") as refused:
        engine.run(["cross.0.key"], {"hidden": np.zeros((1, 2, 5), np.float32)})
    assert "\n" not in str(refused.value)
    with pytest.raises(EngineError, match=r"cannot run prologue\.onnx"):
        engine.bind({"hidden": np.zeros((1, 2, 32), np.float64)}, {"cross.0.key": np.zeros(1)}).run()


def test_idle_engine_threads_do_not_spin(bundle: Bundles) -> None:
    opened = Bundle.open(bundle(BY_NAME["llama-tied"]))
    engine = OnnxEngine(opened.engine("shallow"), threads=3, kernels=opened.manifest.kernels)
    began = process_time()
    sleep(0.1)
    assert process_time() - began < 0.02  # two threads; by default, they spin for 0.03 or longer
    assert engine.output_shapes
