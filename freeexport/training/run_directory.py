"""The directory of an unfinished training run: OUT.training, beside OUT, has its checkpoints and metrics."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from freeexport.checkpoints.exit_file import EXIT_FILE
from freeexport.checkpoints.weight_files import CheckpointError, SafetensorsFile
from freeexport.system.output import OutputError, check_output
from freeexport.training.options import TrainingOptions
from runtime.errors import OptionError
from runtime.json_file import UnreadableError, parse_json, read_object, read_text

OPTIONS = "training_options.json"
ELAPSED = "elapsed.json"  # seconds of training, in a checkpoint
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,18})", re.ASCII)


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint of an interrupted run; what has another name is none."""
    steps = {path: match[1] for path in directory.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))}
    newest = sorted(steps, key=lambda path: int(steps[path]), reverse=True)
    return next((path for path in newest if _complete(path)), None)


def _complete(checkpoint: Path) -> bool:
    try:
        # Trainer writes its state last.
        state, elapsed = (
            parse_json(read_text(checkpoint / name), nan=True) for name in ("trainer_state.json", ELAPSED)
        )
        SafetensorsFile(checkpoint / "model.safetensors")
    except (UnreadableError, CheckpointError):
        return False
    counted = isinstance(state, dict) and type(state.get("global_step")) is int
    timed = type(elapsed) in (int, float) and 0 <= elapsed < math.inf
    return counted and timed and zipfile.is_zipfile(checkpoint / "optimizer.pt")


class TrainingDirectory:
    """The state of one run. Opening it checks that nothing of value is in the way, and that a continued run has the
    options of the one before; `remove` ends it. Only `writer` (one process of a run) changes anything on disk."""

    def __init__(self, out: Path, model: str, options: TrainingOptions, writer: bool = True) -> None:
        self.out = Path(os.path.abspath(out))
        self.path = self.out.parent / f"{self.out.name}.training"
        name = str(Path(model).absolute()) if Path(model).exists() else model
        if writer:
            check_output(self.out, EXIT_FILE, options.overwrite)
            self._open(json.loads(json.dumps({"model": name, **options.recorded()})), options)

    def _open(self, record: dict[str, Any], options: TrainingOptions) -> None:
        recorded = self.path / OPTIONS
        if options.resume:
            if not recorded.is_file():
                raise OptionError(f"{self.path} holds no run to resume; start one without --resume")
            remedy = "its run cannot be resumed; start anew with --overwrite"
            before = read_object(recorded, remedy, OptionError)
            if changed := sorted(name for name in record if record[name] != before.get(name)):
                name = changed[0]
                raise OptionError(
                    f"the run in {self.path} had {name} {before.get(name)!r}, not {record[name]!r}; "
                    "resume with the same options, or start anew with --overwrite"
                )
            return
        if self.path.exists():
            if not recorded.is_file() and any(self.path.iterdir()):
                raise OutputError(f"{self.path} exists and is not a training run; move it, or choose another OUT")
            if last_checkpoint(self.path) and not options.overwrite:
                raise OutputError(f"{self.path} holds an interrupted run; use --resume, or --overwrite to replace it")
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        recorded.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def keep_records(self, directory: Path) -> None:
        """Copy the metrics of the run to the result."""
        shutil.copyfile(self.path / METRICS, directory / METRICS)
        if (self.path / TENSORBOARD).is_dir():
            shutil.copytree(self.path / TENSORBOARD, directory / TENSORBOARD)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
