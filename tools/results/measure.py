"""Measures a row: builds data and bundle, calibrates, evaluates, and publishes the figures.

Each complete part is kept in the output directory, so an interrupted run continues.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from freeexport.checkpoints.checkpoint import smollm2
from freeexport.evaluate.evaluate import evaluate
from freeexport.evaluate.page import write_evaluation
from freeexport.evaluate.settings import EvaluateOptions
from runtime.bundle.bundle import Bundle
from tools.data.splits import MARKER
from tools.results.published import (
    RESULTS,
    ROOT,
    USES,
    read_lines,
    rows_of,
    shipped,
    write_lines,
)
from tools.results.rows import CALIBRATION, RISK, ROWS, SMOLLM2, Data, ResultRow


def clean_commit(root: Path = ROOT) -> str:
    """Return the commit of the checkout.

    Raises:
        ClickException: If tracked files have changes, other than those that `measure` writes.
    """
    pictures = (row.picture for row in ROWS.values() if row.picture)
    written = [f":!{path}" for path in (RESULTS, USES, *pictures)]
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    if changed:
        names = ", ".join(line[3:] for line in changed.splitlines())
        raise click.ClickException(
            f"tracked files have changes, so no commit would name what is measured: {names}; "
            f"commit them first"
        )
    return _git(root, "rev-parse", "HEAD").strip()


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"git failed in {root}: {done.stderr.strip()}")
    return done.stdout


def measure_row(row: ResultRow, output: Path, root: Path = ROOT) -> Mapping[str, Any]:
    """Measure a row, publish it, and return the report of `evaluate`.

    Args:
        output: Directory of data, bundles and full reports.
        root: Directory below which the result is published.
    """
    commit = clean_commit()
    data = built(row.data, output)
    bundle = converted(row, output)
    calibration = Bundle.open(bundle).calibration
    rule = None if calibration is None else (calibration.method, calibration.risk)
    if row.calibrated and rule != ("risk", RISK):
        lines = str(data.with_name("calibration.jsonl"))
        arguments = [*CALIBRATION.split(), "--max-new-tokens", str(row.max_new_tokens)]
        run_command("freeexport", "calibrate", str(bundle), "--data", lines, *arguments)
    report_directory = output / "evaluations" / row.name
    options = EvaluateOptions(
        bundles=((bundle, row.methods),),
        data=data,
        output=report_directory,
        metrics=(row.quality, "exact"),
        thresholds=row.thresholds,
        samples=row.lines,
        max_new_tokens=row.max_new_tokens,
        temperature=row.temperature,
    )
    found = evaluate(options)
    write_evaluation(found, report_directory)
    publish(row, found.report, commit, root)
    if row.picture:
        shutil.copy(report_directory / "curve.png", root / row.picture)
    return found.report


def publish(row: ResultRow, report: Mapping[str, Any], commit: str, root: Path) -> None:
    """Replace the lines of a result, and record that these test lines were used."""
    facts = {
        "result": row.name,
        "command": f"python -m tools.results measure {row.name}",
        "test_lines": row.data.split,
        "commit": commit,
    }
    use = {
        "date": report["made"][:10],
        "result": row.name,
        "test_lines": row.data.split,
        "n": report["lines"],
        "commit": commit,
        "shipped": shipped(row.shipped),
    }
    others = [line for line in read_lines(root / RESULTS) if line["result"] != row.name]
    write_lines(root / USES, [*read_lines(root / USES), use])
    write_lines(root / RESULTS, [*rows_of(report, facts), *others])


def built(data: Data, output: Path) -> Path:
    """Return the file of test lines. Builds a missing data set."""
    if data.file is not None:
        return data.file
    directory = output / "data" / data.name
    if not (directory / MARKER).is_file():
        places = {"OUT": str(directory), "OTHERS": str(output)}
        arguments = []
        for argument in data.command.split():
            first, slash, rest = argument.partition("/")
            arguments.append(places.get(first, first) + slash + rest)
        run_command(sys.executable, "-m", *arguments)
    return directory / "test.jsonl"


def converted(row: ResultRow, output: Path) -> Path:
    """Return the bundle of a row. Converts a missing one."""
    bundle = output / "bundles" / f"{row.exit or Path(row.model).name}-{row.precision}"
    if not bundle.is_dir():
        model = str(smollm2()) if row.model == SMOLLM2 else str(ROOT / row.model)
        exit = () if row.exit is None else ("--exit", row.exit)
        run_command(
            "freeexport", "convert", model, str(bundle), "--precision", row.precision, *exit
        )
    return bundle


def run_command(*command: str) -> None:
    """Run a command of this project in this interpreter."""
    if command[0] == "freeexport":
        command = (sys.executable, "-m", *command)
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        raise click.ClickException(f"this failed with {done.returncode}: {' '.join(command)}")
