"""The calibration of a checkpoint, in files beside its weights.

- `calibration.json`: as in a bundle.
- `calibration.sample.jsonl`: sequences with the predictions of the checkpoint. `convert` decodes
  them with its engines, to compare.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from freeexport.calibrate.traces import Traces, trace_of
from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.exit_file import EXIT_FILE
from freeexport.costs.intervals import Share
from freeexport.system.output import OutputError, write_whole
from runtime import Session
from runtime.bundle.calibration import CALIBRATION, Calibration, read_calibration
from runtime.bundle.json_file import UnreadableError, parse_json, read_text
from runtime.bundle.manifest import MANIFEST
from runtime.errors import CalibrationError, one_line

SAMPLE = "calibration.sample.jsonl"
# Tokens of the sequences in SAMPLE. They limit the time of a conversion.
SAMPLE_TOKENS = 256
MAX_SAMPLE_BYTES = 4 << 20  # bytes
REMEDY = "run freeexport calibrate on the checkpoint again, or remove the file"


@dataclass(frozen=True)
class TracedAnswer:
    """A sequence as the checkpoint predicts it.

    Attributes:
        prompt: Token ids of the prompt.
        tokens: Number of generated tokens that may exit.
        agreeing: Those whose shallow and deep predictions agree.
        confident: Those above the threshold.
    """

    prompt: tuple[int, ...]
    tokens: int
    agreeing: int
    confident: int

    def __post_init__(self) -> None:
        """Check the values."""
        counts = (*self.prompt, self.tokens, self.agreeing, self.confident)
        if any(type(one) is not int or not 0 <= one < 1 << 31 for one in counts):
            raise ValueError("a value is not a count")
        if not self.prompt or not self.tokens or max(self.agreeing, self.confident) > self.tokens:
            raise ValueError("counts contradict each other")


@dataclass(frozen=True)
class SampleCheck:
    """Predictions of engines on the sample, against those of the checkpoint.

    Attributes:
        agreement: Share of tokens whose shallow and deep predictions agree, by the engines.
        confident: Share of tokens above the threshold, by the engines.
        wanted_agreement: Share by the checkpoint.
        wanted_confident: Share by the checkpoint.
    """

    sequences: int
    agreement: Share
    confident: Share
    wanted_agreement: float
    wanted_confident: float

    @property
    def differs(self) -> bool:
        """True if a share of the checkpoint is outside the engines' interval."""
        pairs = ((self.agreement, self.wanted_agreement), (self.confident, self.wanted_confident))
        return any(
            found.low is not None
            and found.high is not None
            and not found.low <= wanted <= found.high
            for found, wanted in pairs
        )

    def __str__(self) -> str:
        said = (
            f"{self.sequences} sequences: {self.agreement.value:.1%} of the shallow predictions "
            f"agree with the engines (checkpoint: {self.wanted_agreement:.1%}), "
            f"{self.confident.value:.1%} are above the threshold "
            f"({self.wanted_confident:.1%})"
        )
        return f"{said}; they differ, so calibrate the bundle" if self.differs else said


def is_checkpoint(model: str) -> bool:
    """Return True for a checkpoint directory or GGUF file, as opposed to a bundle."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return True
    names = ("config.json", "exit.json", "adapter_config.json")
    return not (path / MANIFEST).exists() and any((path / name).is_file() for name in names)


def exit_directory_of(checkpoint: Checkpoint) -> Path | None:
    """Return the directory of a checkpoint's exit.json. None if there is none."""
    path = checkpoint.path
    directory = checkpoint.adapter or (path.parent if path.is_file() else path)
    return directory if (directory / EXIT_FILE).is_file() else None


def write_beside(
    directory: Path, calibration: Calibration, samples: Sequence[TracedAnswer]
) -> Path:
    """Write the calibration of a checkpoint and its sample, and return the calibration's path."""
    path = directory / CALIBRATION
    lines = [json.dumps(asdict(sample)) + "\n" for sample in samples]
    try:
        write_whole(directory / SAMPLE, "".join(lines))
        write_whole(path, calibration.to_json())
    except OSError as error:
        raise OutputError(
            f"{directory} cannot be written to ({one_line(error)}); give --output FILE, "
            "and that file to convert --calibration"
        ) from None
    return path


def read_beside(checkpoint: Checkpoint) -> tuple[Calibration, list[TracedAnswer]] | None:
    """Return the calibration beside a checkpoint and its sample. None without a calibration."""
    directory = exit_directory_of(checkpoint)
    if directory is None or not (directory / CALIBRATION).is_file():
        return None
    path = directory / CALIBRATION
    calibration = read_calibration(path)
    if calibration.source_sha256 != checkpoint.sha256:
        raise CalibrationError(
            f"{path} is of other weights: {checkpoint.name} has changed since; {REMEDY}"
        )
    return calibration, _read_samples(directory / SAMPLE)


def _read_samples(path: Path) -> list[TracedAnswer]:
    if not path.is_file():
        return []
    samples = []
    try:
        for line in read_text(path, MAX_SAMPLE_BYTES).splitlines():
            found: dict[str, Any] = parse_json(line.encode())
            samples.append(TracedAnswer(**{**found, "prompt": tuple(found["prompt"])}))
    except (UnreadableError, ValueError, TypeError, KeyError) as error:
        raise CalibrationError(
            f"{path} line {len(samples) + 1} is no sample of a calibration ({one_line(error)}); "
            f"{REMEDY}"
        ) from None
    return samples


def check_sample(
    session: Session, samples: Sequence[TracedAnswer], threshold: float
) -> SampleCheck | None:
    """Decode the sample with the engines of a bundle, and compare.

    Returns:
        The comparison. None if no sequence fits the bundle.
    """
    manifest = session.manifest
    limit = manifest.encoder_capacity or session.capacity - 1
    fitting = [
        sample
        for sample in samples
        if len(sample.prompt) <= limit and max(sample.prompt) < manifest.vocab_size
    ]
    # Tokens of an output that cannot exit.
    others = len(manifest.output_begins) - 1 if manifest.encoder_decoder else 1
    parts = [
        trace_of(session, line, np.array(sample.prompt, np.int64), sample.tokens + others)
        for line, sample in enumerate(fitting, 1)
    ]
    traces = Traces.joined(parts)
    agreement = traces.share(traces.agrees)
    confident = traces.share(traces.above(threshold))
    if agreement is None or confident is None:
        return None
    tokens = sum(sample.tokens for sample in fitting)
    return SampleCheck(
        sequences=len(fitting),
        agreement=agreement,
        confident=confident,
        wanted_agreement=sum(sample.agreeing for sample in fitting) / tokens,
        wanted_confident=sum(sample.confident for sample in fitting) / tokens,
    )
