"""Engines against themselves and against numpy: sync passes, confidences, ragged batches, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checkpoints import BY_NAME, CASES, Bundles, Case
from engine_cases import CONFIDENCES, every, log_softmax, pair_of, tokens

from freeexport.checkpoints.checkpoint import open_checkpoint
from graphs.description import Description
from graphs.engine_options import EngineOptions
from graphs.errors import GraphError
from graphs.families import describe

SELECTION = ("t5-relu-tied", "umt5", "llama-yarn-rope", "llama-biases", "mistral-window", "qwen3")
each_dialect = pytest.mark.parametrize("dialect", ["ort", "standard"])


@pytest.mark.parametrize(
    ("case", "dialect"),
    [(case, "ort") for case in CASES] + [(BY_NAME[name], "standard") for name in SELECTION],
    ids=lambda value: getattr(value, "name", value),
)
def test_sync_pass_of_any_size_equals_single_deep_steps(case: Case, dialect: str, bundle: Bundles) -> None:
    pair = pair_of(bundle(case, case.exit_layers[0], dialect=dialect), rows=1)
    past, longest = 21, 16
    hidden = pair.shallow(*tokens(past + longest))["hidden"]
    pair.deep(hidden[:, :past], every(1, past))
    singles = [pair.deep(hidden[:, row : row + 1], every(1, 1))["logits"][0] for row in range(past, past + longest)]
    for size in (1, 2, 3, 5, 8, longest):
        pair.trim(past)
        together = pair.deep(hidden[:, past : past + size], every(1, size))["logits"]
        np.testing.assert_allclose(together, singles[:size], atol=1e-4, rtol=0)
        # What it left in the cache serves the next step.
        if size < longest:
            after = pair.deep(hidden[:, past + size : past + size + 1], every(1, 1))["logits"][0]
            np.testing.assert_allclose(after, singles[size], atol=1e-4, rtol=0)


@each_dialect
@pytest.mark.parametrize("name", SELECTION)
def test_row_of_a_ragged_batch_equals_single_row(name: str, dialect: str, bundle: Bundles) -> None:
    path = bundle(BY_NAME[name], 1, dialect=dialect)
    ids, lengths = tokens(9, 4, 17)
    pair = pair_of(path, rows=3)
    hidden = pair.shallow(ids, lengths)["hidden"]
    pair.deep(hidden, lengths)
    # Another call on top of different pasts, in which the middle row is idle.
    new, counts = tokens(3, 1, 2)[0], np.array([3, 0, 2], np.int32)
    deep = pair.deep(pair.shallow(new, counts)["hidden"], counts)["logits"].reshape(3, 3, -1)
    # And one more that shows that the idle row kept its cache.
    last, ones = tokens(1, 1, 1)[0], every(3, 1)
    final = pair.deep(pair.shallow(last, ones)["hidden"], ones)["logits"]
    for row in range(3):
        alone = pair_of(path, rows=1)
        first = alone.shallow(ids[row : row + 1, : lengths[row]], lengths[row : row + 1])["hidden"]
        alone.deep(first, lengths[row : row + 1])
        np.testing.assert_allclose(hidden[row, : lengths[row]], first[0], atol=1e-4, rtol=0)
        if count := int(counts[row]):
            again = alone.shallow(new[row : row + 1, :count], every(1, count))["hidden"]
            logits = alone.deep(again, every(1, count))["logits"]
            np.testing.assert_allclose(deep[row, :count], logits, atol=1e-4, rtol=0)
        ended = alone.deep(alone.shallow(last[row : row + 1], every(1, 1))["hidden"], every(1, 1))["logits"]
        np.testing.assert_allclose(final[row], ended[0], atol=1e-4, rtol=0)


@each_dialect
@pytest.mark.parametrize("measure", list(CONFIDENCES))
@pytest.mark.parametrize("name", ["t5-relu-tied", "llama-untied-many-eos"])
def test_token_and_confidence_match_the_logits(name: str, measure: str, dialect: str, bundle: Bundles) -> None:
    pair = pair_of(bundle(BY_NAME[name], 1, dialect=dialect, confidence=measure), rows=1)
    ids, lengths = tokens(40)
    shallow = pair.shallow(ids, lengths)
    deep = pair.deep(shallow["hidden"], lengths)
    # The pair asks for the nats of token 0.
    np.testing.assert_allclose(deep["nll"], -log_softmax(deep["logits"])[:, 0], atol=1e-4, rtol=0)
    for outputs in (shallow, deep):
        expected = CONFIDENCES[measure](np.exp(log_softmax(outputs["logits"])))
        assert np.ptp(expected) > 0.1
        np.testing.assert_allclose(outputs["confidence"], expected, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(outputs["token"], outputs["logits"].argmax(-1))
        assert (outputs["confidence"] >= 0).all()
        assert (outputs["confidence"] <= 1).all()


@pytest.mark.parametrize("name", ["t5-relu-tied", "qwen3"])
def test_standard_dialect_uses_only_standard_onnx_operators(name: str, bundle: Bundles) -> None:
    for file in bundle(BY_NAME[name], dialect="standard").glob("*.onnx"):
        model = onnx.load(file, load_external_data=False)
        assert [opset.domain for opset in model.opset_import] == [""]
        assert {node.domain for node in model.graph.node} == {""}
        assert not {node.op_type for node in model.graph.node} & {"If", "Loop", "Scan"}


def test_all_graphs_refer_to_one_weight_file_by_a_relative_name(bundle: Bundles) -> None:
    path = bundle(BY_NAME["t5-relu-tied"])
    for file in path.glob("*.onnx"):
        tensors = onnx.load(file, load_external_data=False).graph.initializer
        locations = {entry.value for t in tensors for entry in t.external_data if entry.key == "location"}
        assert locations == {"weights.data"}
        assert all(len(t.raw_data) < 200 for t in tensors)


@pytest.fixture
def llama(checkpoint: Callable[[Case], Path]) -> Description:
    source = open_checkpoint(str(checkpoint(BY_NAME["llama-tied"])))
    return describe(source.config, source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"exit_layer": n, "capacity": 64}, f"exit layer {n} .*5 decoder layers.*choose 1 to 4") for n in (0, 5)),
        ({"capacity": 0}, "capacity 0 .*1 to 512"),
        ({"capacity": 513}, "capacity 513 .*1 to 512"),
        ({"capacity": 64, "max_pending": 0}, "max_pending 0 .*1 to 256"),
        ({"capacity": 64, "max_pending": 257}, "max_pending 257 .*1 to 256"),
    ],
)
def test_out_of_range_options_are_refused_with_the_range(
    options: dict[str, Any], message: str, llama: Description
) -> None:
    with pytest.raises(GraphError, match=message):
        EngineOptions(**{"exit_layer": 1, **options}).check(llama)


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        (
            "llama-tied",
            {"kernels": "onnxruntime"},
            "own kernels .*not precision int8 of target cpu with kernels of onnx",
        ),
        (
            "llama-tied",
            {"precision": "fp32", "kernels": "onnxruntime"},
            "--precision int8, int4 or mixed .*not .* fp32",
        ),
        (
            "llama-tied",
            {"target": "cuda", "dialect": "standard", "kernels": "onnxruntime"},
            "not .* int8 of target cuda",
        ),
        ("t5-relu-tied", {"kernels": "onnxruntime"}, "needs freeexport's own kernels and quantized weights"),
        ("gpt2", {}, "a multiple of 8, from 16 on, not 8; leave it out"),
        ("t5gemma2", {}, "does not support the attention of t5gemma; leave it out"),
    ],
)
def test_unsupported_int8_cache_is_refused(
    case: str, options: dict[str, Any], message: str, checkpoint: Callable[[Case], Path]
) -> None:
    opened = open_checkpoint(str(checkpoint(BY_NAME[case])))
    given = {"precision": "int8", "kernels": "freeexport", "kv_cache": "int8", **options}
    with pytest.raises(GraphError, match=f"--kv-cache int8 .*{message}"):
        # The setting of GPT-2 gives it heads of 8 values.
        EngineOptions(1, capacity=64, **given).check(describe({**opened.config, "n_head": 8}, opened))


@pytest.mark.parametrize("head_dim", [12, 24, 100])
def test_head_sizes_without_a_fused_kernel_are_refused(head_dim: int, llama: Description) -> None:
    layer = replace(llama.decoder.layers[0], attention=replace(llama.attention, head_dim=head_dim))
    odd = replace(llama, decoder=replace(llama.decoder, layers=(layer, *llama.decoder.layers[1:])))
    with pytest.raises(GraphError, match=f"size {head_dim} .*--dialect standard"):
        EngineOptions(1, capacity=64).check(odd)
    EngineOptions(1, capacity=64, dialect="standard").check(odd)
