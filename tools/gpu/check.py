"""Checks that need a machine with a card, in one command of minutes.

    python -m tools.gpu.check --model CHECKPOINT --exit-layer 6 --output gpu-check.json

Steps: environment; correctness, tokens and exits against the CPU in fp32; lanes, tokens/s with overlap, steps run ahead
and CUDA graphs on and off; timeline, how many shallow steps lie within a deep pass, by events of the device. A step
that fails or cannot be done says why, and the others go on. Without a card the graphs for one run on the CPU.
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
PROMPTS = ("the cat sat on the mat", "a quick brown fox", "it was the best of times", "light travels faster than sound")
MODES: dict[str, dict[str, Any]] = {"full": {"mode": "full"}, "free": {"threshold": 0.5}, "exits": {"threshold": 0.0}}
# Session options, each compared with the first: the same tokens, at another speed.
LANES: dict[str, dict[str, Any]] = {
    "in turn": {"overlap": False, "cuda_graphs": False},
    "graphs": {"overlap": False, "cuda_graphs": True},
    "overlap": {"overlap": True, "cuda_graphs": False},
    "overlap, graphs": {"overlap": True, "cuda_graphs": True},
    "overlap, graphs, run ahead": {"overlap": True, "cuda_graphs": True, "run_ahead": True},
}


@dataclass
class Bench:
    """Shared by the steps. `exit_layer` None is that of the checkpoint's exit.json; bundles are made in `work`.
    `device` is None where no card works, for the reason `no_device`."""

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
                self.exit_layer, target=target, precision=precision, capacity=256, verify="none", measure=False
            )
            convert(str(self.model), path, options)
        return path

    def card(self) -> str:
        if self.device is None:
            raise DeviceError(self.no_device)
        return self.device


def environment(bench: Bench) -> dict[str, Any]:
    """The report of `freeexport doctor`, and whether a CUDA device can be used through cuda-python."""
    return {**examine(), "device": bench.device or f"none: {bench.no_device}"}


def correctness(bench: Bench) -> dict[str, Any]:
    """Shares of prompts with the tokens and exits of the CPU in fp32. AssertionError where fp32 has other tokens."""
    want = _decoded(bench.bundle("cpu", "fp32"), "cpu")
    found: dict[str, Any] = {"where": bench.device or "the graphs of target cuda, on the CPU provider"}
    for precision in ("fp32", "fp16") if bench.device else ("fp32",):
        got = _decoded(bench.bundle("cuda", precision), bench.device or "cpu")
        shares = (sum(a[part] == b[part] for a, b in zip(got, want, strict=True)) / len(want) for part in (0, 1))
        found[precision] = dict(zip(("tokens", "exits"), shares, strict=True))
    if found["fp32"]["tokens"] < 1.0:
        raise AssertionError(f"tokens in fp32 are not those of the CPU: {found}")
    return found


def lanes(bench: Bench) -> dict[str, Any]:
    """Tokens/s by mode in each of LANES, the median of three runs after one, and of the CPU in fp32."""
    device, path, tokens = bench.card(), bench.bundle("cuda", "fp16"), None
    found: dict[str, Any] = {}
    for name, options in LANES.items():
        with Session(path, device=device, **options) as session:
            found[name], got = _speeds(session, bench.tokens)
        tokens = tokens or got
        if got != tokens:
            raise AssertionError(f"{name!r} gives other tokens than 'in turn'")
    with Session(bench.bundle("cpu", "fp32")) as session:
        found["cpu, fp32"], _ = _speeds(session, bench.tokens)
    return found


def timeline(bench: Bench) -> dict[str, Any]:
    """How many shallow steps lie within a deep pass that is under way, with overlap; the first calls in order."""
    with Session(bench.bundle("cuda", "fp16"), device=bench.card(), overlap=True, slots=1) as session:
        options: dict[str, Any] = {"threshold": 0.3, "max_new_tokens": bench.tokens, "ignore_eos": True}
        session.generate(PROMPTS[0], **options)
        with session.decoder() as decoder:
            shallow, deep = decoder.runners
        assert isinstance(shallow, CudaRunner)
        assert isinstance(deep, CudaRunner)
        origin = shallow.stream.cuda.event(timed=True)
        shallow.stream.record(origin)
        steps, passes = shallow.watch(origin), deep.watch(origin)
        session.generate(PROMPTS[0], **options)
    calls = sorted([(*step, "shallow") for step in steps] + [(*call, "deep") for call in passes])
    return {
        "shallow steps": len(steps),
        "deep passes": len(passes),
        "steps inside a pass": sum(any(b <= step[0] and step[1] <= e for b, e in passes) for step in steps),
        "milliseconds": {
            name: round(1e3 * median([end - begin for begin, end in calls] or [0.0]), 3)
            for name, calls in (("step", steps), ("pass", passes))
        },
        "first calls": [[name, round(1e3 * begin, 3), round(1e3 * end, 3)] for begin, end, name in calls[:40]],
    }


STEPS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    step.__name__: step for step in (environment, correctness, lanes, timeline)
}


def _decoded(path: Path, device: str) -> list[tuple[Sequence[int], Sequence[bool]]]:
    with Session(path, device=device) as session:
        results = [session.generate(prompt, mode="free", max_new_tokens=48, threshold=0.5) for prompt in PROMPTS]
    return [(result.token_ids, result.exited) for result in results]


def _speeds(session: Session, tokens: int) -> tuple[dict[str, float], list[Sequence[int]]]:
    """Tokens/s by mode, and the tokens of each."""
    found, ids = {}, list[Sequence[int]]()
    for name, options in MODES.items():
        given: dict[str, Any] = {"mode": "free", **options, "max_new_tokens": tokens, "ignore_eos": True}
        results = [session.generate(PROMPTS[0], **given) for _ in range(4)]
        found[name] = round(median(result.stats.tokens / result.stats.seconds for result in results[1:]), 1)
        ids.append(results[-1].token_ids)
    return found, ids


def usable(device: str) -> tuple[str | None, str]:
    """The device, or None and why sessions cannot run on it here."""
    try:
        wanted = Device.parse(device)
        if wanted.index is None:
            raise click.UsageError("--device cpu is no card; leave it out")
        Cuda(wanted.index).close()
        wanted.providers(import_onnxruntime(), {})
    except FreeExportError as error:
        return None, str(error)
    return str(wanted), ""


def run(bench: Bench, name: str) -> dict[str, Any]:
    """The result of a step, or why it has none."""
    click.echo(f"{name} ...", err=True)
    try:
        return {"state": "done", "found": STEPS[name](bench)}
    except Exception as error:  # the other steps are worth having whatever this one met
        if isinstance(error, DeviceError) and bench.device is None:
            return {"state": "not done", "why": str(error)}
        return {"state": "failed", "why": f"{type(error).__name__}: {str(error)[:500]}"}


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--model", type=click.Path(path_type=Path, exists=True), default=DEMO, help="A checkpoint.")
@click.option("--exit-layer", type=click.IntRange(1), help="[default: that of its exit.json]")
@click.option("--device", default="cuda:0")
@click.option("--tokens", type=click.IntRange(8), help="A run.  [default: 200, without a card 40]")
@click.option("--output", type=click.Path(path_type=Path), help="Write the report as JSON here.")
def main(model: Path, exit_layer: int | None, device: str, tokens: int | None, output: Path | None) -> None:
    found, why = usable(device)
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(model, Path(directory), tokens or (200 if found else 40), exit_layer, found, why)
        steps = {name: run(bench, name) for name in STEPS}
    report = {"card": found or "no card was found", "why": why, "model": model.name, "steps": steps}
    text = json.dumps(report, indent=2)
    click.echo(text)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    sys.exit(1 if any(step["state"] == "failed" for step in steps.values()) else 0)


if __name__ == "__main__":
    main()
