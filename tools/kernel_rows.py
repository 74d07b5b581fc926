"""Measures what each row of a call costs in our kernels, without ONNX Runtime.

    python -m tools.kernel_rows [--against LIBRARY] [--threads 2] [--save rows.json]

Times the layers' products and the head of SmolLM2-135M with 1 to 8 rows, or up to 64 (--rows). The
weights are random and do not fit the processor's caches. --against names a library of another
build: the two take turns, and their results must have the same bits. --activations also times
activations in int16 or fp32. With --threads, each thread has its share of the outputs of every
product, and no thread waits for another. Times are the processor time of the slowest thread, 10 %
quantiles, because other processes only make calls slower. "stream" is the time in which as many
threads read as many bytes with numpy. Run from the root of the repository.
"""

from __future__ import annotations

import ctypes
import json
import mmap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from time import thread_time
from typing import Any, NamedTuple

import click
import numpy as np

from freeexport.system.environment import environment
from freeexport.system.load import load_note, other_load
from freeexport.system.output import check_writable, write_whole
from runtime.engines.kernels import LIBRARY, instructions
from runtime.errors import EngineError
from tools.data.splits import run_tool

QUANTILE = 0.1
MEMORY = 1 << 30
LAYERS = 30
PANEL = 16  # outputs that are stored together
COUNTS = (*range(1, 9), 12, 16, 24, 32, 40, 48, 64)  # rows that are timed
# Outputs, inputs, activation, and whether a norm comes first. An activation has a second weight.
SILU = 2
LAYER = ((960, 576, 0, True), (576, 576, 0, False), (1536, 576, SILU, True), (576, 1536, 0, False))
HEAD = ((49152, 576, 0, True),)


class PackedWeight(ctypes.Structure):
    """Mirrors `Weight` in runtime/engines/kernels/source/packed_linear.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("outputs", "inputs")),
        *((name, ctypes.c_int) for name in ("bits", "block")),
        *(
            (name, ctypes.c_void_p)
            for name in ("data", "scales", "zeros", "offsets", "bias", "multiples")
        ),
        *((name, ctypes.c_int) for name in ("pairs", "bfloat16", "exact")),
    )


class PackedProduct(ctypes.Structure):
    """Mirrors `Product` in runtime/engines/kernels/source/packed_linear.h."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("x", "skip", "norm", "shift")),
        ("epsilon", ctypes.c_float),
        ("activation", ctypes.c_int),
        ("weight", PackedWeight),
        ("up", PackedWeight),
        *((name, ctypes.c_void_p) for name in ("total", "y")),
        *((name, ctypes.c_int) for name in ("beside", "layer", "keeps_norm", "prompt")),
    )


class ModelPart(NamedTuple):
    """Products that are timed together.

    Attributes:
        name: Name of the part.
        products: The products, without rows.
        weights: Memory of their weights, uint8.
    """

    name: str
    products: list[PackedProduct]
    weights: np.ndarray


class Pages:
    """Memory in large pages, as the weights of a session have them."""

    def __init__(self) -> None:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Shared memory, the default, has large pages only if the system is configured so.
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            mapped = mmap.mmap(-1, MEMORY, flags=private)
            mapped.madvise(mmap.MADV_HUGEPAGE)
        else:
            mapped = mmap.mmap(-1, MEMORY)
        self.bytes = np.frombuffer(mapped, np.uint8)
        self.used = 0

    def add(self, array: np.ndarray) -> int:
        """Copy an array to the next line of a cache, and return its address."""
        begin = self.used
        self.used += array.nbytes + -array.nbytes % 64
        self.bytes[begin : begin + array.nbytes] = array.view(np.uint8)
        return self.bytes.ctypes.data + begin


