"""What a user decides about a calibration, checked where it enters."""

from __future__ import annotations

from dataclasses import dataclass

from freeexport.checkpoints.transformers_model import Dtype
from freeexport.metrics import check_name
from runtime.bundle.calibration import Method
from runtime.bundle.manifest import ConfidenceMeasure
from runtime.errors import OptionError
from runtime.machine.device import Device


@dataclass(frozen=True)
class CalibrateOptions:
    """`samples`: first lines of the data. `target`: P(agree | confidence) that an exit must have, for "bmm". For
    "risk", `risk` is the most that a sequence may lose on average, with probability 1 - `delta`; what it loses is the
    share of its tokens that exit and disagree, or with `metric`, 1 less the score of what mode free writes against
    what the full model writes. `quality`: the share of the full model's `metric` ("exact" where None) to keep, for
    "quality". Metrics need a bundle.

    `measure` times decoding at a few thresholds, the median of `rounds`, and needs a bundle.

    `confidence`, `exit_layer`, `max_pending`, `dtype` and `batch_size` are for checkpoints; a bundle has its own, and
    None is what exit.json says, softmax, 16, and float32. `device` is that of both.
    """

    samples: int = 500
    method: Method = "bmm"
    target: float = 0.95
    risk: float = 0.05
    delta: float = 0.05
    metric: str | None = None
    quality: float = 0.99
    measure: bool = False
    rounds: int = 5
    max_new_tokens: int = 128
    confidence: ConfidenceMeasure | None = None
    exit_layer: int | None = None
    max_pending: int | None = None
    batch_size: int = 8
    device: str = "cpu"
    dtype: Dtype | None = None

    def __post_init__(self) -> None:
        if self.metric is not None:
            check_name(self.metric)
        for name in ("target", "risk", "delta", "quality"):
            value = getattr(self, name)
            if not 0 < value < 1:
                given = "agreement" if name == "target" else name  # as the command line has it
                raise OptionError(f"{given} is {value!r}; choose a number between 0 and 1")
        Device.parse(self.device)
        for name in ("samples", "max_new_tokens", "batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)!r}; choose 1 or more")

    @property
    def needs_outputs(self) -> bool:
        """Whether texts are decoded in mode free."""
        return self.metric is not None or self.method == "quality"
