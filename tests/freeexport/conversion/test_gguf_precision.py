"""A GGUF file that has 4 to 8 bits already becomes an int4, or an exact, bundle of the same weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import torch
from engine_cases import pair_of
from gguf_model import write_gguf
from kernel_cases import case_of

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.gguf_values import KINDS, values_of
from freeexport.checkpoints.transformers_model import reference_model
from freeexport.conversion.convert import convert
from freeexport.conversion.convert_options import ConvertOptions
from graphs.quantization.panels import BITS
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import HeadPrecision, Kernels
from runtime.bundle.quantization import Quantization
from runtime.engines.kernels import missing

needs_kernels = pytest.mark.skipif(missing() is not None, reason="the kernels are not built")


def converted(model: Path, kernels: Kernels, head: HeadPrecision | None = "int4") -> Bundle:
    out = model.with_name(f"{model.stem}-{kernels}")
    options = ConvertOptions(1, precision="int4", kernels=kernels, head=head, verify="none", measure=False)
    convert(str(model), out, options)
    return Bundle.open(out)


def quantization(bundle: Bundle) -> Quantization:
    assert bundle.manifest.quantization is not None
    return bundle.manifest.quantization


@pytest.mark.parametrize(
    ("kind", "kernels", "kept"),
    [
        pytest.param("Q4_1", "freeexport", True, marks=needs_kernels),
        pytest.param("Q4_0", "freeexport", True, marks=needs_kernels),
        pytest.param("Q5_0", "freeexport", True, marks=needs_kernels),
        pytest.param("Q5_1", "freeexport", True, marks=needs_kernels),
        pytest.param("Q8_0", "freeexport", False, marks=needs_kernels),
        ("Q4_0", "onnxruntime", True),
        ("Q4_1", "onnxruntime", False),
    ],
)
def test_quantized_gguf_weights_are_not_rounded_again(kind: str, kernels: Kernels, kept: bool, tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "model.gguf", kind=kind, only="")
    named = kind in ("Q5_0", "Q5_1")
    bundle = converted(model, kernels, None if named else "int4")
    assert all(engine.kinds == ({kind: 8} if named else {}) for engine in quantization(bundle).engines)
    errors = [engine.largest_error for engine in quantization(bundle).engines]
    assert all(error < 1e-6 for error in errors) if kept else all(error > 0.01 for error in errors)
    assert all(engine.kept == (8 if kept else 0) for engine in quantization(bundle).engines), (
        "7 of a layer, and the head"
    )
    tokens, lengths = np.random.default_rng(0).integers(3, 32, (5, 24)), np.full(5, 24, np.int32)
    with torch.no_grad():
        exact = reference_model(open_checkpoint(str(model)))(torch.from_numpy(tokens)).logits.numpy()
    pair = pair_of(bundle.path, rows=5)
    ours = pair.deep(pair.shallow(tokens, lengths)["hidden"], lengths)["logits"]
    off = ours.reshape(exact.shape) - exact
    errors = np.linalg.norm(off, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
    # That of activations in 8 bits, and of the rows of the embedding; random weights make much of it.
    assert np.median(errors) < 0.2 if kept else np.median(errors) > 0.3


@needs_kernels
def test_higher_precision_tensors_of_a_4_bit_file_are_not_rounded_to_4_bits(tmp_path: Path) -> None:
    bundle = converted(write_gguf(tmp_path / "model.gguf", kind="Q4_1", only="attn"), "freeexport")
    deep = [item for item in quantization(bundle).higher if item.engine == "deep"]
    assert [(item.tensor.split(".")[-2], item.wanted, item.stored) for item in deep] == [
        (name, "int4", "int8-block") for name in ("up_proj", "gate_proj", "down_proj")
    ]
    assert all(item.error is not None and 0.05 < item.error < 0.12 for item in deep)
    assert {engine.head for engine in quantization(bundle).engines} == {"int4"}, "as it was asked for"


@needs_kernels
def test_shared_value_projections_stay_fused_with_queries_and_keys(tmp_path: Path) -> None:
    """They would have 8 bits, if they were to be rounded."""
    bundle = converted(write_gguf(tmp_path / "model.gguf", kind="Q4_1", only=""), "freeexport")
    assert not quantization(bundle).higher
    graph = onnx.load(bundle.path / "deep.onnx", load_external_data=False).graph
    first = next(node for node in graph.node if node.op_type == "PackedLinear")
    names = [attribute.name for attribute in first.attribute]
    assert "up_N" not in names
    assert [name.split(".")[-2] for name in first.input if "int4" in name] == ["data", "scales", "offsets"]


@needs_kernels
@pytest.mark.parametrize(
    ("kind", "only"),
    [("Q4_0", ""), ("Q4_1", ""), ("Q5_0", ""), ("Q5_1", "ffn"), ("Q8_0", ""), ("Q8_0", "attn_v"), ("F16", "")],
)
def test_fp32_bundle_keeps_the_bits_of_a_file_and_matches_its_values(
    kind: str, only: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_gguf(tmp_path / "model.gguf", kind=kind, only=only)
    tokens, lengths = np.random.default_rng(0).integers(3, 32, (5, 24)), np.full(5, 24, np.int32)

    def logits(out: Path) -> np.ndarray:
        convert(str(model), out, ConvertOptions(1, precision="fp32", verify="none", measure=False))
        pair = pair_of(out, rows=5)
        return pair.deep(pair.shallow(tokens, lengths)["hidden"], lengths)["logits"]

    ours = logits(tmp_path / "bundle")
    formats = Bundle.open(tmp_path / "bundle").manifest.weight_formats
    kept = {"": 16, "ffn": 6, "attn_v": 2}[only]
    assert formats == {kind.replace("F", "fp"): kept} | ({} if kept == 16 else {"fp32": 16 - kept})
    monkeypatch.setattr("graphs.engine_options.EngineOptions.keeps_file_bits", lambda *_: False)
    np.testing.assert_array_equal(ours, logits(tmp_path / "floats"))


@pytest.mark.parametrize("kind", list(KINDS))
def test_repacked_gguf_values_equal_those_of_the_file(kind: str) -> None:
    type_ = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[type_]
    rng = np.random.default_rng(len(kind))
    raw = rng.integers(0, 256, (8 * 512 // block, size), np.uint8)
    # The float16 scale, and the offset behind it. Other bytes may not be numbers.
    begins = [208] if kind == "Q6_K" else [0] if kind in ("Q4_0", "Q5_0", "Q8_0") else [0, 2]
    for at in begins:
        raw[:, at : at + 2] = rng.standard_normal((len(raw), 1)).astype("<f2").view(np.uint8)
    found = values_of(kind, raw, 8)
    assert found is not None
    values = case_of(found, 512, BITS[KINDS[kind].format], KINDS[kind].block).values
    np.testing.assert_array_equal(values.astype(np.float32), gguf.dequantize(raw, type_).reshape(8, 512))
