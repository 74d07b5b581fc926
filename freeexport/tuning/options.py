"""What a user decides about tuning, checked where it enters."""

from __future__ import annotations

from dataclasses import dataclass

from freeexport.metrics import check_name
from runtime.errors import OptionError
from runtime.machine.device import Device


@dataclass(frozen=True)
class TuneOptions:
    """`quality`: the share of the full model's `metric` that must be kept. `samples`: first lines of the data, of which
    every third is held out. `candidates`: the most choices that are decoded on those and timed, `rounds` times each.
    `force`: on a busy machine too."""

    quality: float = 0.99
    metric: str = "exact"
    samples: int = 500
    max_new_tokens: int = 128
    candidates: int = 3
    rounds: int = 5
    threads: int | None = None
    force: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_name(self.metric)
        Device.parse(self.device)
        if not 0 < self.quality < 1:
            raise OptionError(f"target quality is {self.quality!r}; choose a number between 0 and 1")
        for name in ("samples", "max_new_tokens", "candidates", "rounds"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)!r}; choose 1 or more")
