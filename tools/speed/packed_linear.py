"""PackedLinear against MatMulNBits: all linear layers of a decoder one after the other, k rows at once, in turn.

    python tools/speed/packed_linear.py --model smollm2 --rows 1 4 8 16 --threads 1 2

Milliseconds for all layers: the median, and the range of the middle half. The ratio is the median of the ratios of runs
next to each other. Weights are random; MatMulNBits has accuracy level 4 and the blocks that convert would choose.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from graphs.quantization.panels import in_panels
from graphs.quantization.rounding import Rounded
from graphs.quantization.scheme import BLOCK, BLOCKS_OF_8_BITS
from runtime.kernels import DOMAIN, instructions, register

# Layers, and the (outputs, inputs) of the products of each.
MODELS = {
    "smollm2": (30, ((960, 576), (576, 576), (3072, 576), (576, 1536))),
    "t5-large": (18, ((3072, 1024), (1024, 1024), (1024, 1024), (1024, 1024), (4096, 1024), (1024, 4096))),
}
KINDS = ("PackedLinear", "MatMulNBits")
WARM_UP, CALLS = 2, 4


def block_of(bits: int, inputs: int) -> int:
    return BLOCK if bits == 4 else next((size for size in BLOCKS_OF_8_BITS if inputs % size == 0), BLOCK)


def weight(rng: np.random.Generator, outputs: int, inputs: int, bits: int) -> Rounded:
    block = block_of(bits, inputs)
    data = rng.integers(0, 256, (outputs, inputs // block, block * bits // 8), dtype=np.uint8)
    scales = rng.random((outputs, inputs // block), np.float32) * 0.01 + 0.001
    zeros = rng.integers(0, 256, (outputs, -(-inputs // block // 2)), dtype=np.uint8) if bits == 4 else None
    return Rounded(data, scales, zeros, 0.0)


def product(kind: str, name: str, x: str, rounded: Rounded, inputs: int, bits: int) -> onnx.NodeProto:
    sizes = {"N": len(rounded.scales), "K": inputs, "bits": bits, "block_size": block_of(bits, inputs)}
    tensors = [f"{name}.{part}" for part in ("data", "scales", "zeros")[: 2 + (rounded.zero_points is not None)]]
    if kind == "PackedLinear":
        return helper.make_node(kind, [x, *tensors], [f"{name}.y"], domain=DOMAIN, **sizes)
    return helper.make_node(kind, [x, *tensors], [f"{name}.y"], domain="com.microsoft", accuracy_level=4, **sizes)


def write(model: str, bits: int, folder: Path) -> None:
    """A graph of each kind, of the same weights. Products read graph inputs `x<inputs>`; all results are outputs."""
    layers, shapes = MODELS[model]
    rng = np.random.default_rng(0)
    graphs: dict[str, tuple[list, list]] = {kind: ([], []) for kind in KINDS}
    for number in range(layers):
        for index, (outputs, inputs) in enumerate(shapes):
            rounded, name = weight(rng, outputs, inputs, bits), f"{number}.{index}"
            for kind, (nodes, constants) in graphs.items():
                halved = replace(rounded, scales=rounded.scales.astype(np.float16))
                stored = in_panels(halved, inputs, bits) if kind == "PackedLinear" else rounded
                nodes.append(product(kind, name, f"x{inputs}", rounded, inputs, bits))
                parts = {"data": stored.data, "scales": stored.scales, "zeros": stored.zero_points}
                constants += [
                    numpy_helper.from_array(array, f"{name}.{part}")
                    for part, array in parts.items()
                    if array is not None
                ]
    for kind, (nodes, constants) in graphs.items():
        given = [info(f"x{inputs}", ["k", inputs]) for inputs in sorted({inputs for _, inputs in shapes})]
        made = [info(node.output[0], None) for node in nodes]
        graph = helper.make_graph(nodes, kind, given, made, constants)
        opsets = [
            helper.make_opsetid(domain, version) for domain, version in (("", 21), ("com.microsoft", 1), (DOMAIN, 1))
        ]
        written = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        onnx.save(
            written, folder / f"{kind}.onnx", save_as_external_data=True, location=f"{kind}.data", size_threshold=64
        )


def info(name: str, shape: list | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    register(options)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def timed(sessions: dict[str, ort.InferenceSession], rows: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a call of each session, in turn."""
    rng = np.random.default_rng(1)
    found: dict[str, list[float]] = {kind: [] for kind in sessions}
    for _ in range(rounds):
        for kind, one in sessions.items():
            inputs = {
                item.name: rng.standard_normal((rows, item.shape[1])).astype(np.float32) for item in one.get_inputs()
            }
            for _ in range(WARM_UP):
                one.run(None, inputs)
            began = time.perf_counter()
            for _ in range(CALLS):
                one.run(None, inputs)
            found[kind].append((time.perf_counter() - began) / CALLS * 1e3)
    return found


def cells(times: dict[str, list[float]]) -> Iterator[str]:
    for values in times.values():
        low, median, high = statistics.quantiles(values, n=4)
        yield f"{median:8.2f} ({low:.2f} to {high:.2f})"
    own, other = times.values()
    yield f"{statistics.median(b / a for a, b in zip(own, other, strict=True)):6.2f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8], choices=(4, 8))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    processor = cpu.partition(": ")[2] or platform.machine()
    print(f"{processor}, {instructions()}, onnxruntime {ort.__version__}, {given.model}")
    for bits in given.bits:
        with tempfile.TemporaryDirectory() as name:
            write(given.model, bits, Path(name))
            for threads in given.threads:
                sessions = {kind: session(Path(name, f"{kind}.onnx"), threads) for kind in KINDS}
                for rows in given.rows:
                    found = "  ".join(cells(timed(sessions, rows, given.rounds)))
                    print(f"{bits} bits, {threads} threads, k = {rows:3}: {found}", flush=True)


if __name__ == "__main__":
    main()
