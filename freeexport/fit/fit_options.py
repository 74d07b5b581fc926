"""Options of `freeexport fit`."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freeexport.task_metrics import check_name
from runtime.bundle.bundle import sha256_of
from runtime.bundle.manifest import Target
from runtime.errors import OptionError
from runtime.machine.device import Device
from runtime.machine.machine import usable_cores


@dataclass(frozen=True)
class FitOptions:
    """Options of `freeexport fit`, which freeexport/commands/fit.py describes.

    `budget` is in seconds. With `quality` None, every token must equal the full model's.

    Raises:
        OptionError: If a value is out of range or options contradict each other.
    """

    model: str
    out: Path
    data: Path | None = None
    metric: str = "exact"
    budget: float = 7200.0
    quality: float | None = 0.99
    threads: int | None = None
    device: str = "cpu"
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_name(self.metric)
        Device.parse(self.device)
        if not 0 < self.budget < math.inf:
            raise OptionError(
                f"--budget is {self.budget:g} s; give a time above 0, such as 2h or 90min"
            )
        if self.quality is not None and not 0 < self.quality < 1:
            raise OptionError(
                f"--quality is {self.quality:g}; give a share between 0 and 1, or --lossless"
            )
        if self.data is not None and not self.data.is_file():
            raise OptionError(
                f"--data {self.data}: there is no such file; name a JSONL file with 'input' (or "
                "'audio') and 'target'"
            )

    @property
    def target(self) -> Target:
        """Target of the conversions."""
        return "cpu" if Device.parse(self.device).index is None else "cuda"

    @property
    def work(self) -> Path:
        """Directory of intermediate results."""
        return self._beside("work")

    @property
    def report(self) -> Path:
        """Directory of the final report."""
        return self._beside("report")

    def _beside(self, suffix: str) -> Path:
        out = Path(os.path.abspath(self.out))
        return out.with_name(f"{out.name}.{suffix}")

    def split(self, name: str) -> Path:
        """File with a split of the data."""
        return self.work / "data" / f"{name}.jsonl"

    def recorded(self) -> dict[str, Any]:
        """Return what a resumed run must share with the original, as JSON values."""
        model = str(Path(self.model).absolute()) if Path(self.model).exists() else self.model
        data = None if self.data is None else [str(self.data.absolute()), sha256_of(self.data)]
        return {
            "model": model,
            "data": data,
            "budget": self.budget,
            "threads": self.threads or usable_cores(),
            "device": self.device,
        }
