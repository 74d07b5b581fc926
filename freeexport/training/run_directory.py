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
from freeexport.system.output import OutputError
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
    # Trainer writes its state last.
    state, elapsed = _read(checkpoint / "trainer_state.json"), _read(checkpoint / ELAPSED)
    if not isinstance(state, dict) or type(state.get("global_step")) is not int:
        return False
    if type(elapsed) not in (int, float) or not 0 <= elapsed < math.inf:
        return False
    try:
        SafetensorsFile(checkpoint / "model.safetensors")
    except CheckpointError:
        return False
    return zipfile.is_zipfile(checkpoint / "optimizer.pt")


def _read(path: Path) -> Any:
    """The JSON of a file, None where it cannot be read."""
    try:
        return parse_json(read_text(path), nan=True)
    except UnreadableError:
        return None


class TrainingDirectory:
    """The state of one run. Opening it checks that nothing of value is in the way, and that a continued run has the
    options of the one before; `remove` ends it. Only `writer` (one process of a run) changes anything on disk."""

    def __init__(self, out: Path, model: str, options: TrainingOptions, writer: bool = True) -> None:
        self.out = Path(os.path.abspath(out))
        self.path = self.out.parent / f"{self.out.name}.training"
        record = json.loads(json.dumps({"model": _name(model), **options.recorded()}))
        if writer:
            self._check_out(options.overwrite)
            self._open(record, options)

    def _check_out(self, overwrite: bool) -> None:
        """Hours of training would otherwise end in an error."""
        if not os.path.lexists(self.out) or (self.out.is_dir() and not any(self.out.iterdir())):
            return
        if self.out.is_symlink() or not (self.out / EXIT_FILE).is_file():
            raise OutputError(f"{self.out} exists and is not what train writes (no {EXIT_FILE}); choose another path")
        if not overwrite:
            raise OutputError(f"{self.out} exists; choose another path, or replace it with --overwrite")

    def _open(self, record: dict[str, object], options: TrainingOptions) -> None:
        recorded = self.path / OPTIONS
        if options.resume:
            if not recorded.is_file():
                raise OptionError(f"{self.path} holds no run to resume; start one without --resume")
            remedy = "its run cannot be resumed; start anew with --overwrite"
            before = read_object(recorded, remedy, OptionError)
            changed = sorted(name for name in record if record[name] != before.get(name))
            if changed:
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
        """Copy options and metrics of the run to the result."""
        for name in (METRICS, TENSORBOARD):
            if (self.path / name).is_dir():
                shutil.copytree(self.path / name, directory / name)
            elif (self.path / name).exists():
                shutil.copyfile(self.path / name, directory / name)

    def remove_unless_resumable(self) -> None:
        """After a failure: what holds no checkpoint is of no use."""
        if last_checkpoint(self.path) is None:
            self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _name(model: str) -> str:
    return str(Path(model).absolute()) if Path(model).exists() else model
