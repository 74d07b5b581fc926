"""Profiles the kernels of a token in mode full, with the profiler of ONNX Runtime.

    python -m tools.token_profile BUNDLE [BUNDLE ...]

Each bundle decodes twice: without the profiler, to time a token and its engine calls, and with it.
Timing a kernel takes longer than many kernels, so the time of the fastest operator, such as a
reshape, is subtracted from each kernel. The remaining time of the engines is spent between kernels:
on distributing work, waking threads and the executor. The time to open a session is printed as
well. Run from the root of the repository on an idle machine.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple
from unittest import mock

import click

from freeexport.system.environment import about, environment
from freeexport.system.load import load_note, other_load
from runtime import Session
from runtime.engines import backend
from runtime.engines.onnx import OnnxEngine
from runtime.errors import OptionError
from runtime.machine.machine import usable_cores

ROUNDS = 5
PRODUCTS = (
    *("PackedLinear", "MatMulNBits", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
    *("MatMul", "FusedMatMul", "Gemm"),
)
ATTENTION = (
    "CachedAttention",
    "CappedAttention",
    "HalfAttention",
    "Int8Attention",
    "CrossAttention",
    "HalfCrossAttention",
    "CappedCrossAttention",
    "EncoderAttention",
    "GroupQueryAttention",
    "MultiHeadAttention",
    "Attention",
    "Softmax",
)
KINDS = {
    **dict.fromkeys(PRODUCTS, "products"),
    **dict.fromkeys(ATTENTION, "attention"),
    **dict.fromkeys(("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"), "norms"),
    **dict.fromkeys(
        ("Predict", "BestTwo", "LogSoftmax", "TopK", "ArgMax", "GatherElements"), "best tokens"
    ),
}


class Kernel(NamedTuple):
    """Kernels of one operator in an engine call.

    Attributes:
        operator: Type of the operator.
        shape: Shape of a matrix product, "" for other operators.
        per_call: Number of kernels per call.
        seconds: Seconds of all of them.
    """

    operator: str
    shape: str
    per_call: float
    seconds: float

    @property
    def kind(self) -> str:
        return KINDS.get(self.operator, "glue")


class BundleProfile(NamedTuple):
    """Time per token of a bundle, by engine and kernel.

    Attributes:
        name: Name of the bundle.
        opened: Seconds to open a session.
        token: Seconds per token.
        engines: Seconds per token in each engine.
        kernels: Kernels of each engine.
        noting: Seconds that timing one kernel takes, by engine. Already subtracted from `kernels`.
    """

    name: str
    opened: float
    token: float
    engines: dict[str, float]
    kernels: dict[str, list[Kernel]]
    noting: dict[str, float]


def calls(events: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group kernel events by engine call, in order."""
    calls_of: list[list[dict[str, Any]]] = []
    noted: list[dict[str, Any]] = []
    for event in sorted(events, key=lambda event: event["ts"] + event.get("dur", 0)):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            noted.append(event)
        elif event["name"] == "model_run":
            calls_of.append(noted)
            noted = []
    return calls_of


def typical(calls_of: Sequence[Sequence[dict[str, Any]]]) -> tuple[list[Kernel], float]:
    """Return the kernels of the median call, slowest first, and the seconds that timing one takes.

    The latter is estimated as the time of the fastest operator in every call, which does almost
    nothing, and is subtracted from the kernels.
    """
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    counts: dict[tuple[str, str], int] = defaultdict(int)
    each: dict[str, list[float]] = defaultdict(list)
    for call in calls_of:
        sums: dict[tuple[str, str], float] = defaultdict(float)
        for event in call:
            operator = event["args"]["op_name"]
            seconds = event["dur"] * 1e-6
            sums[operator, _shape(event["args"])] += seconds
            counts[operator, _shape(event["args"])] += 1
            each[operator].append(seconds)
        for key, total in sums.items():
            times[key].append(total)
    noting = min(
        (median(durations) for durations in each.values() if len(durations) >= len(calls_of)),
        default=0.0,
    )
    kernels = []
    for key, totals in times.items():
        count = counts[key] / len(calls_of)
        kernels.append(Kernel(*key, count, max(0.0, median(totals) - noting * count)))
    return sorted(kernels, key=lambda kernel: -kernel.seconds), noting


def _shape(noted: dict[str, Any]) -> str:
    """Format the inputs -> outputs of a product. Shapes of other operators change between calls."""
    if noted["op_name"] not in PRODUCTS:
        return ""
    shapes = [noted.get(f"{side}_type_shape") or [{"": []}] for side in ("input", "output")]
    first = [next(iter(shape[0].values())) for shape in shapes]
    return " -> ".join(str(dimensions[-1]) if dimensions else "?" for dimensions in first)


