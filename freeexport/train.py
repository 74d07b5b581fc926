"""`freeexport train`: fine-tune a checkpoint for one exit."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import click

from freeexport.exit_file import EXIT_FILE, ExitFile, write_exit_file
from freeexport.output_directory import output_directory
from freeexport.training_options import (
    LORA_PRESETS,
    LoraOptions,
    LossName,
    Schedule,
    TrainingOptions,
    Tune,
)
from runtime.errors import OptionError


@dataclass(frozen=True)
class Trained:
    """What a run came to: `metrics` are those of the best evaluation, whose weights are in `out`."""

    out: Path
    steps: int
    best_step: int
    seconds: float
    stopped: str
    metrics: dict[str, float]
    left_out: tuple[str, ...]
