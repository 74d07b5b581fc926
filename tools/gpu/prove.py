"""Prove on a GPU what can be proved only there, and write a report.

    python -m tools.gpu.prove --output DIR
    python -m tools.gpu.prove --output DIR --device cpu

The steps are the environment, ONNX Runtime's CUDA provider and TensorRT. Then, for each model in
fp16 and bf16: conversion, parity with torch, all modes, batches, calibration, CUDA graphs, overlap,
speed against eager PyTorch, sync_every, torch in the same process, TensorRT.

Each step runs in its own process with a time limit. report.md and report.json are written after
each, so they exist however far the run gets. A step that fails is recorded with its last lines, and
the next ones go on. Exits with code 1 if a step fails.

With --device cpu the same steps run on the CPU provider: everything but CUDA itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import click

from freeexport.checkpoints.checkpoint import smollm2
from freeexport.system.child import PACKAGES
from freeexport.system.output import OutputError, write_whole
from runtime.errors import FreeExportError, OptionError
from runtime.machine.device import Device
from runtime.placement import check_device
from tools.data.splits import run_tool
from tools.gpu.prove_report import BAD, report_text
from tools.gpu.prove_steps import FP32, HALF, MACHINE, STEPS, StepContext

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "freeexport" / "data" / "g2p"
FLAN_T5 = ROOT / "build" / "flan-t5-small"  # as written by tools.models.flan_t5
REPORT = "report.json"
LAST_LINES = 20
PRECISIONS = ("fp16", "bf16")


def default_models() -> list[Path]:
    """Return SmolLM2 and Flan-T5-small where they are installed, otherwise the demo model."""
    models = list[Path]()
    with suppress(FreeExportError):
        models.append(smollm2())
    if FLAN_T5.is_dir():
        models.append(FLAN_T5)
    return models or [DEMO]


def contexts(
    base: StepContext, models: Sequence[Path], precisions: Sequence[str]
) -> Iterator[tuple[str, StepContext]]:
    """Yield the names of all steps and what they work on, in order."""
    given = asdict(base)
    yield from ((name, base) for name in MACHINE)
    for model in models:
        # The stem of a file, and the whole name of a directory, which may contain dots.
        name = model.stem if model.is_file() else model.resolve().name
        each = given | {"model": str(model), "name": name}
        for step in FP32:
            yield step, StepContext(**each | {"precision": "fp32"})
        for precision in precisions:
            for step in HALF:
                yield step, StepContext(**each | {"precision": precision})


def run_step(name: str, context: StepContext, folder: Path, limit: float) -> dict[str, Any]:
    """Run a step in a child process. Returns its entry in the report."""
    entry: dict[str, Any] = {
        **{"model": context.name, "precision": context.precision, "step": name},
        **{"state": "error", "line": "", "seconds": 0.0},
        **{"columns": (), "rows": [], "values": {}, "last_lines": []},
    }
    if context.model and name != "conversion" and not context.bundle.exists():
        return entry | {"state": "not run", "line": "the conversion wrote no bundle"}
    given = folder / "context.json"
    result = folder / "result.json"
    log = folder / "log.txt"
    given.write_text(json.dumps(asdict(context)), encoding="utf-8")
    result.unlink(missing_ok=True)
    path = os.pathsep.join(filter(None, [PACKAGES, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "tools.gpu.prove_steps", name, str(given), str(result)]
    began = perf_counter()
    with open(log, "wb") as output:
        # Its own session, so that its children can be killed with it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path, "TQDM_DISABLE": "1"},
            start_new_session=True,
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            entry |= {"state": "timed out", "line": f"more than {limit:g} s"}
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    entry["seconds"] = perf_counter() - began
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if entry["state"] != "timed out" and process.returncode == 0 and result.is_file():
        return entry | json.loads(result.read_text(encoding="utf-8"))
    if entry["state"] != "timed out":
        code = process.returncode
        ended = f"signal {-code}" if code < 0 else f"exit code {code}"
        entry["line"] = f"{ended}: {lines[-1].strip()[:300] if lines else 'no output'}"
    return entry | {"last_lines": lines[-LAST_LINES:]}


def prove(
    base: StepContext,
    output: Path,
    models: Sequence[Path],
    precisions: Sequence[str],
    steps: Sequence[str],
    limit: float,
) -> dict[str, Any]:
    """Run the steps and write the report after each. Returns the report."""
    report: dict[str, Any] = {
        "device": base.device,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "models": [str(model) for model in models],
        "tokens": base.tokens,
        "rounds": base.rounds,
        "complete": False,
        "steps": [],
    }

    def write() -> None:
        write_whole(output / REPORT, json.dumps(report, indent=2) + "\n")
        write_whole(output / "report.md", report_text(report))

    output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="work-", dir=output) as work:
        given = StepContext(**asdict(base) | {"work": work})
        for name, context in contexts(given, models, precisions):
            needed = "against-cpu" in steps or context.precision != "fp32"
            if name not in steps or not needed:
                continue
            where = " ".join(filter(None, (context.name, context.precision)))
            click.echo(f"{name} {where}".strip(), err=True)
            entry = run_step(name, context, Path(work), limit)
            click.echo(f"  {entry['state']}, {entry['seconds']:.0f} s: {entry['line']}", err=True)
            report["steps"].append(entry)
            write()
    report["complete"] = True
    write()
    return report


def _chosen(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Parse comma-separated names of steps."""
    names = tuple(STEPS) if value is None else tuple(value.split(","))
    for name in names:
        if name not in STEPS:
            raise click.BadParameter(f"{name!r} is no step; choose from {', '.join(STEPS)}")
    # All other steps of a model need its bundle.
    needs = any(name not in MACHINE for name in names)
    return (*names, "conversion") if needs and "conversion" not in names else names


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Directory.")
@click.option(
    "--model",
    "models",
    type=click.Path(path_type=Path, exists=True),
    multiple=True,
    help=(
        "Checkpoint. May be repeated.  [default: SmolLM2 and build/flan-t5-small where installed, "
        "otherwise the demo model]"
    ),
)
@click.option(
    "--exit-layer",
    type=click.IntRange(1),
    help="Decoder layers before the exit.  [default: from exit.json, or a third of the layers]",
)
@click.option("--exit", help="Name or file of a ready-made exit.")
@click.option("--device", default="cuda:0", help="cuda:0, or cpu for everything but CUDA.")
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(PRECISIONS),
    multiple=True,
    default=PRECISIONS,
    help="May be repeated.",
)
@click.option("--steps", callback=_chosen, help="Comma-separated steps.  [default: all]")
@click.option("--tokens", type=click.IntRange(4, 400), default=128, help="Tokens per prompt.")
@click.option("--rounds", type=click.IntRange(1), default=5, help="Rounds of each measurement.")
@click.option(
    "--limit", type=click.FloatRange(1), default=900.0, help="Time limit of a step, in seconds."
)
@click.option("--overwrite", is_flag=True, help="Replace the report in --output.")
def command(
    output: Path,
    models: tuple[Path, ...],
    exit_layer: int | None,
    exit: str | None,
    device: str,
    precisions: tuple[str, ...],
    steps: tuple[str, ...],
    tokens: int,
    rounds: int,
    limit: float,
    overwrite: bool,
) -> None:
    place = Device.parse(device)
    check_device(place)
    if importlib.util.find_spec("torch") is None:
        raise OptionError("torch is not installed; run: pip install 'freeexport[convert]'")
    if (output / REPORT).exists() and not overwrite:
        raise OutputError(f"{output / REPORT} exists; choose another --output, or --overwrite")
    chosen = list(models) or default_models()
    if chosen == [DEMO] and not models:
        click.echo("note: SmolLM2 and Flan-T5-small are not installed; using the demo model")
    base = StepContext(str(place), "", tokens, rounds, exit_layer=exit_layer, exit=exit)
    report = prove(base, output, chosen, precisions, steps, limit)
    click.echo(f"{output}: report.md, {REPORT}")
    if any(step["state"] in BAD for step in report["steps"]):
        raise SystemExit(1)


if __name__ == "__main__":
    run_tool(command)