def profile(path: Path, threads: int, context: int, tokens: int) -> BundleProfile:
    """Profile a bundle. Seconds are medians over rounds, per token after the first."""
    prompt = [5 + number % 7 for number in range(context)]
    options: dict[str, Any] = {"mode": "full", "max_new_tokens": tokens, "ignore_eos": True}
    began = perf_counter()
    with Session(path, slots=1, threads=threads, draft_memory_mb=0, prefix_cache_mb=0) as session:
        opened = perf_counter() - began
        rounds = [session.generate(prompt, **options).stats for _ in range(ROUNDS + 1)][1:]
    engines = {
        "shallow": median(stats.shallow_seconds for stats in rounds) / (tokens - 1),
        "deep": median(stats.deep_seconds for stats in rounds) / (tokens - 1),
    }
    whole = median(
        stats.shallow_seconds + stats.deep_seconds + stats.overhead_seconds for stats in rounds
    )
    loaded: dict[str, OnnxEngine] = {}
    with tempfile.TemporaryDirectory() as directory:

        def load(engine: Path, threads: int, **named: Any) -> OnnxEngine:
            loaded[engine.stem] = OnnxEngine(
                engine, threads, profile=Path(directory) / engine.stem, **named
            )
            return loaded[engine.stem]

        with (
            mock.patch.object(backend, "OnnxEngine", load),
            Session(path, slots=1, threads=threads, draft_memory_mb=0) as session,
        ):
            session.generate(prompt, **options)
        kernels = {}
        noting = {}
        for name in engines:
            events = json.loads(
                Path(loaded[name].session.end_profiling()).read_text(encoding="utf-8")
            )
            # Skip the calls that bind and warm up.
            kernels[name], noting[name] = typical(calls(events)[2 - tokens :])
    return BundleProfile(path.name, opened, whole / (tokens - 1), engines, kernels, noting)


def format_profile(profile: BundleProfile, least: float) -> str:
    """Format microseconds per token by engine and kind, and the kernels above a share `least`."""
    engines = sum(profile.engines.values())
    every = [kernel for kernels in profile.kernels.values() for kernel in kernels]
    timed = sum(kernel.seconds for kernel in every)
    lines = [
        f"{profile.name}: a token {1e6 * profile.token:.0f} us ({1 / profile.token:.1f} tokens/s): "
        + ", ".join(f"{name} {1e6 * seconds:.0f}" for name, seconds in profile.engines.items())
        + f", outside {1e6 * (profile.token - engines):.0f}; opened in {profile.opened:.2f} s"
    ]
    for kind in (*dict.fromkeys(KINDS.values()), "glue"):
        count = sum(kernel.per_call for kernel in every if kernel.kind == kind)
        seconds = sum(kernel.seconds for kernel in every if kernel.kind == kind)
        lines.append(
            f"  {kind:14} {count:6.0f} kernels {1e6 * seconds:8.0f} us {seconds / engines:6.1%}"
        )
    between = engines - timed
    lines.append(f"  {'between them':14} {'':14} {1e6 * between:8.0f} us {between / engines:6.1%}")
    for name, kernels in profile.kernels.items():
        lines.append(
            f"  {name}: timing a kernel took {1e6 * profile.noting[name]:.1f} us, subtracted below"
        )
        for operator, shape, count, seconds in kernels:
            if seconds >= least * timed:
                each = f"{1e6 * seconds / count:8.1f} us each"
                lines.append(
                    f"    {operator:33} {shape:16} {count:5.0f} {each} {1e6 * seconds:8.0f} us"
                )
    return "\n".join(lines)


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--context", default=64, help="Tokens of the prompt.")
@click.option("--tokens", default=64, help="Tokens after it.")
@click.option("--threads", type=int, help="[default: one for each physical core]")
@click.option(
    "--least", default=1.0, help="Percent of the kernels' time below which none is listed."
)
def main(
    bundles: tuple[Path, ...], context: int, tokens: int, threads: int | None, least: float
) -> None:
    if tokens < 4:
        raise OptionError(
            f"--tokens is {tokens}; take 4 or more, as the first of them bind and warm up"
        )
    threads = threads or usable_cores()
    with other_load() as load:
        profiles = [profile(path, threads, context, tokens) for path in bundles]
    for item in profiles:
        click.echo(format_profile(item, least / 100))
    for name, text in about(environment(), threads):
        click.echo(f"{name}: {text}")
    if load_note(load.cores):
        click.echo(load_note(load.cores))


if __name__ == "__main__":
    main()