def part(
    pages: Pages, name: str, bits: int, shapes: Iterable[tuple[int, int, int, bool]]
) -> ModelPart:
    """Return a part with random weights: 4 bits in blocks of 32 with offsets, or 8 bits of 64."""
    rng = np.random.default_rng(bits)
    began = pages.used

    def weight(outputs: int, inputs: int) -> PackedWeight:
        block = 32 if bits == 4 else 64
        scales = rng.random((2, outputs * inputs // block), np.float32).astype(np.float16)
        made = PackedWeight(outputs, inputs, bits, block)
        made.data = pages.add(rng.integers(0, 256, outputs * inputs * bits // 8, np.uint8))
        made.scales = pages.add(scales[0])
        made.offsets = pages.add(scales[1]) if bits == 4 else None
        return made

    products = []
    for outputs, inputs, activation, norm in shapes:
        product = PackedProduct(epsilon=1e-5, activation=activation, weight=weight(outputs, inputs))
        if activation:
            product.up = weight(outputs, inputs)
        if norm:
            product.norm = pages.add(rng.random(inputs, np.float32))
        products.append(product)
    return ModelPart(name, products, pages.bytes[began : pages.used])


def widened(part: ModelPart, activations: str) -> ModelPart:
    """Return a part with activations in int16 or fp32 and the same weights."""
    products = [PackedProduct.from_buffer_copy(product) for product in part.products]
    for product in products:
        for weight in (product.weight, product.up):
            weight.pairs = int(activations == "int16")
            weight.exact = int(activations == "fp32")
    return ModelPart(f"{part.name}, activations in {activations}", products, part.weights)


def share(product: PackedProduct, thread: int, threads: int) -> PackedProduct:
    """Return a product with the outputs that one of several threads computes."""
    part = PackedProduct.from_buffer_copy(product)
    for weight in (part.weight, part.up):
        panels = -(-weight.outputs // PANEL)
        first = panels * thread // threads
        last = panels * (thread + 1) // threads
        scales = first * PANEL * 2 * (weight.inputs // max(1, weight.block))
        if weight.data:
            weight.data += first * PANEL * weight.inputs * weight.bits // 8
        if weight.scales:
            weight.scales += scales
        if weight.offsets:
            weight.offsets += scales
        weight.outputs = min(weight.outputs, last * PANEL) - first * PANEL
    return part


def load(path: Path) -> Any:
    """Return the function of a library that multiplies on one thread.

    Raises:
        EngineError: If it cannot be loaded.
    """
    try:
        function = ctypes.CDLL(str(path)).freeexport_packed_linear
    except (OSError, AttributeError) as error:
        raise EngineError(f"{path} is no library of these kernels ({error})") from None
    function.restype = ctypes.c_char_p
    return function


def multiply(
    call: Any, products: list[PackedProduct], rows: int, x: np.ndarray, y: np.ndarray
) -> float:
    """Multiply `rows` rows of x with each weight, into y, and return the seconds."""
    name = instructions().encode()
    for product in products:
        product.rows = rows
        product.x = x.ctypes.data
        product.y = y.ctypes.data
    began = thread_time()
    for product in products:
        if problem := call(name, ctypes.byref(product)):
            raise EngineError(problem.decode())
    return thread_time() - began


def measure(
    libraries: dict[str, Path],
    rounds: int,
    max_rows: int,
    threads: int = 1,
    activations: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return a row for each part and library, with milliseconds by number of rows up to `max_rows`.

    Also for each part with `activations` in other types.

    Raises:
        EngineError: If libraries return different results.
    """
    pages = Pages()
    parts = [
        part(pages, "int4 layers", 4, LAYER * LAYERS),
        part(pages, "int8 layers", 8, LAYER * LAYERS),
        part(pages, "int8 head", 8, HEAD),
    ]
    parts += [widened(item, type_) for type_ in activations for item in parts]
    calls = {name: load(path) for name, path in libraries.items()}
    shapes = (*LAYER, *HEAD)
    inputs = max(shape[1] for shape in shapes)
    x = np.random.default_rng(0).standard_normal((max_rows, inputs), np.float32)
    ys = np.zeros((threads, max_rows, max(shape[0] for shape in shapes)), np.float32)
    y = ys[0]
    counts = [rows for rows in COUNTS if rows <= max_rows]
    for item in parts:
        for rows in counts:
            for product in item.products[: len(LAYER)]:
                results = set()
                for call in calls.values():
                    multiply(call, [product], rows, x, y)
                    results.add(y.tobytes())
                if len(results) > 1:
                    raise EngineError(f"{item.name}: results of {rows} rows differ")
    times: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    streams: dict[str, list[float]] = defaultdict(list)
    shares = {
        item.name: [
            [share(product, thread, threads) for product in item.products]
            for thread in range(threads)
        ]
        for item in parts
    }

    def read(values: np.ndarray) -> float:
        began = thread_time()
        values.max()
        return thread_time() - began

    with ThreadPoolExecutor(threads) as pool:
        for turn in range(rounds):
            # The second of two calls may find weights of the first in a cache.
            in_turn = list(calls.items())[:: 1 if turn % 2 else -1]
            for item in parts:
                pieces = np.array_split(item.weights.view(np.uint64), threads)
                streams[item.name].append(max(pool.map(read, pieces)))
                for rows in counts:
                    for name, call in in_turn:
                        arguments = (repeat(call), shares[item.name], repeat(rows), repeat(x), ys)
                        times[item.name, name, rows].append(max(pool.map(multiply, *arguments)))

    def milliseconds(seconds: list[float]) -> float:
        return round(1000 * float(np.quantile(seconds, QUANTILE)), 3)

    return [
        {
            "part": item.name,
            "library": name,
            "megabytes": round(item.weights.nbytes / 1e6, 1),
            "stream": milliseconds(streams[item.name]),
            "milliseconds": {rows: milliseconds(times[item.name, name, rows]) for rows in counts},
        }
        for item in parts
        for name in calls
    ]


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--against", type=click.Path(path_type=Path), help="Library to compare with.")
@click.option("--rounds", default=40, type=click.IntRange(1), help="Rounds.")
@click.option("--rows", default=8, type=click.IntRange(1), help="Maximum number of rows.")
@click.option("--threads", default=1, type=click.IntRange(1), help="Threads.")
@click.option(
    "--activations",
    multiple=True,
    type=click.Choice(("int16", "fp32")),
    help="Also time activations of this type.",
)
@click.option("--save", type=click.Path(path_type=Path), help="JSON file to write.")
def main(
    against: Path | None,
    rounds: int,
    rows: int,
    threads: int,
    activations: tuple[str, ...],
    save: Path | None,
) -> None:
    check_writable(save, "--save")
    libraries = {"this": LIBRARY} | ({"other": against} if against else {})
    with other_load() as other:
        found = measure(libraries, rounds, rows, threads=threads, activations=activations)
    for row in found:
        one = row["milliseconds"][1]
        each = [f"{taken:.2f} ({taken / one:.2f})" for taken in row["milliseconds"].values()]
        click.echo(
            f"{row['part']}, {row['library']}: {row['megabytes'] / one:.1f} GB/s with one row, "
            f"stream {row['megabytes'] / row['stream']:.1f}; ms by rows " + ", ".join(each)
        )
    if load_note(other.cores):
        click.echo(load_note(other.cores))
    if save is not None:
        command = "python -m tools.kernel_rows" + (" --against OTHER" if against else "")
        command += f" --rounds {rounds} --rows {rows} --threads {threads}"
        command += "".join(f" --activations {type_}" for type_ in activations)
        content = {
            "command": command,
            "environment": environment(),
            "busy_cores": round(other.cores, 2),
            "unit": "milliseconds of processor time",
            "rows": found,
        }
        write_whole(save, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run_tool(main)
