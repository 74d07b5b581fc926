"""Steps of `tools.gpu.prove` that run the commands which train, calibrate and compare.

They use the pronunciation model of this package.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from freeexport.demo import G2P
from freeexport.system.child import run_child
from tools.gpu.prove_context import StepContext, StepOutcome

EXIT_LAYER = 2


def training(context: StepContext) -> StepOutcome:
    """Train one step, and calibrate the checkpoint on the device."""
    out = Path(context.work) / "trained"
    for left in (out, out.with_name("trained.training")):  # of an interrupted run
        shutil.rmtree(left, ignore_errors=True)
    data = str(G2P / "test.jsonl")
    run_child(
        "freeexport",
        *("train", str(G2P), str(out), "--data", data),
        *("--exit-layer", str(EXIT_LAYER), "--loss", "ce", "--steps", "1"),
        *("--batch-tokens", "512"),
    )
    answer = run_child(
        "freeexport",
        *("calibrate", str(out), "--data", data, "--device", context.device, "--json"),
        *("--max-new-tokens", "16"),
    )
    values = json.loads(answer)
    return StepOutcome(
        f"a step; calibrated checkpoint: threshold {values['threshold']:.3g}", values=values
    )


def comparison(context: StepContext) -> StepOutcome:
    """Run rows of the paper's comparison."""
    data = Path(context.work) / "words"
    data.mkdir(exist_ok=True)
    lines = (G2P / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in {"train": lines[:60], "validation": lines[60:80], "test": lines[80:]}.items():
        (data / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    out = Path(context.work) / "comparison"
    run_child(
        "tools.paper",
        *("compare", str(G2P), "--data", str(data), "--exit-layer", str(EXIT_LAYER)),
        *("--output", str(out), "--device", context.device, "--steps", "1", "--lines", "4"),
        *("--calibration-lines", "20", "--threshold", "0.9", "--metric", "per"),
        *("--rows", "full,eager,eager-exits,free"),
    )
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    measured = report["seeds"]["0"]["measurements"]["main"]["rows"]
    rows = [
        (row["bundle"], row["setting"], round(row["tokens_per_second"], 1), f"{row['same']:.0%}")
        for row in measured
    ]
    return StepOutcome(
        f"{len(rows)} rows",
        columns=("weights", "method", "tokens/s", "lines as full"),
        rows=[*rows],
        values=report,
    )
