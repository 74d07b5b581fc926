"""Profiles a token in mode full, kernel by kernel, by ONNX Runtime's own profile.

    python -m tools.token_profile BUNDLE [BUNDLE ...]

Each bundle decodes twice, on the engines that a session runs: as it is, for the seconds of a token and of its engine
calls, and with kernels timed. Timing a kernel takes longer than many a kernel, so the time of the fastest operator, a
reshape or the like, is subtracted from each. The rest of the engines' time is between kernels: handing out work to
threads, waking them, the executor. Seconds to open a session are printed as well. Run from the root on an idle machine.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest import mock

import click

from freeexport.measure.table import about, environment
from freeexport.measure.timing import load_note, other_load
from runtime import Session
from runtime.engines import backend
from runtime.engines.onnx import OnnxEngine
from runtime.errors import OptionError
from runtime.machine.machine import usable_cores

ROUNDS = 5
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
    """The typical call of an engine: its kernels, slowest first, and `noting`, the seconds that timing a kernel adds,
    those of the fastest operator that is in every call, which does next to nothing."""

    kernels: tuple[Kernel, ...]
    noting: float

    @property
    def count(self) -> float:
        return sum(kernel.count for kernel in self.kernels)

    def seconds(self, kind: str | None = None) -> float:
        """Add up one kind of kernels, or all, without what timing them cost."""
        return sum(self.own(kernel) for kernel in self.kernels if kind in (None, kernel.kind))

    def own(self, kernel: Kernel) -> float:
        return max(0.0, kernel.seconds - self.noting * kernel.count)


def read_step(profile: Path, last: int) -> Step:
    """Read the typical one of the last calls in a profile, by the median of each kind of kernel."""
    return typical(calls(json.loads(profile.read_text(encoding="utf-8")))[-last:])


def calls(events: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group the kernels by call, in order."""
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
    """Compute the median call."""
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
    """Show inputs -> outputs of a product; other shapes change from step to step."""
    if event["args"]["op_name"] not in KINDS["products"]:
        return ""
    first = [_dimensions(event["args"].get(f"{side}_type_shape") or []) for side in ("input", "output")]
    return " -> ".join(str(dimensions[-1]) if dimensions else "?" for dimensions in first)


def _dimensions(shapes: list[dict[str, list[int]]]) -> list[int]:
    return next(iter(shapes[0].values())) if shapes else []


@dataclass(frozen=True)
class Profile:
    """Seconds to open a session and of a token, of its engine calls by name, and the kernels of these."""

    name: str
    open: float
    token: float
    engines: Mapping[str, float]
    steps: Mapping[str, Step]

    @property
    def outside(self) -> float:
        return self.token - sum(self.engines.values())

    def kernels(self) -> float:
        return sum(step.seconds() for step in self.steps.values())


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--context", default=64, help="Tokens of the prompt.")
@click.option("--tokens", default=64, help="Tokens after it.")
@click.option("--threads", type=int, help="[default: one for each physical core]")
@click.option("--least", default=1.0, help="Percent of the kernels' time below which none is listed.")
def main(bundles: tuple[Path, ...], context: int, tokens: int, threads: int | None, least: float) -> None:
    if tokens < 4:
        raise OptionError(f"--tokens is {tokens}; take 4 or more, as the first of them bind and warm up")
    threads = threads or usable_cores()
    with other_load() as load:
        found = [profile(path, threads, context, tokens) for path in bundles]
    for item in found:
        click.echo(table(item, least / 100))
    for name, text in about(environment(), threads):
        click.echo(f"{name}: {text}")
    if load_note(load.cores):
        click.echo(load_note(load.cores))


def profile(path: Path, threads: int, context: int, tokens: int) -> Profile:
    """Profile a bundle. Raises what `Session` raises."""
    times = _timed(path, threads, context, tokens)
    with tempfile.TemporaryDirectory() as directory:
        with _profiled(Path(directory)) as engines, Session(path, slots=1, threads=threads) as session:
            session.generate(_prompt(context), mode="full", max_new_tokens=tokens, ignore_eos=True)
        files = {name: Path(engines[name].session.end_profiling()) for name in ("shallow", "deep")}
        steps = {name: read_step(file, tokens - 2) for name, file in files.items()}
    return Profile(path.name, times.pop("open"), times.pop("token"), times, steps)


def _timed(path: Path, threads: int, context: int, tokens: int) -> dict[str, float]:
    """Measure seconds to open a session, of a token after the first and of its engine calls: medians over rounds."""
    rounds = []
    began = perf_counter()
    with Session(path, slots=1, threads=threads) as session:
        opened = perf_counter() - began
        for _ in range(ROUNDS + 1):
            stats = session.generate(_prompt(context), mode="full", max_new_tokens=tokens, ignore_eos=True).stats
            engines = {"shallow": stats.shallow_seconds, "deep": stats.deep_seconds}
            rounds.append({**engines, "token": sum(engines.values()) + stats.overhead_seconds})
    each = {name: median(found[name] for found in rounds[1:]) / (tokens - 1) for name in rounds[0]}
    return {"open": opened, **each}


@contextmanager
def _profiled(directory: Path) -> Iterator[dict[str, OnnxEngine]]:
    """Load engines that write profiles into `directory`, by name."""
    engines = {}

    def load(path: Path, *given: Any, **options: Any) -> OnnxEngine:
        engines[path.stem] = OnnxEngine(path, *given, profile=directory / path.stem, **options)
        return engines[path.stem]

    with mock.patch.object(backend, "OnnxEngine", load):
        yield engines


def _prompt(context: int) -> list[int]:
    return [5 + number % 7 for number in range(context)]


def table(found: Profile, least: float) -> str:
    """Show microseconds a token: by engine and kind, then each kernel above `least` of all their time."""
    engines = sum(found.engines.values())
    lines = [
        f"{found.name}: a token {1e6 * found.token:.0f} us ({1 / found.token:.1f} tokens/s): "
        + ", ".join(f"{name} {1e6 * seconds:.0f}" for name, seconds in found.engines.items())
        + f", outside {1e6 * found.outside:.0f}; opened in {found.open:.2f} s"
    ]
    for kind in (*KINDS, "glue"):
        count = sum(kernel.count for step in found.steps.values() for kernel in step.kernels if kernel.kind == kind)
        seconds = sum(step.seconds(kind) for step in found.steps.values())
        lines.append(f"  {kind:14} {count:6.0f} kernels {1e6 * seconds:8.0f} us {seconds / engines:6.1%}")
    between = engines - found.kernels()
    lines.append(f"  {'between them':14} {'':14} {1e6 * between:8.0f} us {between / engines:6.1%}")
    for name, step in found.steps.items():
        lines.append(f"  {name}: timing a kernel took {1e6 * step.noting:.1f} us, subtracted below")
        for kernel in step.kernels:
            own = step.own(kernel)
            if own >= least * found.kernels():
                each = f"{1e6 * own / kernel.count:8.1f} us each" if kernel.count else ""
                lines.append(
                    f"    {kernel.operator:33} {kernel.shape:16} {kernel.count:5.0f} {each} {1e6 * own:8.0f} us"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
