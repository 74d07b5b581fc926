"""Measures what each row of a call costs in our kernels, without ONNX Runtime.

    python -m tools.kernel_rows [--against LIBRARY] [--save rows.json]

Times the linear layers and the head of SmolLM2-135M, with random weights that do not fit the
processor's caches, and 1 to 8 rows. `--against` names a library of another build: the two take
turns, and their results must have the same bits. Times are the processor time of one thread, 10 %
quantiles, because other processes only make calls slower. The first line is the time to read as
many bytes in one stream. Run from the root of the repository.
"""

from __future__ import annotations

import ctypes
import json
import mmap
from collections import defaultdict
from pathlib import Path
from time import thread_time
from typing import Any, NamedTuple

import click
import numpy as np

from freeexport.system.environment import environment
from freeexport.system.load import load_note, other_load
from freeexport.system.output import write_whole
from runtime.kernels import LIBRARY, instructions
from tools.data.splits import run_tool

QUANTILE = 0.1
SIZE = 576
LAYERS = 30
# Outputs, inputs, activation (0: none, 2: silu, with a second weight), norm.
LAYER = ((960, SIZE, 0, True), (SIZE, SIZE, 0, False), (1536, SIZE, 2, True), (SIZE, 1536, 0, False))
HEAD = ((49152, SIZE, 0, True),)


class _Weight(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("outputs", "inputs")),
        *((name, ctypes.c_int) for name in ("bits", "block")),
        *(
            (name, ctypes.c_void_p)
            for name in ("data", "scales", "zeros", "offsets", "bias", "multiples")
        ),
    )


