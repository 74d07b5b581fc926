"""Graphs in half precision as graphs in fp32: what rounding every result explains is what another fp16 does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checkpoints import BY_NAME, Bundles
from onnx import TensorProto

from freeexport.verification.batches import sample_batch, valid_indices
from freeexport.verification.engines import EnginePair, encode_prompts
from graphs.widen import fp32_copy
from runtime.bundle.bundle import Bundle

# One that rounding hurts much, an encoder-decoder and a decoder that it does not.
MODELS = ("mt5", "t5-relu-tied", "qwen3")
each_model = pytest.mark.parametrize("name", MODELS)
HALVES = {TensorProto.FLOAT16, TensorProto.BFLOAT16}


def outputs(bundle: Bundle) -> dict[str, np.ndarray]:
    batch = sample_batch(bundle)
    pair = EnginePair(bundle, len(batch.tokens), 1, encode_prompts(bundle, batch)[0])
    shallow = pair.shallow(batch.tokens, batch.lengths)
    deep = pair.deep(shallow["hidden"], batch.lengths)
    rows = valid_indices(batch.lengths, batch.tokens.shape[1])
    hidden = shallow["hidden"].reshape(-1, shallow["hidden"].shape[-1])
    return {"hidden": hidden[rows], "shallow": shallow["logits"][rows], "deep": deep["logits"][rows]}


def apart(exact: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(np.linalg.norm(exact[name] - other[name]) / np.linalg.norm(exact[name])) for name in exact}


@each_model
def test_simulated_rounding_predicts_the_error_of_another_fp16_implementation(name: str, bundle: Bundles) -> None:
    """The tolerance of the self-test of TensorRT engines rests on this: theirs is one more."""
    half = Bundle.open(bundle(BY_NAME[name], target="tensorrt"))
    with fp32_copy(half, rounds=False) as copy:
        exact = outputs(copy)
    with fp32_copy(half, rounds=True) as copy:
        explained = apart(exact, outputs(copy))
    theirs = apart(exact, outputs(half))
    assert all(0.4 < theirs[each] / explained[each] < 1.5 for each in exact), (theirs, explained)


@pytest.mark.parametrize("name", ["mt5", "qwen3"])
def test_bf16_error_is_eight_times_that_of_fp16(name: str, bundle: Bundles) -> None:
    found: dict[str, dict[str, float]] = {}
    for precision in ("fp16", "bf16"):
        half = Bundle.open(bundle(BY_NAME[name], target="tensorrt", precision=precision))
        with fp32_copy(half, rounds=False) as copy:
            exact = outputs(copy)
        with fp32_copy(half, rounds=True) as copy:
            found[precision] = apart(exact, outputs(copy))
    assert all(6 < found["bf16"][each] / found["fp16"][each] < 11 for each in exact), found


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "int4", "compute": "bf16"}], ids=str)
def test_only_weights_stay_in_half_precision(options: dict[str, Any], rounds: bool, bundle: Bundles) -> None:
    path = bundle(BY_NAME["t5-relu-tied"], target="tensorrt", **options)
    with fp32_copy(Bundle.open(path), rounds) as copy:
        assert copy.manifest.float_type == "fp32"
        for file in copy.path.glob("*.onnx"):
            graph = onnx.load(file, load_external_data=False).graph
            assert not {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} & HALVES
            kinds = {attribute.i for node in graph.node if node.op_type == "Cast" for attribute in node.attribute}
            assert bool(kinds & HALVES) is rounds
        assert (copy.path / "weights.data").samefile(path / "weights.data")
    assert not copy.path.exists()


def test_weights_are_copied_if_they_cannot_be_linked(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr("graphs.widen.os.link", refuse)
    with fp32_copy(Bundle.open(bundle(BY_NAME["qwen3"], target="tensorrt")), rounds=False) as copy:
        assert Bundle.open(copy.path, verify="full").manifest.compute == "fp32"
        with fp32_copy(copy, rounds=True) as again:  # its own, as it computes in fp32
            assert again is copy
