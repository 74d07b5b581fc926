"""The kernels in ONNX Runtime's profile of a session: how many ran in a step, and how long."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

# Kinds of kernels by their operators; what stands in none of them is glue.
KINDS = {
    "products": (
        "PackedLinear",
        "MatMulNBits",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "MatMul",
        "FusedMatMul",
        "Gemm",
    ),
    "attention": (
        "CachedAttention",
        "CrossAttention",
        "GroupQueryAttention",
        "MultiHeadAttention",
        "Attention",
        "Softmax",
    ),
    "norms": ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"),
    "best tokens": ("BestTwo", "LogSoftmax", "TopK", "ArgMax", "GatherElements"),
}


@dataclass(frozen=True)
class Kernel:
    """An operator: `count` of them in a step, and `seconds` of all of them. Products are told apart by `shape`."""

    operator: str
    shape: str
    count: float
    seconds: float

    @property
    def kind(self) -> str:
        return next((kind for kind, operators in KINDS.items() if self.operator in operators), "glue")


@dataclass(frozen=True)
class Step:
    """The typical call of an engine: its kernels, slowest first, and `noting`, the seconds that those of the fastest
    operator that is in every call were noted with: a reshape or the like does next to nothing, so kernels
    are shorter by that where nobody takes notes."""

    kernels: tuple[Kernel, ...]
    noting: float

    @property
    def count(self) -> float:
        return sum(kernel.count for kernel in self.kernels)

    def seconds(self, kind: str | None = None) -> float:
        """Of one kind, or of all, without what noting them cost."""
        return sum(self.own(kernel) for kernel in self.kernels if kind in (None, kernel.kind))

    def own(self, kernel: Kernel) -> float:
        return max(0.0, kernel.seconds - self.noting * kernel.count)


def read_step(profile: Path, last: int) -> Step:
    """The typical one of the last calls in a profile, by the median of each kind of kernel."""
    return typical(calls(json.loads(profile.read_text(encoding="utf-8")))[-last:])


def calls(events: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The kernels of each call, in order."""
    found: list[list[dict[str, Any]]] = []
    noted: list[dict[str, Any]] = []
    for event in sorted(events, key=lambda event: event["ts"] + event.get("dur", 0)):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            noted.append(event)
        elif event["name"] == "model_run":
            found.append(noted)
            noted = []
    return found


def typical(found: Sequence[Sequence[dict[str, Any]]]) -> Step:
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    counts: dict[tuple[str, str], int] = defaultdict(int)
    each: dict[str, list[float]] = defaultdict(list)
    for call in found:
        sums: dict[tuple[str, str], float] = defaultdict(float)
        for event in call:
            operator, seconds = event["args"]["op_name"], event["dur"] * 1e-6
            sums[operator, _shape(event)] += seconds
            counts[operator, _shape(event)] += 1
            each[operator].append(seconds)
        for key, total in sums.items():
            times[key].append(total)
    kernels = [Kernel(*key, counts[key] / len(found), median(totals)) for key, totals in times.items()]
    kernels.sort(key=lambda kernel: -kernel.seconds)
    always = [median(durations) for durations in each.values() if len(durations) >= len(found)]
    return Step(tuple(kernels), min(always, default=0.0))


def _shape(event: dict[str, Any]) -> str:
    """Inputs -> outputs of a product. Other shapes change from step to step."""
    if event["args"]["op_name"] not in KINDS["products"]:
        return ""
    first = [_dimensions(event["args"].get(f"{side}_type_shape") or []) for side in ("input", "output")]
    return " -> ".join(str(dimensions[-1]) if dimensions else "?" for dimensions in first)


def _dimensions(shapes: list[dict[str, list[int]]]) -> list[int]:
    return next(iter(shapes[0].values())) if shapes else []
