"""Manage the directory of an unfinished training run.

OUT.training, next to OUT, holds its checkpoints and metrics.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from freeexport.checkpoints.exit_file import EXIT_FILE
from freeexport.checkpoints.weight_files import CheckpointError, SafetensorsFile
from freeexport.system.output import OutputError, check_output
from freeexport.training.training_options import TrainingOptions
from runtime.bundle.json_file import UnreadableError, parse_json, read_object, read_text
from runtime.errors import OptionError

OPTIONS = "training_options.json"
ELAPSED = "elapsed.json"  # in a checkpoint: seconds of training so far
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,18})", re.ASCII)


def run_directory(out: Path) -> Path:
    """Return the path OUT.training, next to OUT."""
    absolute = Path(os.path.abspath(out))
    return absolute.parent / f"{absolute.name}.training"


def last_checkpoint(directory: Path) -> Path | None:
    """Return the newest complete checkpoint of an interrupted run, or None.

    Only directories named checkpoint-N are considered.
    """
    steps = {
        path: match[1]
        for path in directory.glob("checkpoint-*")
        if (match := _CHECKPOINT.fullmatch(path.name))
    }
    newest = sorted(steps, key=lambda path: int(steps[path]), reverse=True)
    return next((path for path in newest if _complete(path)), None)


def _complete(checkpoint: Path) -> bool:
    try:
        # Trainer writes its state last.
        state, elapsed = (
            parse_json(read_text(checkpoint / name), nan=True)
            for name in ("trainer_state.json", ELAPSED)
        )
        SafetensorsFile(checkpoint / "model.safetensors")
    except (UnreadableError, CheckpointError):
        return False
    counted = isinstance(state, dict) and type(state.get("global_step")) is int
    timed = type(elapsed) in (int, float) and 0 <= elapsed < math.inf
    return counted and timed and zipfile.is_zipfile(checkpoint / "optimizer.pt")


def open_run(out: Path, model: str, options: TrainingOptions) -> None:
    """Create or check the directory of a run that writes `out`."""
    name = str(Path(model).absolute()) if Path(model).exists() else model
    record: dict[str, Any] = json.loads(json.dumps({"model": name, **options.recorded()}))
    check_output(out, EXIT_FILE, options.overwrite)
    directory = run_directory(out)
    recorded = directory / OPTIONS
    if options.resume:
        if not recorded.is_file():
            raise OptionError(f"{directory} holds no run to resume; start one without --resume")
        remedy = "its run cannot be resumed; start anew with --overwrite"
        before = read_object(recorded, remedy, OptionError)
        # Options added after the run began have their defaults.
        defaults = {field.name: field.default for field in fields(TrainingOptions)}
        before = {name: before.get(name, defaults.get(name)) for name in record}
        if changed := sorted(name for name in record if record[name] != before[name]):
            name = changed[0]
            raise OptionError(
                f"the run in {directory} had {name} {before[name]!r}, not {record[name]!r}; "
                "resume with the same options, or start anew with --overwrite"
            )
        return
    if directory.exists():
        if not recorded.is_file() and any(directory.iterdir()):
            raise OutputError(
                f"{directory} exists and is not a training run; move it, or choose another OUT"
            )
        if last_checkpoint(directory) and not options.overwrite:
            raise OutputError(
                f"{directory} holds an interrupted run; use --resume, or --overwrite to replace it"
            )
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    recorded.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
