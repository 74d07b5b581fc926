"""Decoders whose attention is our own operator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checkpoints import CASES, Bundles
from engine_cases import check_rows_are_exact, every, pair_of, tokens

from freeexport.conversion.convert import convert
from freeexport.conversion.options import ConvertOptions
from graphs.engine_options import EngineOptions
from runtime.kernels import missing

if problem := missing():
    pytest.skip(problem, allow_module_level=True)

BY_NAME = {case.name: case for case in CASES}
OWN: dict[str, Any] = {"precision": "int8", "kernels": "freeexport"}
DECODERS = ("llama-tied", "llama-biases", "mistral-window", "qwen3")
with_t5 = pytest.mark.parametrize("name", [*DECODERS, "llama-yarn-rope", "t5-wide-heads", "mt5"])


def kinds(path: Path, engine: str) -> set[str]:
    return {node.op_type for node in onnx.load(path / f"{engine}.onnx", load_external_data=False).graph.node}


@with_t5
def test_attention_computes_what_onnx_runtimes_does(
    name: str, bundle: Bundles, checkpoint: Callable[[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = BY_NAME[name]
    ours = bundle(case, 1, **OWN)
    monkeypatch.setattr(EngineOptions, "own_attention", lambda options, description: False)
    sizes = {"capacity": 128, "encoder_capacity": 128, "verify": "none", "measure": False}
    convert(str(checkpoint(case)), tmp_path / "theirs", ConvertOptions(1, **OWN, **sizes))
    for engine in ("shallow", "deep"):
        assert "CachedAttention" in kinds(ours, engine)
        assert "GroupQueryAttention" in kinds(tmp_path / "theirs", engine)
        assert not {"GroupQueryAttention", "MultiHeadAttention"} & kinds(ours, engine)
    ids, lengths = tokens(33, 8, 21)
    found = []
    for path in (ours, tmp_path / "theirs"):
        pair = pair_of(path, rows=3)
        hidden = pair.shallow(ids, lengths)["hidden"]
        deep = pair.deep(hidden, lengths)["logits"].reshape(3, 33, -1)
        # A second call, on what the first one left in the cache.
        again = pair.deep(pair.shallow(ids[:, :5], every(3, 5))["hidden"], every(3, 5))["logits"]
        valid = np.arange(33) < lengths[:, None]
        found.append([hidden[valid], deep[valid], again])
    for mine, other in zip(*found, strict=True):
        # A last bit now and then tips an activation over to the next of 255 steps.
        np.testing.assert_allclose(mine, other, rtol=0, atol=0.03 * np.abs(other).max())
        rows = np.abs(mine - other).max(-1)
        assert (rows < 1e-4 * np.abs(other).max()).mean() > 0.25


@pytest.mark.parametrize("precision", ["int8", "int4", "mixed"])
@pytest.mark.parametrize("name", ["llama-biases", "mistral-window", "qwen3", "mt5"])
def test_rows_are_exact_without_an_option(name: str, precision: str, bundle: Bundles) -> None:
    path = bundle(BY_NAME[name], 1, precision=precision)
    check_rows_are_exact(path)


@pytest.mark.parametrize("measure", ["softmax", "max-prob", "entropy"])
def test_predictions_are_those_of_the_logits(measure: str, bundle: Bundles) -> None:
    path = bundle(BY_NAME["llama-tied"], 1, confidence=measure, **OWN)
    assert ("BestTwo" in kinds(path, "deep")) == (measure != "entropy")
    pair, (ids, lengths) = pair_of(path, rows=1), tokens(30)
    shallow = pair.shallow(ids, lengths)
    deep = pair.deep(shallow["hidden"], lengths)
    for found in (shallow, deep):
        logits = found["logits"].astype(np.float64)
        probabilities = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        ordered = np.sort(probabilities, -1)
        entropy = 1 + (probabilities * np.log(probabilities)).sum(-1) / np.log(logits.shape[-1])
        expected = {"softmax": ordered[:, -1] - ordered[:, -2], "max-prob": ordered[:, -1], "entropy": entropy}
        np.testing.assert_array_equal(found["token"], logits.argmax(-1))
        np.testing.assert_allclose(found["confidence"], expected[measure], atol=1e-5)
    # The pair asks for the nats of token 0.
    np.testing.assert_allclose(deep["nll"], -np.log(probabilities[:, 0]), atol=1e-4)
