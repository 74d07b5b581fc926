"""Inputs and outcomes of the steps of `tools.gpu.prove`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from freeexport.evaluate.speed import speed_prompts
from runtime import Session
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import FloatType

CAPACITY = 512
PROMPTS = 4
THRESHOLD = 0.5
FREE: dict[str, Any] = {"mode": "free", "drafts": "exit", "threshold": THRESHOLD}
EVERY: dict[str, Any] = {"mode": "free", "drafts": "exit", "threshold": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    f"free at {THRESHOLD}": FREE,
    "free at 0, every token exits": EVERY,
    "rollback": {"mode": "rollback", "threshold": THRESHOLD, "rollback_threshold": 2.0},
    "lossless, drafts from the text": {"mode": "lossless", "drafts": "lookup"},
    "lossless, drafts of the exit": {"mode": "lossless", "drafts": "exit"},
    "static, shallow decoder alone": {"mode": "shallow"},
}
State = Literal["done", "failed", "not applicable"]


class NotApplicable(Exception):
    """Raised by a step that cannot run on this device, with the reason."""


@dataclass(frozen=True)
class StepContext:
    """Inputs of a step.

    Attributes:
        device: Device of sessions and of torch: "cpu" or "cuda:0".
        work: Directory for bundles and results of earlier steps.
        tokens: Tokens per prompt.
        rounds: Rounds of a measurement.
        model: The checkpoint. Empty for steps without one.
        name: Name of the checkpoint in the report.
        precision: Precision of the bundle. Empty for steps without one.
        exit_layer: Exit layer. Default: that of the checkpoint's exit, or a third of the layers.
    """

    device: str
    work: str
    tokens: int
    rounds: int
    model: str = ""
    name: str = ""
    precision: str = ""
    exit_layer: int | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def bundle(self) -> Path:
        """The bundle that the step `conversion` writes."""
        return Path(self.work) / f"{self.name}-{self.precision}"

    @property
    def float_type(self) -> FloatType:
        """Type that the results have, also if the CPU computes them in fp32 and rounds.

        A GPU multiplies fp32 in TF32, whose mantissa has the length of fp16's.
        """
        if self.precision == "bf16" or (self.precision == "fp32" and not self.on_gpu):
            return self.precision  # type: ignore[return-value]
        return "fp16"

    def session(self, **options: Any) -> Session:
        """Open a session of the bundle on the device."""
        return Session(self.bundle, **{"device": self.device, "slots": 1, **options})

    def prompts(self, count: int = PROMPTS, bundle: Path | None = None) -> list[list[int]]:
        """Return the token ids of the first sample texts, for `bundle` in place of its own."""
        return speed_prompts(Bundle.open(bundle or self.bundle), None, count)

    def file(self, step: str) -> Path:
        """Return where a step keeps values for later steps of the same checkpoint."""
        return Path(self.work) / f"{self.name}-{step}.json"


@dataclass
class StepOutcome:
    """Result of a step.

    Attributes:
        state: "failed" if a check says no, "done" otherwise.
        line: The outcome as one sentence.
        values: Everything measured, for the JSON report.
    """

    line: str
    state: State = "done"
    columns: Sequence[str] = ()
    rows: list[Sequence[Any]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)


def version_of(name: str) -> str:
    """Return the version of an installed module, or why it does not import."""
    try:
        module = import_module(name)
    except Exception as error:  # a missing library raises OSError or ImportError
        return f"does not import: {str(error)[:200]}"
    return f"{name} {module.__version__}"
