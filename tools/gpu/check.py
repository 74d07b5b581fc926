"""Everything that only a machine with a card can tell, in one command of less than eight minutes.

    python -m tools.gpu.check                      # a T5-base-sized model, random weights; docs/gpu-check.md, .json
    python -m tools.gpu.check --model CHECKPOINT --exit-layer 6 --skip peers --output report

Steps: environment, correctness (tokens against the CPU in fp32), lanes (overlap and CUDA graphs on and off), timeline
(shallow steps within a deep pass, by events), cpu, peers (transformers, torch.compile). A step that cannot be done says
why, and the others go on: without a card, or with the CPU's ONNX Runtime alone, what is left is still done, on the
package's small model, and the report says that no card was found. Run from the root.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from runtime.cuda.driver import Cuda
from runtime.engines.onnx import import_onnxruntime
from runtime.errors import FreeExportError
from runtime.machine.device import Device
from tools.gpu.steps import STEPS, Bench, Unavailable

SMALL = Path(__file__).parents[2] / "freeexport" / "data" / "g2p"
# Begin no step after so many seconds.
LIMIT = 400


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="A checkpoint.")
@click.option("--exit-layer", type=click.IntRange(1), help="[default: that of its exit.json]")
@click.option("--device", default="cuda:0")
@click.option("--skip", multiple=True, type=click.Choice(list(STEPS)), help="Steps to leave out.")
@click.option("--tokens", type=click.IntRange(8), help="A run.  [default: 200, without a card 40]")
@click.option("--output", type=click.Path(path_type=Path), help="Report, without suffix.  [default: docs/gpu-check]")
def main(
    model: Path | None,
    exit_layer: int | None,
    device: str,
    skip: tuple[str, ...],
    tokens: int | None,
    output: Path | None,
) -> None:
    began = time.monotonic()
    found, why = usable(device)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        if model is None:
            model, exit_layer = default_model(found is not None, work)
        bench = Bench(model, work, tokens or (200 if found else 40), exit_layer, found, why)
        report = run(bench, skip, began)
    text = page(report)
    click.echo(text)
    if output is None and found is not None:
        output = Path("docs/gpu-check")
    if output is not None:
        output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(text, encoding="utf-8")
    sys.exit(1 if any(step["state"] == "failed" for step in report["steps"].values()) else 0)


def usable(device: str) -> tuple[str | None, str]:
    """The device, or None and why sessions cannot run on it here."""
    try:
        wanted = Device.parse(device)
        if wanted.index is None:
            raise click.UsageError("--device cpu is no card; leave it out")
        cuda = Cuda(wanted.index)
        try:
            wanted.providers(import_onnxruntime(), {})
        finally:
            cuda.close()
    except FreeExportError as error:
        return None, str(error)
    return str(wanted), ""


def default_model(card: bool, work: Path) -> tuple[Path, int | None]:
    """With a card one of a size that means something; else the package's own, which every machine decodes quickly."""
    if not card:
        return SMALL, None
    from tools.speed.sized_model import main as sized_model

    sized_model.main(["t5-base", str(work / "t5-base")], standalone_mode=False)
    return work / "t5-base", 4


def run(bench: Bench, skip: tuple[str, ...], began: float) -> dict[str, Any]:
    steps: dict[str, Any] = {}
    for name, step in STEPS.items():
        start = time.monotonic()
        if name in skip:
            steps[name] = {"state": "skipped", "why": "as asked"}
        elif start - began > LIMIT:
            steps[name] = {"state": "skipped", "why": f"{LIMIT} seconds were over"}
        else:
            click.echo(f"{name} ...", err=True)
            steps[name] = attempt(step, bench)
        steps[name]["seconds"] = round(time.monotonic() - start, 1)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "card": bench.device or "no card was found",
        "why": bench.no_device,
        "model": bench.model.name,
        "steps": steps,
    }


def attempt(step: Any, bench: Bench) -> dict[str, Any]:
    try:
        return {"state": "done", "found": step(bench)}
    except Unavailable as error:
        return {"state": "not done", "why": str(error)}
    except Exception as error:  # the other steps are worth having whatever this one met
        return {"state": "failed", "why": f"{type(error).__name__}: {str(error)[:500]}"}


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["# GPU check", "", f"{report['date']}, card: {report['card']}. {report['why']}".rstrip(), ""]
    lines += [f"Model: {report['model']}. Made by `python -m tools.gpu.check`.", ""]
    for name, step in report["steps"].items():
        lines += [f"## {name}: {step['state']} ({step['seconds']} s)", ""]
        if "why" in step:
            lines += [step["why"], ""]
        for key, value in step.get("found", {}).items():
            if key != "first 40 calls":
                lines.append(f"- {key}: {_text(value)}")
        lines.append("")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    main()
