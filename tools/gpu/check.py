"""Run all checks that need a GPU, in one command of a few minutes.

    python -m tools.gpu.check --model CHECKPOINT --exit-layer 6 --output gpu-check.json

There are four steps. "environment" reports what `freeexport doctor` does. "correctness" compares
tokens and exits with the CPU in fp32. "lanes" measures tokens/s with overlap and CUDA graphs,
on and off. "timeline" counts the shallow steps that run during a deep pass, by events of the
device.

A step that fails or cannot run reports why, and the others continue. Without a GPU, the graphs for
one run on the CPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click

from freeexport.commands.doctor import examine
from freeexport.conversion.convert import convert
from freeexport.conversion.options import ConvertOptions
from runtime import Session
from runtime.cuda.driver import Cuda
from runtime.cuda.runner import CudaRunner
from runtime.engines.onnx import import_onnxruntime
from runtime.errors import DeviceError, FreeExportError
from runtime.machine.device import Device

DEMO = Path(__file__).parents[2] / "freeexport" / "data" / "g2p"
PROMPTS = (
    "the cat sat on the mat",
    "a quick brown fox",
    "it was the best of times",
    "light travels faster than sound",
)
MODES: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "free": {"threshold": 0.5},
    "exits": {"threshold": 0.0},
}
# Session options. Each must give the tokens of the first, at another speed.
LANES: dict[str, dict[str, Any]] = {
    "in turn": {"overlap": False, "cuda_graphs": False},
    "graphs": {"overlap": False, "cuda_graphs": True},
    "overlap": {"overlap": True, "cuda_graphs": False},
    "overlap, graphs": {"overlap": True, "cuda_graphs": True},
}


@dataclass
class Bench:
    """Shared by the steps.

    Attributes:
        model: The checkpoint.
        work: Directory for bundles.
        tokens: Tokens per run.
        exit_layer: Exit layer. Default: that of the checkpoint's exit.json.
        device: The GPU. None if none works.
        no_device: Why none works.
    """

    model: Path
    work: Path
    tokens: int
    exit_layer: int | None = None
    device: str | None = None
    no_device: str = ""

    def bundle(self, target: Any, precision: Any) -> Path:
        path = self.work / f"{target}-{precision}"
        if not path.exists():
            options = ConvertOptions(
                self.exit_layer,
                target=target,
                precision=precision,
                capacity=256,
                verify="none",
                measure=False,
            )
            convert(str(self.model), path, options)
        return path

    def card(self) -> str:
        if self.device is None:
            raise DeviceError(self.no_device)
        return self.device


def environment(bench: Bench) -> dict[str, Any]:
    """Return the report of `freeexport doctor`, and the usable CUDA device."""
    return {**examine(), "device": bench.device or f"none: {bench.no_device}"}


def correctness(bench: Bench) -> dict[str, Any]:
    """Return the share of prompts with the same tokens, and the same exits, as on the CPU in fp32.

    Raises:
        AssertionError: If fp32 gives other tokens.
    """
    want = _decoded(bench.bundle("cpu", "fp32"), "cpu")
    result: dict[str, Any] = {
        "where": bench.device or "the graphs of target cuda, on the CPU provider"
    }
    for precision in ("fp32", "fp16") if bench.device else ("fp32",):
        got = _decoded(bench.bundle("cuda", precision), bench.device or "cpu")
        pairs = list(zip(got, want, strict=True))
        same_tokens = sum(ours[0] == theirs[0] for ours, theirs in pairs)
        same_exits = sum(ours[1] == theirs[1] for ours, theirs in pairs)
        result[precision] = {
            "tokens": same_tokens / len(want),
            "exits": same_exits / len(want),
        }
    if result["fp32"]["tokens"] < 1.0:
        raise AssertionError(f"tokens in fp32 differ from those of the CPU: {result}")
    return result


def lanes(bench: Bench) -> dict[str, Any]:
    """Return tokens/s by mode for each of LANES, and for the CPU in fp32.

    Values are medians of three runs after a warm-up run.

    Raises:
        AssertionError: If a lane gives other tokens.
    """
    device = bench.card()
    path = bench.bundle("cuda", "fp16")
    tokens = None
    result: dict[str, Any] = {}
    for name, options in LANES.items():
        with Session(path, device=device, **options) as session:
            result[name], got = _speeds(session, bench.tokens)
        tokens = tokens or got
        if got != tokens:
            raise AssertionError(f"{name!r} does not give the tokens of 'in turn'")
    with Session(bench.bundle("cpu", "fp32")) as session:
        result["cpu, fp32"], _ = _speeds(session, bench.tokens)
    return result


def timeline(bench: Bench) -> dict[str, Any]:
    """Return the number of shallow steps that run during a deep pass, and the first calls in order.

    Decodes with overlap.
    """
    path = bench.bundle("cuda", "fp16")
    with Session(path, device=bench.card(), overlap=True, slots=1) as session:
        options: dict[str, Any] = {
            "threshold": 0.3,
            "max_new_tokens": bench.tokens,
            "ignore_eos": True,
        }
        session.generate(PROMPTS[0], **options)
        with session.decoder() as decoder:
            shallow, deep = decoder.runners
        assert isinstance(shallow, CudaRunner)
        assert isinstance(deep, CudaRunner)
        origin = shallow.stream.cuda.event(timed=True)
        shallow.stream.record(origin)
        steps = shallow.watch(origin)
        passes = deep.watch(origin)
        session.generate(PROMPTS[0], **options)
    calls = sorted([(*step, "shallow") for step in steps] + [(*call, "deep") for call in passes])
    inside = sum(
        any(begin <= step[0] and step[1] <= end for begin, end in passes) for step in steps
    )
    first = [[name, round(1e3 * begin, 3), round(1e3 * end, 3)] for begin, end, name in calls[:40]]
    return {
        "shallow steps": len(steps),
        "deep passes": len(passes),
        "steps inside a pass": inside,
        "milliseconds": {
            name: round(1e3 * median([end - begin for begin, end in calls] or [0.0]), 3)
            for name, calls in (("step", steps), ("pass", passes))
        },
        "first calls": first,
    }


STEPS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    step.__name__: step for step in (environment, correctness, lanes, timeline)
}


def _decoded(path: Path, device: str) -> list[tuple[Sequence[int], Sequence[bool]]]:
    with Session(path, device=device) as session:
        results = [
            session.generate(prompt, mode="free", max_new_tokens=48, threshold=0.5)
            for prompt in PROMPTS
        ]
    return [(result.token_ids, result.exited) for result in results]


def _speeds(session: Session, tokens: int) -> tuple[dict[str, float], list[Sequence[int]]]:
    """Return tokens/s by mode, and the tokens of each mode."""
    found = {}
    ids = list[Sequence[int]]()
    for name, options in MODES.items():
        given: dict[str, Any] = {
            "mode": "free",
            **options,
            "max_new_tokens": tokens,
            "ignore_eos": True,
        }
        results = [session.generate(PROMPTS[0], **given) for _ in range(4)]
        speeds = [result.stats.tokens / result.stats.seconds for result in results[1:]]
        found[name] = round(median(speeds), 1)
        ids.append(results[-1].token_ids)
    return found, ids


def usable(device: str) -> tuple[str | None, str]:
    """Return the device, or None and why sessions cannot run on it."""
    try:
        wanted = Device.parse(device)
        if wanted.index is None:
            raise click.UsageError("--device cpu is not a GPU; leave it out")
        Cuda(wanted.index).close()
        wanted.providers(import_onnxruntime(), {})
    except FreeExportError as error:
        return None, str(error)
    return str(wanted), ""


def run_step(bench: Bench, name: str) -> dict[str, Any]:
    """Run a step. Returns its result, or why it has none."""
    click.echo(f"{name} ...", err=True)
    try:
        return {"state": "done", "found": STEPS[name](bench)}
    except Exception as error:  # the other steps run anyway
        if isinstance(error, DeviceError) and bench.device is None:
            return {"state": "not done", "why": str(error)}
        return {"state": "failed", "why": f"{type(error).__name__}: {str(error)[:500]}"}


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True),
    default=DEMO,
    help="Checkpoint to convert.",
)
@click.option(
    "--exit-layer",
    type=click.IntRange(1),
    help="Decoder layers before the exit.  [default: from exit.json]",
)
@click.option("--device", default="cuda:0", help="CUDA device.")
@click.option(
    "--tokens",
    type=click.IntRange(8),
    help="Tokens per run.  [default: 200, or 40 without a GPU]",
)
@click.option("--output", type=click.Path(path_type=Path), help="File for the report, as JSON.")
def main(
    model: Path, exit_layer: int | None, device: str, tokens: int | None, output: Path | None
) -> None:
    found, why = usable(device)
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(
            model,
            Path(directory),
            tokens=tokens or (200 if found else 40),
            exit_layer=exit_layer,
            device=found,
            no_device=why,
        )
        steps = {name: run_step(bench, name) for name in STEPS}
    report = {"card": found or "no card was found", "why": why, "model": model.name, "steps": steps}
    text = json.dumps(report, indent=2)
    click.echo(text)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    sys.exit(1 if any(step["state"] == "failed" for step in steps.values()) else 0)


if __name__ == "__main__":
    main()
