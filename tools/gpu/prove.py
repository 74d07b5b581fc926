"""Prove on a GPU what can be proved only there, and write a page to commit.

    python -m tools.gpu.prove --output gpu
    python -m tools.gpu.prove --output cpu --device cpu --tokens 12 --rounds 1

The steps are those of `PLAN`: ONNX Runtime's CUDA provider and TensorRT with a model in fp32, fp16,
bf16, int8, int4 and fp8, a training step, a calibration, and rows of the paper's comparison.

Each step runs in its own process. The page, gpu.md in --output, is written after each, so it exists
however far the run gets. A step that fails is recorded with its last lines, and the next ones go
on. After --minutes no further step begins, and a running one ends. The same command continues with
these. Exits with code 1 if a step fails.

With --device cpu the same steps run on the CPU provider: everything but CUDA itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Any

import click

from freeexport.checkpoints.checkpoint import open_checkpoint, smollm2
from freeexport.demo import G2P
from freeexport.system.child import PACKAGES
from freeexport.system.environment import environment
from freeexport.system.output import write_whole
from freeexport.system.steps import Steps
from runtime.errors import FreeExportError, OptionError
from runtime.machine.device import Device
from runtime.requests.load_engines import check_device
from tools.data.splits import run_tool
from tools.gpu.prove_context import StepContext
from tools.gpu.prove_report import BAD, report_text
from tools.gpu.prove_steps import PLAN, STEPS, WITHOUT_BUNDLE

LAST_LINES = 20
RUN = "prove.json"
PAGE = "gpu.md"
# States of steps that the next run begins again.
UNFINISHED = ("not run", "timed out")


def default_model() -> Path:
    """Return SmolLM2 if it is installed, otherwise the demo model."""
    with suppress(FreeExportError):
        return smollm2()
    return G2P


def planned(base: StepContext, chosen: Sequence[str]) -> Iterator[tuple[str, StepContext]]:
    """Yield the names of the chosen steps and what they work on, in order.

    A bundle is converted before the first chosen step that needs it.
    """
    converted = set()
    for precision, steps in PLAN:
        context = replace(base, precision=precision)
        for step in steps:
            if step not in chosen:
                continue
            if step not in WITHOUT_BUNDLE and precision not in converted:
                converted.add(precision)
                yield "conversion", context
            yield step, context


def run_step(name: str, context: StepContext, limit: float) -> dict[str, Any]:
    """Run a step in a child process. Returns its entry in the report."""
    entry = {
        "precision": context.precision,
        "step": name,
        "state": "not run",
        "line": "",
        "seconds": 0.0,
        "columns": (),
        "rows": [],
        "values": {},
        "last_lines": [],
    }
    if limit <= 0:
        return entry | {"line": "the time was over; repeat the command to continue"}
    if name not in WITHOUT_BUNDLE and not context.bundle.exists():
        return entry | {"line": "the conversion wrote no bundle"}
    folder = Path(context.work)
    result = folder / "result.json"
    log = folder / "log.txt"
    result.unlink(missing_ok=True)
    path = os.pathsep.join(filter(None, [PACKAGES, os.environ.get("PYTHONPATH")]))
    given = json.dumps(asdict(context))
    code: int | None = None
    began = monotonic()
    with open(log, "wb") as output, suppress(subprocess.TimeoutExpired):
        # Processes that the step started end with it, see freeexport/system/child.py.
        code = subprocess.run(
            [sys.executable, "-m", "tools.gpu.prove_steps", name, given, str(result)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path, "TQDM_DISABLE": "1"},
            timeout=limit,
        ).returncode
    entry["seconds"] = monotonic() - began
    if code == 0:
        return entry | json.loads(result.read_text(encoding="utf-8"))
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if code is None:
        entry |= {"state": "timed out", "line": f"more than the {limit:.0f} s that were left"}
    else:
        ended = f"signal {-code}" if code < 0 else f"exit code {code}"
        line = lines[-1].strip()[:300] if lines else "no output"
        entry |= {"state": "error", "line": f"{ended}: {line}"}
    return entry | {"last_lines": lines[-LAST_LINES:]}


def prove(base: StepContext, steps: Sequence[str], minutes: float) -> dict[str, Any]:
    """Run the steps that have no result in the directory, and write the page after each.

    Returns the report.

    Raises:
        OptionError: If the directory holds other files, or a run of another commit or other
            options.
    """
    made = environment()
    facts = {
        "commit": made["commit"],
        "device": base.device,
        "model": Path(base.model).name,
        "tokens": base.tokens,
        "rounds": base.rounds,
        "exit_layer": base.exit_layer,
    }
    output = Path(base.work)
    run = Steps(output, RUN, facts)
    run.begin()
    report: dict[str, Any] = {**made, **facts, "complete": False, "steps": []}
    end = monotonic() + 60 * minutes
    for name, context in planned(base, steps):
        key = "-".join(filter(None, (name, context.precision)))
        click.echo(key, err=True)
        if run.finished(key):
            entry = run.read(key)
        else:
            entry = run_step(name, context, end - monotonic())
            if entry["state"] not in UNFINISHED:
                run.run(key, dict, entry)
        click.echo(f"  {entry['state']}, {entry['seconds']:.0f} s: {entry['line']}", err=True)
        report["steps"].append(entry)
        write_whole(output / PAGE, report_text(report))
    report["complete"] = True
    write_whole(output / PAGE, report_text(report))
    return report


def _chosen(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Parse comma-separated names of steps."""
    names = tuple(STEPS) if value is None else tuple(value.split(","))
    for name in names:
        if name not in STEPS:
            raise click.BadParameter(f"{name!r} is no step; choose from {', '.join(STEPS)}")
    return names


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Directory of the page, the bundles and the results of steps.",
)
@click.option(
    "--model", help="Checkpoint.  [default: SmolLM2 if installed, otherwise the demo model]"
)
@click.option(
    "--exit-layer",
    type=click.IntRange(1),
    help="Decoder layers before the exit.  [default: from exit.json, or a third of the layers]",
)
@click.option("--device", default="cuda:0", help="cuda:0, or cpu for everything but CUDA.")
@click.option("--steps", callback=_chosen, help="Comma-separated steps.  [default: all]")
@click.option("--tokens", type=click.IntRange(4, 400), default=64, help="Tokens per prompt.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="Rounds of each measurement.")
@click.option(
    "--minutes", type=click.FloatRange(0, min_open=True), default=10.0, help="Time of all steps."
)
def command(
    output: Path,
    model: str | None,
    exit_layer: int | None,
    device: str,
    steps: tuple[str, ...],
    tokens: int,
    rounds: int,
    minutes: float,
) -> None:
    place = Device.parse(device)
    check_device(place)
    if find_spec("torch") is None:
        raise OptionError("torch is not installed; run: pip install 'freeexport[convert]'")
    model = model or str(default_model())
    open_checkpoint(model)
    base = StepContext(str(place), str(output), model, tokens, rounds, exit_layer)
    report = prove(base, steps, minutes)
    click.echo(f"{output / PAGE}: commit this page")
    if any(step["state"] in BAD for step in report["steps"]):
        raise SystemExit(1)


if __name__ == "__main__":
    run_tool(command)
