"""Products with packed weights by the library of custom operators, and float64 references."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from graphs.quantization.panels import BITS, FLOAT_DTYPES, floats_in_panels, in_panels
from graphs.quantization.rounding import Rounded, round_4_bits, round_8_bits
from runtime.bundle.quantization import TensorFormat
from runtime.engines.kernels import DOMAIN, LIBRARY
from tools.kernel_rows import PackedProduct, PackedWeight, load

ROUND = {4: round_4_bits, 8: round_8_bits}
EPSILON = 1e-5
INSTRUCTIONS = ("avx2", "avx2-vnni", "avx512", "avx512-vnni", "avx512-bf16", "amx")


@dataclass(frozen=True)
class Case:
    """A weight [outputs, inputs], quantized or of floats.

    Attributes:
        packed: The weight in the layout of the kernels.
        values: The dequantized weight, float64 [outputs, inputs].
        bfloat16: Its floats are bfloat16.
    """

    outputs: int
    inputs: int
    bits: int
    block: int
    packed: Rounded
    values: np.ndarray
    bias: np.ndarray | None = None
    bfloat16: bool = False

    @property
    def tensors(self) -> dict[str, np.ndarray | None]:
        packed = self.packed
        weight = {"data": packed.data, "scales": packed.scales, "zeros": packed.zero_points}
        return {**weight, "offsets": packed.offsets, "bias": self.bias, "multiples": packed.multiples}


def random_case(
    rng: np.random.Generator, outputs: int, inputs: int, bits: int, block: int = 32, bias: bool = False
) -> Case:
    """Return a random weight.

    Weights in 4 or 5 bits randomly have offsets instead of zero points. If the number of inputs is a multiple of 256,
    they also randomly have multiples, and weights in 6 bits always have. Otherwise 6 bits become 5.
    """
    if bits in (5, 6) or (bits == 4 and inputs % 256 == 0 and rng.integers(2)):
        case = case_in_file(rng, outputs, inputs, bits, block)
        return replace(case, bias=rng.standard_normal(outputs).astype(np.float32) if bias else None)
    weight = rng.standard_normal((outputs, inputs)).astype(np.float32)
    rounded = ROUND[bits](weight, block, np.dtype(np.float16))
    if bits == 4 and rng.integers(2):
        offsets = rng.standard_normal(rounded.scales.shape).astype(np.float16)
        rounded = replace(rounded, zero_points=None, offsets=offsets)
    return case_of(rounded, inputs, bits, block, rng.standard_normal(outputs) if bias else None)


def float_case(rng: np.random.Generator, outputs: int, inputs: int, format_: TensorFormat, bias: bool = False) -> Case:
    """Return a random weight of floats."""
    weight = rng.standard_normal((outputs, inputs)).astype(FLOAT_DTYPES[format_]).astype(np.float32)
    packed = Rounded(floats_in_panels(weight, format_), None, None, 0)
    given = rng.standard_normal(outputs).astype(np.float32) if bias else None
    return Case(outputs, inputs, BITS[format_], 32, packed, weight.astype(np.float64), given, format_ == "bf16")


def case_in_file(rng: np.random.Generator, outputs: int, inputs: int, bits: int, block: int) -> Case:
    """Return a random weight in a block format of GGUF files. See `random_case`."""
    bits = 5 if bits == 6 and inputs % 256 else bits
    multiples = bits != 5 or (inputs % 256 == 0 and bool(rng.integers(2)))
    offsets = bits != 6 and (multiples or bool(rng.integers(2)))
    block = 16 if bits == 6 else 32 if multiples else block
    blocks = -(-inputs // block)
    data = rng.integers(0, 1 << bits, (outputs, blocks, block), np.uint8)
    scales = rng.standard_normal((2, outputs, inputs // 256 if multiples else blocks)).astype(np.float16)
    by = rng.integers(-128, 128, (outputs, blocks, 1 + offsets), np.int8) if multiples else None
    if bits == 4:
        data = data[..., 0::2] | data[..., 1::2] << 4
    return case_of(Rounded(data, scales[0], None, 0, scales[1] if offsets else None, by), inputs, bits, block)


def case_of(rounded: Rounded, inputs: int, bits: int, block: int, bias: np.ndarray | None = None) -> Case:
    """Return the case of a quantized weight. `values` are computed before packing."""
    outputs, blocks = rounded.data.shape[:2]
    data = rounded.data
    zeros = np.full((outputs, blocks), 1 << (bits - 1))
    if bits == 4:
        data = np.stack([data & 15, data >> 4], -1).reshape(outputs, blocks, block)
        if rounded.zero_points is not None:
            halves = rounded.zero_points & 15, rounded.zero_points >> 4
            zeros = np.stack(halves, -1).reshape(outputs, -1)[:, :blocks]
    if rounded.offsets is not None:
        zeros = np.zeros_like(zeros)
    scales = rounded.scales.astype(np.float64)
    offsets = 0 if rounded.offsets is None else rounded.offsets
    if (multiples := rounded.multiples) is not None:
        scales, offsets = (np.repeat(part, 256 // block, 1) if np.ndim(part) else part for part in (scales, offsets))
        scales = scales * multiples[..., 0]
        offsets = offsets * multiples[..., -1].astype(np.float64)
    values = (data.astype(np.float64) - zeros[..., None]) * scales[..., None]
    values += np.broadcast_to(offsets, scales.shape)[..., None]
    given = None if bias is None else bias.astype(np.float32)
    return Case(
        outputs, inputs, bits, block, in_panels(rounded, inputs, bits), values.reshape(outputs, -1)[:, :inputs], given
    )


INPUTS = (
    "data", "scales", "zeros", "bias", "skip", "norm", "up_data", "up_scales", "up_zeros", "offsets", "up_offsets",
    "multiples", "up_multiples", "shift",
)  # fmt: skip
ACTIVATIONS = ("none", "relu", "silu", "gelu-tanh", "gelu")


def multiply(
    instructions: str,
    x: np.ndarray,
    case: Case,
    library: Path = LIBRARY,
    skip: np.ndarray | None = None,
    norm: np.ndarray | None = None,
    activation: str = "none",
    up: Case | None = None,
    beside: bool = False,
    shift: np.ndarray | None = None,
    keeps_norm: np.ndarray | None = None,
    prompt: bool = False,
    activation_bits: int = 8,
) -> np.ndarray:
    """Return the product by the kernels of an instruction set, on one thread and without ONNX Runtime.

    Args:
        instructions: Name of the instruction set.
        x: Inputs, float32 [R, inputs].
        case: The weight.
        library: Path of the library.
        skip: Added to `x` before the norm.
        norm: Weight of the norm.
        activation: One of ACTIVATIONS.
        up: Second weight.
        beside: Append the product with `up` to the result, instead of multiplying with it.
        shift: Bias of the norm, which is then a layer norm.
        keeps_norm: Expected output of the norm, which the kernel must also return.
        prompt: Use the kernels for prompts.
        activation_bits: 8, 16 or 32.

    Raises:
        ValueError: If the kernels reject the call.
    """
    call = load(library)
    outputs = case.outputs + (up.outputs if beside and up else 0)
    y = np.full((len(x), outputs), np.nan, np.float32)
    total = np.full_like(x, np.nan)
    inputs = map(_address, (x, skip, norm, shift))
    product = PackedProduct(len(x), *inputs, EPSILON, ACTIVATIONS.index(activation))
    product.weight = _weight(case)
    if up is not None:
        product.up = _weight(up)
    product.weight.pairs = product.up.pairs = activation_bits == 16
    for weight in (product.weight, product.up):
        weight.exact = activation_bits == 32 and weight.bits < 16
    product.total = _address(total)
    product.y = _address(y)
    product.beside = beside
    product.layer = shift is not None
    product.keeps_norm = keeps_norm is not None
    product.prompt = prompt
    problem = call(instructions.encode(), ctypes.byref(product))
    if problem is not None:
        raise ValueError(problem.decode())
    if keeps_norm is not None:
        np.testing.assert_allclose(total, keeps_norm, atol=2e-6 * np.abs(keeps_norm).max())
    elif skip is not None:
        np.testing.assert_array_equal(total, x + skip)
    return y


def _weight(case: Case) -> PackedWeight:
    tensors = map(_address, case.tensors.values())
    return PackedWeight(case.outputs, case.inputs, case.bits, case.block, *tensors, bfloat16=case.bfloat16)


def _address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def here(instructions: str, library: Path = LIBRARY) -> bool:
    """Return True if this processor supports the instructions."""
    return ctypes.CDLL(str(library)).freeexport_supports(instructions.encode()) == 1


def with_rounded_rows(x: np.ndarray, case: Case) -> np.ndarray:
    """Return the product in float64, with rows rounded as specified for the operator."""
    grouped = np.pad(x, ((0, 0), (0, -case.inputs % 32))).reshape(len(x), -1, 32)
    peak = np.abs(grouped).max(-1, keepdims=True)
    steps = np.rint(grouped * np.where(peak > 0, np.float32(127) / np.maximum(peak, 1e-30), 0))
    rows = (steps.astype(np.float64) * (peak / np.float32(127))).reshape(len(x), -1)[:, : case.inputs]
    product: np.ndarray = rows @ case.values.T
    return product if case.bias is None else product + case.bias


def session(case: Case, threads: int = 1, **changes: object) -> ort.InferenceSession:
    """Return an ONNX Runtime session of one PackedLinear node.

    Args:
        changes: Attributes, or tensors by the names of inputs. `skip` adds a second input to the graph.
    """
    attributes = {"N": case.outputs, "K": case.inputs, "bits": case.bits, "block_size": case.block}
    attributes["bfloat16"] = int(case.bfloat16)
    tensors = dict.fromkeys(INPUTS) | case.tensors
    for name, value in changes.items():
        (tensors if name in tensors else attributes)[name] = value
    given = {"x": TensorProto.FLOAT} | ({} if tensors["skip"] is None else {"skip": TensorProto.FLOAT})
    outputs = ["y", "total"] if "skip" in given and not attributes.pop("single", False) else ["y"]
    names = ["x", *(name if array is not None else "" for name, array in tensors.items())]
    constants = {name: array for name, array in tensors.items() if array is not None and name != "skip"}
    return one_node("PackedLinear", given, outputs, constants, names, threads, **attributes)


def packed_rows(case: Case, constant: bool = True, **changes: Any) -> ort.InferenceSession:
    """Return a session of one PackedRows node: indices -> rows."""
    attributes = {"N": case.outputs, "K": case.inputs, "block_size": case.block, "bits": case.bits} | changes
    attributes.setdefault("bfloat16", int(case.bfloat16))
    given = {"indices": TensorProto.INT64} | ({} if constant else {"data": TensorProto.UINT8})
    tensors = {name: getattr(case.packed, name) for name in ("data", "scales", "offsets", "multiples")}
    constants = {name: array for name, array in tensors.items() if name not in given and array is not None}
    names = ["indices", *(name if array is not None else "" for name, array in tensors.items())]
    return one_node("PackedRows", given, ["rows"], constants, names, **attributes)


def best_two(threads: int = 1) -> Any:
    """Return a function: logits -> the best two tokens and log-sum-exp of each row, by a BestTwo node."""
    outputs = {"top": TensorProto.INT64, "log_sum": TensorProto.FLOAT}
    made = one_node("BestTwo", {"logits": TensorProto.FLOAT}, outputs, {}, threads=threads)
    return lambda logits: made.run(None, {"logits": logits})


def predictions(logits: np.ndarray, emitted: Any = None, known: Any = None, margin: int = 1, other: int = 0) -> Any:
    """Return token, confidence and nll of logits [R, C] by a Predict node."""
    tokens = {"emitted": emitted, "known": known}
    arrays = {name: np.array(array, np.int64) for name, array in tokens.items() if array is not None}
    given = {"logits": TensorProto.FLOAT} | dict.fromkeys(arrays, TensorProto.INT64)
    outputs = {"token": TensorProto.INT64, "confidence": TensorProto.FLOAT, "nll": TensorProto.FLOAT}
    names = ["logits", *(name if name in arrays else "" for name in tokens)]
    return one_node("Predict", given, outputs, {}, names, margin=margin, other=other).run(
        None, {"logits": logits, **arrays}
    )


def whole_vocabulary(known: np.ndarray, vocabulary: int, unknown: float) -> ort.InferenceSession:
    """Return a session of one WholeVocabulary node: logits [R, C] of known tokens -> y [R, vocabulary]."""
    sizes: dict[str, Any] = {"vocabulary": vocabulary, "unknown": float(unknown)}
    given = {"logits": TensorProto.FLOAT}
    names = ["logits", "known"]
    return one_node("WholeVocabulary", given, ["y"], {"known": known}, names, **sizes)


def one_node(
    kind: str,
    given: dict[str, int],
    outputs: Sequence[str] | dict[str, int],
    constants: dict[str, np.ndarray],
    names: Sequence[str] = (),
    threads: int = 1,
    **attributes: object,
) -> ort.InferenceSession:
    """Return an ONNX Runtime session of one node of a custom operator.

    Args:
        kind: Type of the operator.
        given: Types of the graph's inputs.
        outputs: Types of the outputs, or names of outputs that are float.
        constants: Initializers of the graph.
        names: Inputs of the node, in order. Default: those of the graph.
        threads: Threads of the session.
        attributes: Attributes of the node.
    """
    types = outputs if isinstance(outputs, dict) else dict.fromkeys(outputs, TensorProto.FLOAT)
    node = helper.make_node(kind, list(names or given), list(types), domain=DOMAIN, **attributes)
    ends = ([helper.make_tensor_value_info(*value, None) for value in part.items()] for part in (given, types))
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph([node], "one", *ends, tensors)
    return session_of(helper.make_model(graph, opset_imports=opsets, ir_version=10), threads)


def session_of(model: onnx.ModelProto | Path, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(LIBRARY))
    given = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])
