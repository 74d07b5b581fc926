"""What a user decides about a calibration, checked where it enters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.errors import OptionError
from runtime.manifest import ConfidenceMeasure

FitMethod = Literal["bmm", "risk"]


@dataclass(frozen=True)
class CalibrateOptions:
    """`samples`: first lines of the data. `target`: P(agree | confidence) that an exit must have, for "bmm". For
    "risk", `risk` is the most that a sequence may lose on average, with probability 1 - `delta`; what it loses is the share of
    its tokens that exit and disagree.

    `confidence`, `exit_layer`, `max_pending` and `batch_size` are for checkpoints; a bundle has its own, and None is
    what exit.json says, softmax, and 16.
    """

    samples: int = 500
    method: FitMethod = "bmm"
    target: float = 0.95
    risk: float = 0.05
    delta: float = 0.05
    max_new_tokens: int = 128
    confidence: ConfidenceMeasure | None = None
    exit_layer: int | None = None
    max_pending: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("target", "risk", "delta"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise OptionError(f"{name} is {value!r}; choose a number between 0 and 1")
        for name in ("samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)!r}; choose 1 or more")


def data_path_problem(path: Path) -> str | None:
    """Why a data file cannot be used, before any work."""
    if not path.exists():
        return f"{path} does not exist; name a JSONL file"
    return f"{path} is a directory; name a JSONL file" if path.is_dir() else None
