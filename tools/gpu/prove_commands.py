"""Steps of `tools.gpu.prove` that run the commands which train, calibrate and compare."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from time import perf_counter

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.demo import G2P
from freeexport.system.child import run_child
from tools.gpu.prove_context import StepContext, StepOutcome


def training(context: StepContext) -> StepOutcome:
    """Train one step, and calibrate the checkpoint on the device."""
    out = Path(context.work) / "trained"
    for left in (out, out.with_name("trained.training")):  # of an interrupted run
        shutil.rmtree(left, ignore_errors=True)
    checkpoint = open_checkpoint(context.model)
    third = max(1, round(len(checkpoint.described().decoder.layers) / 3))
    layer = context.exit_layer or (third if checkpoint.exit is None else checkpoint.exit.exit_layer)
    # The demo's tokenizer only writes pronunciations.
    demo = Path(context.model).resolve() == G2P.resolve()
    data = str(G2P / "test.jsonl" if demo else _sample_lines(context))
    began = perf_counter()
    run_child(
        "freeexport",
        *("train", context.model, str(out), "--data", data),
        *("--exit-layer", str(layer), "--loss", "ce", "--steps", "1", "--batch-tokens", "512"),
    )
    seconds = perf_counter() - began
    answer = run_child(
        "freeexport",
        *("calibrate", str(out), "--data", data, "--device", context.device, "--json"),
        *("--max-new-tokens", str(min(16, context.tokens))),
    )
    values = json.loads(answer)
    return StepOutcome(
        f"a step in {seconds:.0f} s; calibrated checkpoint: threshold {values['threshold']:.3g}",
        values={"train_seconds": seconds, **values},
    )


def comparison(context: StepContext) -> StepOutcome:
    """Run rows of the paper's comparison, on the pronunciation model of this package."""
    data = Path(context.work) / "words"
    data.mkdir(exist_ok=True)
    lines = (G2P / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in {"train": lines[:60], "validation": lines[60:80], "test": lines[80:]}.items():
        (data / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    out = Path(context.work) / "comparison"
    run_child(
        "tools.paper",
        *("compare", str(G2P), "--data", str(data), "--exit-layer", "2", "--output", str(out)),
        *("--device", context.device, "--steps", "1", "--lines", "4", "--calibration-lines", "20"),
        *("--rows", "full,eager,eager-exits,free", "--threshold", "0.9", "--metric", "per"),
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


def _sample_lines(context: StepContext) -> Path:
    """Write many short inputs, because calibration needs a number of sequences."""
    path = Path(context.work) / "lines.jsonl"
    texts = files("freeexport").joinpath("data/verify.txt").read_text(encoding="utf-8").splitlines()
    words = [text.split() for text in texts if text.strip()]
    lines = [one[start : start + 16] for one in words for start in range(len(one) - 8)]
    pairs = [{"input": " ".join(line[:8]), "target": " ".join(line[8:])} for line in lines]
    step = max(1, len(pairs) // 48)
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs[::step]), encoding="utf-8")
    return path
