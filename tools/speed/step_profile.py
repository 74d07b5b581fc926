"""Where the time of a token goes in mode full: kernel by kernel, by ONNX Runtime's own profile.

    python -m tools.speed.step_profile BUNDLE [BUNDLE ...]

Each bundle decodes twice, on the engines that a session runs: as it is, for the seconds of a token and of its engine
calls, and with kernels noted. Noting takes longer than many a kernel, so what the fastest operator is noted with is
taken off each. What is then left of the engines' time is between kernels: handing out work to threads,
waking them, the executor. Run on an idle machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import click

from freeexport.system.idle import require_idle
from freeexport.system.machine import detect_machine
from runtime import Session
from runtime.engines import backend
from runtime.engines.onnx import OnnxEngine
from runtime.errors import OptionError
from runtime.machine.machine import usable_cores
from tools.speed.kernel_profile import KINDS, Step, read_step

ROUNDS = 5


@dataclass(frozen=True)
class Profile:
    """Seconds of a token (`token`), of its engine calls (`engines`, by name), and what these did (`steps`)."""

    name: str
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
@click.option("--force", is_flag=True, help="Measure on a busy machine.")
def main(
    bundles: tuple[Path, ...],
    context: int,
    tokens: int,
    threads: int | None,
    least: float,
    force: bool,
) -> None:
    if tokens < 4:
        raise OptionError(f"--tokens is {tokens}; take 4 or more, as the first of them bind and warm up")
    idle = require_idle(force)
    threads = threads or usable_cores()
    found = [profile(path, threads, context, tokens) for path in bundles]
    settings = {
        "cpu": detect_machine().cpu,
        "threads": threads,
        "context": context,
        "tokens": tokens,
        "onnxruntime": version("onnxruntime"),
        "idle": idle,
    }
    for item in found:
        click.echo(table(item, least / 100))
    click.echo(", ".join(f"{name} {value}" for name, value in settings.items()))


def profile(path: Path, threads: int, context: int, tokens: int) -> Profile:
    """Of a bundle. Raises what `Session` raises."""
    tokens_and_engines = _timed(path, threads, context, tokens)
    with tempfile.TemporaryDirectory() as directory:
        with _noting(Path(directory)) as engines, Session(path, slots=1, threads=threads) as session:
            session.generate(_prompt(context), mode="full", max_new_tokens=tokens, ignore_eos=True)
        files = {name: Path(engines[name].session.end_profiling()) for name in ("shallow", "deep")}
        steps = {name: read_step(file, tokens - 2) for name, file in files.items()}
    return Profile(path.name, tokens_and_engines.pop("token"), tokens_and_engines, steps)


def _timed(path: Path, threads: int, context: int, tokens: int) -> dict[str, float]:
    """Seconds of a token after the first, and of its engine calls: medians over rounds."""
    rounds = []
    with Session(path, slots=1, threads=threads) as session:
        for _ in range(ROUNDS + 1):
            stats = session.generate(_prompt(context), mode="full", max_new_tokens=tokens, ignore_eos=True).stats
            engines = {"shallow": stats.shallow_seconds, "deep": stats.deep_seconds}
            rounds.append({**engines, "token": sum(engines.values()) + stats.overhead_seconds})
    return {name: median(found[name] for found in rounds[1:]) / (tokens - 1) for name in rounds[0]}


@contextmanager
def _noting(directory: Path) -> Iterator[dict[str, OnnxEngine]]:
    """The engines that are loaded meanwhile, by their names; they write profiles into `directory`."""
    engines = {}

    def load(path: Path, *given: Any, **options: Any) -> OnnxEngine:
        engines[path.stem] = OnnxEngine(path, *given, profile=directory / path.stem, **options)
        return engines[path.stem]

    with mock.patch.object(backend, "OnnxEngine", load):
        yield engines


def _prompt(context: int) -> list[int]:
    return [5 + number % 7 for number in range(context)]


def table(found: Profile, least: float) -> str:
    """Microseconds a token: by engine and kind, then each kernel above `least` of all their time."""
    engines = sum(found.engines.values())
    lines = [
        f"{found.name}: a token {1e6 * found.token:.0f} us ({1 / found.token:.1f} tokens/s): "
        + ", ".join(f"{name} {1e6 * seconds:.0f}" for name, seconds in found.engines.items())
        + f", outside {1e6 * found.outside:.0f}"
    ]
    for kind in (*KINDS, "glue"):
        count = sum(kernel.count for step in found.steps.values() for kernel in step.kernels if kernel.kind == kind)
        seconds = sum(step.seconds(kind) for step in found.steps.values())
        lines.append(f"  {kind:14} {count:6.0f} kernels {1e6 * seconds:8.0f} us {seconds / engines:6.1%}")
    between = engines - found.kernels()
    lines.append(f"  {'between them':14} {'':14} {1e6 * between:8.0f} us {between / engines:6.1%}")
    for name, step in found.steps.items():
        lines.append(f"  {name}: noting a kernel took {1e6 * step.noting:.1f} us, taken off below")
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
