"""Bundles for GPUs with quantized weights, on the CPU: they compute what the same weights would, written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checkpoints import BY_NAME, PROMPTS, Bundles, Case

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.verification.batches import QUICK
from freeexport.verification.verification import failure, verify
from graphs.quantization.rounding import round_4_bits, round_8_bits, round_blocks, round_rows
from runtime import Bundle, Session
from runtime.bundle.quantization import TensorFormat

LLAMA, T5 = BY_NAME["llama-untied-many-eos"], BY_NAME["t5-gated-untied"]
PLAIN_T5 = BY_NAME["t5-relu-tied"]
FP16, FP32 = np.dtype(np.float16), np.dtype(np.float32)
TENSORRT: tuple[TensorFormat, ...] = ("int8", "fp8", "int4")

Formats = Callable[[str], TensorFormat | None]


def widened(array: np.ndarray, format_: TensorFormat, scales: np.dtype) -> np.ndarray:
    """A weight as it is once it was rounded for TensorRT."""
    if format_ == "int4":
        found = round_blocks(array, next(size for size in (64, 32) if array.shape[1] % size == 0), scales)
        rows = np.repeat(found.scales.astype(np.float32), array.shape[1] // found.scales.shape[1], 1)
    else:
        found = round_rows(array, format_, scales)
        rows = found.scales.astype(np.float32)[:, None]
    return found.data.astype(np.float32) * rows


def from_blocks(array: np.ndarray, format_: TensorFormat, scales: np.dtype) -> np.ndarray:
    """Read the blocks of MatMulNBits."""
    if format_ == "int8-block":
        eight = round_8_bits(array, 32, scales)
        values = (eight.data.astype(np.float32) - 128) * eight.scales[..., None].astype(np.float32)
    else:
        four = round_4_bits(array, 32, scales)
        assert four.zero_points is not None
        zeros = halves(four.zero_points)[:, : four.scales.shape[1], None]
        values = (halves(four.data) - zeros) * four.scales[..., None].astype(np.float32)
    return values.reshape(len(array), -1)[:, : array.shape[1]]


def halves(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1).astype(np.float32)


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and "embed" not in name and "shared" not in name and "relative" not in name


@pytest.fixture
def rounded_first(bundle: Bundles, checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bundle that rounds nothing, of a checkpoint whose linear weights were changed."""
    from freeexport.conversion.convert import convert
    from freeexport.conversion.convert_options import ConvertOptions

    def make(case: Case, change: Callable[[str, np.ndarray], np.ndarray], **options: Any) -> Path:
        read = Checkpoint.read

        def changed(self: Checkpoint, name: str) -> np.ndarray:
            array = read(self, name)
            return change(name, array) if is_linear(name, array.shape) else array

        with monkeypatch.context() as patched:
            patched.setattr(Checkpoint, "read", changed)
            given = ConvertOptions(1, capacity=128, encoder_capacity=128, verify="none", measure=False, **options)
            convert(str(checkpoint(case)), tmp_path / "rounded", given)
        return tmp_path / "rounded"

    return make


def said(path: Path) -> list[Any]:
    with Session(path, threads=1) as session:
        results = [session.generate(list(prompt), max_new_tokens=20, threshold=0.5) for prompt in PROMPTS]
    return [(result.token_ids, result.exited, result.confidence) for result in results]


def same(ours: list[Any], theirs: list[Any], atol: float) -> None:
    """Tokens and exits; and confidences, up to the last bits of half precision."""
    assert [each[:2] for each in ours] == [each[:2] for each in theirs]
    for (*_, one), (*_, other) in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.array(one, float), np.array(other, float), atol=atol)


@pytest.mark.parametrize("precision", TENSORRT)
@pytest.mark.parametrize("case", [LLAMA, T5], ids=lambda case: case.name)
def test_quantized_tensorrt_bundles_match_their_dequantized_weights(
    case: Case, precision: TensorFormat, bundle: Bundles, rounded_first: Any
) -> None:
    def change(name: str, array: np.ndarray) -> np.ndarray:
        # Encoder, prologue and head of an int4 bundle have 8 bits; what computes in fp32 has scales in fp32.
        eight = precision == "int4" and name.startswith(("lm_head", "encoder."))
        eight = eight or (
            precision == "int4" and name.endswith(("EncDecAttention.k.weight", "EncDecAttention.v.weight"))
        )
        format_: TensorFormat = "int8" if eight else precision
        return widened(array, format_, FP32 if name.endswith(".wo.weight") else FP16)

    ours = bundle(case, target="tensorrt", precision=precision)
    theirs = rounded_first(case, change, target="tensorrt", precision="fp16")
    assert Bundle.open(ours).manifest.weight_bytes < Bundle.open(theirs).manifest.weight_bytes
    same(said(ours), said(theirs), atol=5e-3)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_cuda_bundles_match_their_dequantized_weights(
    precision: TensorFormat, bundle: Bundles, rounded_first: Any
) -> None:
    def change(name: str, array: np.ndarray) -> np.ndarray:
        return from_blocks(array, "int8-block" if precision == "int8" or "lm_head" in name else "int4", FP32)

    ours = said(bundle(LLAMA, target="cuda", precision=precision, compute="fp32"))
    theirs = said(rounded_first(LLAMA, change, target="cuda", precision="fp32"))
    same(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("target", "precision"), [("cuda", "int8"), ("cuda", "int4"), *(("tensorrt", p) for p in TENSORRT)]
)
@pytest.mark.parametrize("case", [LLAMA, PLAIN_T5], ids=lambda case: case.name)
def test_quantized_bundles_are_verified_against_their_checkpoint(
    case: Case, target: str, precision: str, bundle: Bundles, checkpoint: Any
) -> None:
    path = bundle(case, target=target, precision=precision)
    report = verify(Bundle.open(path), str(checkpoint(case)), extent=QUICK)
    assert report["passed"], failure(report)
    assert report["quality"]["divergence"] > 0


@pytest.mark.parametrize("target", ["cuda", "tensorrt"])
@pytest.mark.parametrize("name", [LLAMA.name, T5.name, "marian", "phi3-longrope", "gemma3", "gpt2"])
def test_every_product_of_every_engine_reads_quantized_weights(name: str, target: str, bundle: Bundles) -> None:
    path = bundle(BY_NAME[name], target=target, precision="int8")
    for file in path.glob("*.onnx"):
        graph = onnx.load(file, load_external_data=False).graph
        rounded = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
        plain = [node for node in graph.node if node.op_type == "Gemm" and node.input[1] not in rounded]
        assert not plain
        assert rounded if target == "tensorrt" else any(node.op_type == "MatMulNBits" for node in graph.node)
