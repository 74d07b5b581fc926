"""TensorRT builds the engines of tiny models, without a GPU, and reads the graphs as they are meant."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checkpoints import BY_NAME, WIDE, Bundles
from device_cases import LONGT5
from exit_layer_case import with_feature
from exit_vocabulary_case import with_exit_vocabulary
from onnx import TensorProto

from graphs.errors import BuildError
from graphs.exit_head import EXIT_MAP
from graphs.tensorrt.build import build, parse, profiles_of
from runtime.bundle.bundle import Bundle
from runtime.engines.tensorrt.files import DIRECTORY, logger_of

trt = pytest.importorskip("tensorrt", reason="TensorRT is not installed (tools/gpu/tensorrt_environment.py)")
pytestmark = pytest.mark.tensorrt

# TensorRT's attention kernels want heads of at least 16, and four of them.
T5, LLAMA = BY_NAME["t5-larger-tied"], BY_NAME["llama-grouped-llama3-rope"]
T5_EXIT, LLAMA_EXIT = (with_exit_vocabulary(case.name, layers=True) for case in (T5, LLAMA))
SEQ2SEQ, DECODER = ["encoder", "prologue", "shallow", "deep"], ["shallow", "deep"]
T5_FEATURE, LLAMA_FUSED = with_feature(T5.name, 0), with_feature(LLAMA.name, 1, "fused")
FEATURES = {T5_FEATURE: [*SEQ2SEQ[:3], "exit", "deep"], LLAMA_FUSED: ["shallow", "exit", "deep"]}
NEW = dict.fromkeys((BY_NAME["gemma3"], BY_NAME["gpt2"]), DECODER)
ENGINES = {T5: SEQ2SEQ, LLAMA: DECODER, T5_EXIT: SEQ2SEQ, LLAMA_EXIT: DECODER, **FEATURES, **NEW}
FLOATS = {trt.DataType.FLOAT, trt.DataType.HALF, trt.DataType.BF16}
ONNX_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}

each_model = pytest.mark.parametrize("case", ENGINES, ids=lambda case: case.name)
each_precision = pytest.mark.parametrize("precision", ["fp16", "bf16"])


@pytest.mark.parametrize(
    # A build takes seconds, so each model is built in one of the two.
    ("case", "precision"),
    list(zip(ENGINES, ["fp16", "bf16", "bf16", "fp16"] * 2, strict=True)),
    ids=lambda value: getattr(value, "name", value),
)
def test_every_engine_is_built_with_all_profiles(case: Any, precision: str, copied: Bundles) -> None:
    opened = Bundle.open(copied(case, case.exit_layers[0], precision=precision, target="tensorrt"))
    reported: dict[str, list[float]] = {}
    built = build(opened, 4, lambda name, done: reported.setdefault(name, []).append(done))
    assert [engine.plan.engine for engine in built] == ENGINES[case]
    for engine in built:
        file = opened.path / DIRECTORY / engine.plan.file
        assert file.stat().st_size == engine.bytes > 10_000
        assert engine.plan.profiles == profiles_of(engine.plan.engine, opened.manifest, 4)
        record = json.loads(file.with_name(f"{file.name}.json").read_text())
        assert (record["sha256"], record["plan"]["tensorrt"]) == (engine.sha256, trt.__version__)
        progress = reported[engine.plan.engine]
        assert progress == sorted(progress)
        assert len(set(progress)) > 10
        assert progress[-1] == 1.0


def test_engines_of_an_exported_encoder_are_built(copied: Bundles) -> None:
    opened = Bundle.open(copied(LONGT5, 1, precision="bf16", target="tensorrt"))
    assert [engine.plan.engine for engine in build(opened, 4)] == SEQ2SEQ


@each_precision
@each_model
def test_caches_attention_and_types_of_the_network_match_the_graph(case: Any, precision: str, bundle: Bundles) -> None:
    opened = Bundle.open(bundle(case, case.exit_layers[0], target="tensorrt", precision=precision))
    for name in ENGINES[case][ENGINES[case].index("shallow") :]:
        graph = onnx.load(opened.engine(name), load_external_data=False).graph
        operators = Counter(node.op_type for node in graph.node)
        with network_of(opened.engine(name)) as layers:
            kinds = Counter(layer.type for layer in layers)
            parts = {f"{layer}.{part}" for layer in layers_of(opened, name) for part in ("key", "value")}
            updates = [layer for layer in layers if layer.type == trt.LayerType.KV_CACHE_UPDATE]
            written = {layer.get_input(0).name: layer.get_output(0).name for layer in updates}
            # The layer's output is its input's memory: past and present of one part, and of every part.
            assert written == {f"past.{part}": f"present.{part}" for part in parts}
            assert kinds[trt.LayerType.ATTENTION_INPUT] == operators["Attention"]
            assert parts or case is T5_FEATURE  # nothing precedes its exit but the embedding
            assert kinds[trt.LayerType.ROTARY_EMBEDDING] == operators["RotaryEmbedding"]
            assert kinds[trt.LayerType.KV_CACHE_UPDATE] == operators["TensorScatter"] == len(parts)
            assert float_casts(layers) <= float_casts_of_graph(opened.engine(name))


ROUNDED = {"int8": trt.DataType.INT8, "fp8": trt.DataType.FP8, "int4": trt.DataType.INT4}


@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.name)
def test_quantized_weights_stay_quantized_in_every_engine(case: Any, bundle: Bundles, tmp_path: Path) -> None:
    """The size of an engine beside its weights hardly depends on their precision: none of them was widened."""
    beside: dict[str, dict[str, int]] = {}
    for precision in ("fp16", *ROUNDED):
        head = {"head": "int4"} if precision == "int4" else {}
        path = shutil.copytree(bundle(case, target="tensorrt", precision=precision, **head), tmp_path / precision)
        built = build(Bundle.open(path), 2)
        beside[precision] = {
            one.plan.engine: one.bytes - weight_bytes(path / f"{one.plan.engine}.onnx") for one in built
        }
        shutil.rmtree(path)
    for precision in ROUNDED:
        for engine, size in beside[precision].items():
            assert 0 < size < 1.2 * beside["fp16"][engine], (precision, engine)


def weight_bytes(graph: Path) -> int:
    """Bytes of all tensors that a graph reads."""
    bits = {TensorProto.FLOAT: 32, TensorProto.FLOAT16: 16, TensorProto.INT64: 64, TensorProto.INT4: 4}
    tensors = onnx.load(graph, load_external_data=False).graph.initializer
    return int(sum(bits.get(tensor.data_type, 8) * np.prod(tensor.dims, dtype=np.int64) // 8 for tensor in tensors))


TYPES = [("int8", "fp16"), ("int8", "bf16"), ("fp8", "fp16"), ("int4", "bf16")]
# Each model is built in one of them, and each of them for two models. All are parsed.
BUILT = set(zip(ENGINES, TYPES * 2, strict=True))


@pytest.mark.parametrize(("precision", "compute"), TYPES)
@each_model
def test_engines_with_quantized_weights_are_built(
    case: Any, precision: str, compute: str, bundle: Bundles, copied: Bundles
) -> None:
    builds = (case, (precision, compute)) in BUILT
    make = copied if builds else bundle
    opened = Bundle.open(make(case, case.exit_layers[0], precision=precision, compute=compute, target="tensorrt"))
    for name in ENGINES[case]:
        graph = onnx.load(opened.engine(name), load_external_data=False).graph
        kinds = Counter(node.op_type for node in graph.node)
        with network_of(opened.engine(name)) as layers:
            widened = [layer for layer in layers if layer.type == trt.LayerType.DEQUANTIZE]
            rounded = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
            plain = {node.input[1] for node in graph.node if node.op_type == "Gemm"} - rounded
            if not kinds["Gemm"]:  # before an exit that reads the embedding, the shallow engine has no layers
                assert (name, case.exit_layers[0]) == ("shallow", 0)
                continue
            # The map of an exit, near the identity, may lose too much in 8 bits a weight with one scale a row.
            assert all(weight.startswith(EXIT_MAP) for weight in plain)
            assert len(widened) == kinds["DequantizeLinear"] == kinds["Gemm"] - len(plain) > 0
            # Weights that no 4 bits hold, and those of a head, have 8.
            assert {layer.get_input(0).dtype for layer in widened} <= {ROUNDED[precision], trt.DataType.INT8}
            assert ROUNDED[precision] in {layer.get_input(0).dtype for layer in widened} or name in EIGHT_BITS
            if name in ("shallow", "deep"):
                assert float_casts(layers) == float_casts_of_graph(opened.engine(name))
    assert not builds or len(build(opened, 2)) == len(ENGINES[case])


# What an int4 bundle has in 8 bits.
EIGHT_BITS = ("encoder", "prologue")


def test_existing_engine_is_reused_and_a_stale_one_replaced(copied: Bundles) -> None:
    opened = Bundle.open(copied(LLAMA, target="tensorrt"))
    first = build(opened, 1)
    again = build(opened, 1)
    assert [(one.reused, two.reused) for one, two in zip(first, again, strict=True)] == [(False, True)] * 2
    folder = opened.path / DIRECTORY
    damaged = folder / first[1].plan.file
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert [engine.reused for engine in build(opened, 1)] == [True, False]
    other = build(opened, 2)
    assert {path.name for path in folder.glob("*.engine")} == {engine.plan.file for engine in other}
    assert {path.name for path in folder.glob("*.engine.json")} == {f"{engine.plan.file}.json" for engine in other}


def test_interrupt_stops_the_build_and_leaves_no_partial_engine(copied: Bundles) -> None:
    opened = Bundle.open(copied(LLAMA, target="tensorrt"))

    def interrupt(engine: str, done: float) -> None:
        if engine == "deep" and done > 0.2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(opened, 1, interrupt)
    left = [path.name for path in (opened.path / DIRECTORY).iterdir() if not path.name.endswith((".json", ".cache"))]
    assert [name.partition("-")[0] for name in left] == ["shallow"]


def test_graph_refused_by_the_parser_is_named_with_its_node(bundle: Bundles) -> None:
    # Its cache has no fixed length.
    path = bundle(LLAMA, target="cuda") / "shallow.onnx"
    with (
        pytest.raises(BuildError, match=r"cannot parse shallow.onnx: node \S+ \(TensorScatter\): .*static"),
        network_of(path),
    ):
        pass


class network_of:
    """The layers of a parsed graph, while the parser that holds their weights lives."""

    def __init__(self, path: Path) -> None:
        self._log = logger_of(trt)
        self._builder = trt.Builder(self._log)
        self._network, self._parser = parse(trt, self._builder, self._log, path)

    def __enter__(self) -> list[Any]:
        return [self._network.get_layer(index) for index in range(self._network.num_layers)]

    def __exit__(self, *_: object) -> None:
        pass


def layers_of(bundle: Bundle, engine: str) -> Sequence[int | str]:
    manifest = bundle.manifest
    caches = {"shallow": manifest.shallow_caches, "exit": manifest.exit_names, "deep": manifest.deep_layers}
    return caches[engine]


def float_casts(layers: list[Any]) -> int:
    """Casts of more than one number from one floating type to another: the parser also casts the scale of attention,
    and fp32 to fp32."""
    casts = [(layer.get_input(0), layer.get_output(0)) for layer in layers if layer.type == trt.LayerType.CAST]
    floats = [given for given, made in casts if given.dtype != made.dtype and {given.dtype, made.dtype} <= FLOATS]
    return sum(any(size != 1 for size in given.shape) for given in floats)


def float_casts_of_graph(path: Path) -> int:
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    types = dict(_types(model.graph))
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    return sum({types[node.input[0]], types[node.output[0]]} <= ONNX_FLOATS for node in casts)


def _types(graph: onnx.GraphProto) -> Iterator[tuple[str, int]]:
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield value.name, value.type.tensor_type.elem_type
    for tensor in graph.initializer:
        yield tensor.name, tensor.data_type
