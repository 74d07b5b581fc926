"""Inputs and outcomes of the steps of `tools.gpu.prove`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from freeexport.checkpoints.transformers_model import Dtype
from freeexport.evaluate.speed import speed_prompts
from freeexport.verification.ties import Noise, ScoredTokens, SettingTies, TieReport
from runtime import GenerationResult, Session
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import FloatType
from runtime.options.generation_options import MAX_TOP_LOGPROBS

CAPACITY = 512
PROMPTS = 4
THRESHOLD = 0.5
FREE: dict[str, Any] = {"mode": "free", "drafts": "exit", "threshold": THRESHOLD}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    f"free at {THRESHOLD}": FREE,
    "free at 0, every token exits": {**FREE, "threshold": 0.0},
    "rollback": {"mode": "rollback", "threshold": THRESHOLD, "rollback_threshold": 2.0},
    "lossless, drafts from the text": {"mode": "lossless", "drafts": "lookup"},
    "lossless, drafts of the exit": {"mode": "lossless", "drafts": "exit"},
    "static, shallow decoder alone": {"mode": "shallow"},
}
DTYPES: dict[str, Dtype] = {"fp16": "float16", "bf16": "bfloat16"}
State = Literal["done", "failed", "not applicable"]


@dataclass(frozen=True)
class StepContext:
    """Inputs of a step.

    Attributes:
        device: Device of sessions and of torch: "cpu" or "cuda:0".
        work: Directory for bundles.
        model: The checkpoint.
        tokens: Tokens per prompt.
        rounds: Rounds of a measurement.
        exit_layer: Exit layer. Default: that of the checkpoint's exit, or a third of the layers.
        precision: Precision of the bundle. Empty for steps without one.
    """

    device: str
    work: str
    model: str
    tokens: int
    rounds: int
    exit_layer: int | None = None
    precision: str = ""

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def bundle(self) -> Path:
        """The bundle that the step `conversion` writes."""
        return Path(self.work) / f"bundle-{self.precision}"

    @property
    def float_type(self) -> FloatType:
        """Type that the results have, also if the CPU computes them in fp32 and rounds.

        A GPU multiplies fp32 in TF32, whose mantissa has the length of fp16's.
        """
        if self.precision == "bf16" or (self.precision == "fp32" and not self.on_gpu):
            return self.precision  # type: ignore[return-value]
        return "fp16"

    @property
    def plain(self) -> dict[str, Any]:
        """Options of requests."""
        return {"max_new_tokens": self.tokens, "ignore_eos": True}

    @property
    def scored(self) -> dict[str, Any]:
        """Options of requests whose scores are compared."""
        return {**self.plain, "output_logprobs": True, "top_logprobs": MAX_TOP_LOGPROBS}

    def session(self, **options: Any) -> Session:
        """Open a session of the bundle on the device."""
        return Session(self.bundle, **{"device": self.device, "slots": 1, **options})

    def prompts(self, bundle: Path | None = None) -> list[list[int]]:
        """Return the token ids of the first sample texts, for `bundle` in place of its own."""
        return speed_prompts(Bundle.open(bundle or self.bundle), None, PROMPTS)


@dataclass
class StepOutcome:
    """Result of a step.

    Attributes:
        line: The outcome as one sentence.
        state: "failed" if a check says no, "done" otherwise.
        columns: Names of the columns of `rows`.
        values: Other values, for the JSON report.
    """

    line: str
    state: State = "done"
    columns: Sequence[str] = ()
    rows: list[Sequence[Any]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)


def ties_between(
    name: str,
    expected: Sequence[GenerationResult],
    found: Sequence[GenerationResult],
    float_type: FloatType,
) -> TieReport:
    """Compare scored results, with the noise between their scores."""
    pairs = [
        (ScoredTokens.of(one), ScoredTokens.of(other))
        for one, other in zip(expected, found, strict=True)
    ]
    noise = Noise.between(pairs)
    row = SettingTies(name)
    for request, (one, other) in enumerate(pairs):
        row.add(request, one, other.ids, noise)
    return TieReport(float_type, noise, [row])