class _Product(ctypes.Structure):
    """Mirrors the struct in runtime/kernels/source/packed_linear.h."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("x", "skip", "norm", "shift")),
        ("epsilon", ctypes.c_float),
        ("activation", ctypes.c_int),
        ("weight", _Weight),
        ("up", _Weight),
        *((name, ctypes.c_void_p) for name in ("total", "y")),
        *((name, ctypes.c_int) for name in ("beside", "layer", "keeps_norm", "prompt")),
    )


class Part(NamedTuple):
    """Products that are timed together.

    Attributes:
        name: Name of the part.
        products: The products, without rows.
        outputs: Outputs of each product.
        bytes: Bytes of their weights.
    """

    name: str
    products: list[_Product]
    outputs: list[int]
    bytes: int


class Memory:
    """Memory for random weights, in large pages like the weights of a session.

    Args:
        size: Number of bytes.
    """

    def __init__(self, size: int) -> None:
        self._mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._mapped.madvise(mmap.MADV_HUGEPAGE)
        self.whole = np.frombuffer(self._mapped, np.uint8)
        self.used = 0

    def take(self, array: np.ndarray) -> int:
        """Copy an array and return its address."""
        begin = self.used
        self.used += array.nbytes + -array.nbytes % 64
        self.whole[begin : begin + array.nbytes] = array.reshape(-1).view(np.uint8)
        return self.whole.ctypes.data + begin


def part(memory: Memory, name: str, bits: int, layers: int, shapes: Any) -> Part:
    """Return a part with random weights: 4 bits with offsets, 8 bits with the middle as zero."""
    rng = np.random.default_rng(bits)
    products = []
    began = memory.used

    def weight(outputs: int, inputs: int) -> _Weight:
        data = rng.integers(0, 256, outputs * inputs * bits // 8, np.uint8)
        block = 32 if bits == 4 else 64
        scales = rng.random((2, outputs * inputs // block), np.float32).astype(np.float16)
        made = _Weight(outputs, inputs, bits, block)
        made.data = memory.take(data)
        made.scales = memory.take(scales[0])
        made.offsets = memory.take(scales[1]) if bits == 4 else None
        return made

    for _ in range(layers):
        for outputs, inputs, activation, norm in shapes:
            product = _Product(epsilon=1e-5, activation=activation)
            product.weight = weight(outputs, inputs)
            if activation:
                product.up = weight(outputs, inputs)
            if norm:
                product.norm = memory.take(rng.random(inputs, np.float32))
            products.append(product)
    outputs = [product.weight.outputs for product in products]
    return Part(name, products, outputs, memory.used - began)


def run(call: Any, name: bytes, part: Part, rows: int, x: np.ndarray, y: np.ndarray) -> float:
    """Multiply `rows` rows with all weights of a part, and return the seconds."""
    for product in part.products:
        product.rows = rows
        product.x = x.ctypes.data
        product.y = y.ctypes.data
    pointers = [ctypes.byref(product) for product in part.products]
    began = thread_time()
    for pointer in pointers:
        call(name, pointer)
    return thread_time() - began


def measure(libraries: list[Path], rounds: int, most: int, name: str) -> list[dict[str, Any]]:
    """Return milliseconds by library, part and number of rows."""
    memory = Memory(600 << 20)
    parts = [
        part(memory, "int4 layers", 4, LAYERS, LAYER),
        part(memory, "int8 layers", 8, LAYERS, LAYER),
        part(memory, "int8 head", 8, 1, HEAD),
    ]
    calls = [ctypes.CDLL(str(path)).freeexport_packed_linear for path in libraries]
    x = np.random.default_rng(0).standard_normal((most, 1536), np.float32)
    seconds: dict[tuple[int, str, int], list[float]] = defaultdict(list)
    stream: dict[str, list[float]] = defaultdict(list)
    begins = np.cumsum([0] + [item.bytes for item in parts])
    for item in parts:
        for rows in range(1, most + 1):
            results = []
            for call in calls:
                y = np.zeros((most, max(item.outputs)), np.float32)
                for product in item.products:
                    run(call, name.encode(), item._replace(products=[product]), rows, x, y)
                    results.append(y.tobytes())
            half = len(results) // len(calls)
            if results[:half] != results[-half:]:
                raise click.ClickException(f"{item.name}: results of {rows} rows differ")
    for _ in range(rounds):
        for item, begin in zip(parts, begins, strict=False):
            words = memory.whole[begin : begin + item.bytes // 64 * 64].view(np.uint64)
            began = thread_time()
            words.max()
            stream[item.name].append(thread_time() - began)
            for rows in range(1, most + 1):
                for library, call in enumerate(calls):
                    y = np.zeros((most, max(item.outputs)), np.float32)
                    taken = run(call, name.encode(), item, rows, x, y)
                    seconds[library, item.name, rows].append(taken)

    def quick(times: list[float]) -> float:
        return round(1000 * float(np.quantile(times, QUANTILE)), 3)

    return [
        {
            "part": item.name,
            "library": library,
            "megabytes": round(item.bytes / 1e6, 1),
            "stream": quick(stream[item.name]),
            "rows": {
                rows: quick(seconds[library, item.name, rows]) for rows in range(1, most + 1)
            },
        }
        for item in parts
        for library in range(len(libraries))
    ]


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--against", type=click.Path(path_type=Path), help="Library to compare with.")
@click.option("--rounds", default=40, type=click.IntRange(1), help="Rounds.")
@click.option("--rows", default=8, type=click.IntRange(1), help="Maximum number of rows.")
@click.option("--instructions", "name", help="Instruction set. [default: the best]")
@click.option("--save", type=click.Path(path_type=Path), help="JSON file to write.")
def main(
    against: Path | None, rounds: int, rows: int, name: str | None, save: Path | None
) -> None:
    libraries = [LIBRARY, *([against] if against else [])]
    with other_load() as load:
        found = measure(libraries, rounds, rows, name or instructions())
    for row in found:
        first = row["rows"][1]
        each = [f"{taken:.2f} ({taken / first:.2f})" for taken in row["rows"].values()]
        label = "other" if row["library"] else "this"
        click.echo(
            f"{row['part']:12} {label:5} {row['megabytes'] / first:5.1f} GB/s, stream "
            f"{row['stream']:.2f} ms: " + " ".join(each)
        )
    if load_note(load.cores):
        click.echo(load_note(load.cores))
    if save is not None:
        content = {
            "environment": environment(),
            "busy_cores": round(load.cores, 2),
            "unit": "milliseconds of processor time",
            "rows": found,
        }
        write_whole(save, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run_tool(main)
