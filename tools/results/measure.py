"""Measures a row: builds data and bundle, calibrates, evaluates, and records the test lines used.

Each complete part is kept in the output directory, so an interrupted run continues.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from freeexport.checkpoints.checkpoint import smollm2
from freeexport.evaluate.evaluate import evaluate
from freeexport.evaluate.settings import EvaluateOptions
from freeexport.system.output import write_whole
from runtime.bundle.bundle import Bundle
from tools.data.splits import MARKER
from tools.results.rows import CALIBRATION, RISK, SMOLLM2, TEMPLATED, Data, ResultRow

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
LOOKS = "looks.jsonl"
# Threshold of trials, which decode too few lines for a calibration.
TRIAL_THRESHOLD = 0.9


def result_file(row: ResultRow, results: Path = RESULTS) -> Path:
    return results / f"readme-{row.name}.json"


def measure_row(
    row: ResultRow, output: Path, results: Path = RESULTS, trial: int | None = None
) -> dict[str, Any]:
    """Measure a row.

    Args:
        output: Directory of data, bundles and outputs.
        results: Directory of the result and the ledger.
        trial: Number of calibration lines to decode instead of test lines. Nothing is written to
            `results` then.

    Returns:
        The content of the result's JSON.
    """
    directory = built(row.data if trial is None or row.data.file is None else TEMPLATED, output)
    bundle = converted(row, output)
    calibration = Bundle.open(bundle).calibration
    by_the_rule = calibration is not None and (calibration.method, calibration.risk) == (
        "risk",
        RISK,
    )
    if row.calibrated and trial is None and not by_the_rule:
        data = str(directory / "calibration.jsonl")
        arguments = [*CALIBRATION.split(), "--max-new-tokens", str(row.max_new_tokens)]
        run_command("freeexport", "calibrate", str(bundle), "--data", data, *arguments)
    options = EvaluateOptions(
        bundles=((bundle, row.methods),),
        data=lines_of(row.data, directory, "test" if trial is None else "calibration"),
        output=output / "evaluations" / (row.name if trial is None else f"{row.name}-trial"),
        metrics=(row.quality,) if row.quality == "exact" else (row.quality, "exact"),
        thresholds=() if trial is None else (TRIAL_THRESHOLD,),
        samples=trial or row.lines,
        max_new_tokens=row.max_new_tokens,
        temperature=row.temperature,
        overwrite=trial is not None,
    )
    report = evaluate(options).report
    built_by = (
        json.loads((directory / MARKER).read_text(encoding="utf-8")) if directory.is_dir() else None
    )
    found = {
        "row": row.name,
        "command": f"python -m tools.results measure {row.name}",
        "recipe": {
            "data": " ".join(("python -m", *row.data.arguments))
            if row.data.arguments
            else row.data.name,
            "split": row.data.split,
            "convert": " ".join(("freeexport convert", Path(row.engines.model).name, *row.convert)),
            "calibrate": CALIBRATION if row.calibrated else None,
        },
        "dataset": built_by,
        "evaluation": {**report, "data": row.data.split},
    }
    if trial is None:
        record(row, found, results)
    return found


def record(row: ResultRow, found: dict[str, Any], results: Path) -> None:
    """Write the result, and a line of the ledger that these test lines were used."""
    report = found["evaluation"]
    look = {
        "date": report["made"][:10],
        "commit": report["commit"],
        "split": row.data.split,
        "lines": report["lines"],
        "result": result_file(row).name,
        "trained_after": False,
    }
    with (results / LOOKS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(look) + "\n")
    write_whole(result_file(row, results), json.dumps(found, indent=1) + "\n")


def built(data: Data, output: Path) -> Path:
    """Return the directory of a data set, or its committed file. Builds a missing data set."""
    if data.file is not None:
        return data.file
    directory = output / "data" / data.name
    if not (directory / MARKER).is_file():
        module, *arguments = data.arguments
        # The name of a task precedes OUT.
        places = 1 if arguments and not arguments[0].startswith("-") else 0
        shared = ["--index", str(output / "debian-index")] if module != "tools.data.g2p" else []
        shared += (
            ["--dictionaries", str(output / "dictionaries")]
            if module == "tools.data.prompts"
            else []
        )
        run_command(
            sys.executable,
            "-m",
            module,
            *arguments[:places],
            str(directory),
            *arguments[places:],
            *shared,
        )
    return directory


def lines_of(data: Data, place: Path, split: str) -> Path:
    """Return the file of lines to decode. Writes it if prompts ask to repeat the targets."""
    if not place.is_dir():
        return place
    path = place / f"{split}.jsonl"
    if not data.repeat:
        return path
    repeated = place / f"{split}-repeated.jsonl"
    targets = [json.loads(line)["target"] for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = (
        [{"role": "user", "content": f"Repeat this text exactly:\n\n{target}"}]
        for target in targets
    )
    write_whole(
        repeated,
        "".join(json.dumps({"input": prompt}, ensure_ascii=False) + "\n" for prompt in prompts),
    )
    return repeated


def converted(row: ResultRow, output: Path) -> Path:
    """Return the bundle of a row. Converts a missing one."""
    bundle = output / "bundles" / row.engines.name
    if not bundle.is_dir():
        model = str(smollm2()) if row.engines.model == SMOLLM2 else str(ROOT / row.engines.model)
        run_command("freeexport", "convert", model, str(bundle), *row.convert)
    return bundle


def run_command(*command: str) -> None:
    """Run a command of this project in this interpreter."""
    if command[0] == "freeexport":
        command = (sys.executable, "-m", *command)
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        raise click.ClickException(f"this failed with {done.returncode}: {' '.join(command)}")
